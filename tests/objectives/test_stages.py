"""One objective after the other: each step is that of the stage whose turn it is."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, override
from jaxformer.metrics import Mean
from jaxformer.objectives.classify import Classify
from jaxformer.objectives.stages import Stages
from jaxformer.objectives.unmask import Unmask
from jaxformer.optim import Cosine, Muon
from jaxformer.setup import setup
from jaxformer.steps import init_state, train_step
from tests.objectives.test_unmask import MODEL, Text

FIRST, THEN = Unmask(11, block=1, shift=True), Unmask(11, block=4, shift=True, samples=2)
STAGES = Stages((FIRST, THEN), until=(2,))


@dataclasses.dataclass(frozen=True)
class Toward:
    """Learns to be `goal`, from noise of a batch that is drawn before it is split."""

    goal: float
    told: str
    inputs: tuple[str, ...] = ("x",)

    def prepare(self, batch, key, step):
        return batch | {self.told: jax.random.normal(key, batch["x"].shape)}

    def loss(self, apply, params, batch, key):
        found = (apply(params, batch["x"]) - self.goal + batch[self.told]) ** 2
        return found.mean(), {"both": found.max(), self.told: found.min()}

    def measure(self, apply, params, batch, key):
        return {self.told: Mean(jnp.float32(self.goal), jnp.int32(1))}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_that_of_its_stage(parts):
    every = [Toward(1.0, "near"), Toward(5.0, "far"), Toward(9.0, "out")]
    stages = Stages(tuple(every), until=(2, 3))
    tx, batch, key = optax.sgd(0.1), {"x": jnp.arange(4.0)}, jax.random.key(3)

    def apply(params, x):
        return params * x

    def stepper(objective):
        loss = functools.partial(objective.loss, apply)
        how = {"loss_fn": loss, "tx": tx, "prepare": objective.prepare, "accumulate": parts}
        return jax.jit(functools.partial(train_step, **how))

    together, alone = stepper(stages), [stepper(one) for one in every]
    state = init_state(jnp.ones(()), tx)
    for number, turn in enumerate([0, 0, 1, 2, 2]):
        expected, told = alone[turn](state, batch, key)
        state, found = together(state, batch, key)
        assert found.pop("stage") == turn and int(state.step) == number + 1
        chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
        assert set(found) == {"loss", "grad_norm", "both"}  # What all of them tell.
        for name, value in found.items():
            chex.assert_trees_all_close(value, told[name], rtol=1e-5)
    assert set(stages.measure(apply, None, {}, key)) == {"out"}  # The last one is measured.


def test_stages_are_reached_by_overrides():
    found = override(STAGES, "stages.1.block=2", "until=(3,)")
    assert found.stages == (FIRST, Unmask(11, block=2, shift=True, samples=2))
    assert found.until == (3,)


@pytest.mark.parametrize(
    ("stages", "until", "message"),
    [
        ((FIRST, THEN), (), "must be one step fewer than the 2 stages"),
        ((FIRST, THEN, THEN), (3, 3), "must be steps that rise"),
        ((FIRST, THEN), (0,), "must be steps that rise, from 1 on"),
    ],
)
def test_stages_without_an_order_are_told(stages, until, message):
    with pytest.raises(InputError, match=message):
        Stages(stages, until)


def test_a_run_that_ends_before_the_last_stage_is_told():
    stages = Stages((FIRST, THEN), (300,))
    assert "after step 300, and this run ends at 300" in stages.left_out(300)
    assert not stages.left_out(301) and not Stages((THEN,), ()).left_out(1)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (Unmask(12), "mask_id=12 is no token"),
        (Classify(), "stages.0 is called with image, and the last with tokens"),
    ],
)
def test_a_stage_that_does_not_fit_is_told(first, message):
    with pytest.raises(InputError, match=message):
        Stages((first, THEN), (2,)).check(MODEL, Pipeline(Text()))


def test_an_optimizer_that_looks_at_the_forward_pass_is_told():
    experiment = Experiment(
        MODEL, STAGES, Muon(Cosine(0.02), qk_clip=100.0), Pipeline(Text()), 4, 2
    )
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    with pytest.raises(InputError, match="an optimizer without qk_clip"):
        setup(experiment, [tokens], jax.devices()[:1])
