"""A run begins with parameters of files, each where it belongs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import checkpoint, convert
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.models.decoder import Decoder
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from jaxformer.start import Hub, Run, filled
from tests.layers.test_block import randomized
from train.faults.processes import CONFIG, TINY
from train.run import train

PARAMS = {
    "language": {"table": jnp.zeros((5, 3)), "head": jnp.zeros((3, 5))},
    "vision": {"stack": jnp.zeros((2, 4)), "norm": jnp.zeros(4)},
}


def test_what_is_under_a_path_is_filled_and_nothing_else():
    found = {"table": jnp.ones((4, 3)), "head": jnp.ones((3, 4)), "norm": jnp.ones(3)}
    apart = (("table", 0), ("head", 1))
    made = filled(PARAMS, found, "language", "", "here", apart)
    expected = np.ones((5, 3))
    expected[4] = 0  # A token that is new.
    np.testing.assert_array_equal(made["language"]["table"], expected)
    np.testing.assert_array_equal(made["language"]["head"], expected.T)
    assert made["vision"] is not PARAMS["vision"] and not made["vision"]["stack"].any()


def test_layers_that_are_not_there_are_left_out():
    stack = jnp.arange(12.0).reshape(3, 4)
    found = {"tower": {"vision": {"stack": stack, "norm": jnp.ones(4)}}}
    made = filled(PARAMS, found, "vision", "tower/vision", "here", (("stack", 0),))
    np.testing.assert_array_equal(made["vision"]["stack"], stack[:2])
    whole = filled(PARAMS, PARAMS | {"more": jnp.ones(2)}, "", "", "here")
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    part = filled(
        PARAMS["vision"], found, "", "tower/vision", "here", (("stack", 0),)
    )  # All, of a part.
    np.testing.assert_array_equal(part["norm"], np.ones(4))


@pytest.mark.parametrize(
    ("into", "found", "said"),
    [
        ("vision", {"stack": jnp.ones((2, 4))}, r"under 'vision'(.|\n)*- norm"),
        ("vision/norm", {"norm": jnp.ones(4)}, "- "),
        ("vision", {"stack": jnp.ones((3, 5)), "norm": jnp.ones(4)}, r"\+ stack \(3, 5\)"),
        ("sight", {}, "does not fill what is under 'sight'"),
    ],
)
def test_what_does_not_fill_is_told(into, found, said):
    with pytest.raises(InputError, match=said):
        filled(PARAMS, found, into, "", "here")


@pytest.mark.parametrize(
    "apart",
    [(), (("stack", 1),), (("norm", 0),), (("stack", 0), ("stacks", 0))],
    ids=["none", "another axis", "another array", "no such array"],
)
def test_what_differs_is_told_where_the_config_does_not_say_so(apart):
    found = {"stack": jnp.ones((3, 4)), "norm": jnp.ones(4)}
    said = r"- vision/stacks" if len(apart) == 2 else r"- stack \(2, 4\)\n\+ stack \(3, 4\)"
    with pytest.raises(InputError, match=f"in `apart` the axes that may differ(.|\n)*{said}$"):
        filled(PARAMS, found, "vision", "", "here", apart)


@pytest.mark.slow
def test_a_directory_of_the_hub_fills_a_part(tmp_path):
    model = Decoder(vocab=11, width=8, depth=2, mlp_dim=12, num_heads=2, tied=False)
    drawn = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = randomized(drawn, jax.random.key(1))
    convert.save(tmp_path, model, params, kind="llama")
    mesh = make_mesh("fsdp=2", jax.devices()[:2])
    blank = {"language": jax.tree.map(jnp.zeros_like, params), "connector": jnp.zeros(2)}
    made = Hub(str(tmp_path), "language").read(blank, mesh, FSDP_TENSOR)
    jax.tree.map(np.testing.assert_array_equal, made["language"], params)


@pytest.mark.slow  # Two runs.
def test_a_run_goes_on_from_another(tmp_path):
    experiment = load(CONFIG, [*TINY, "mesh=data=1", "steps=1"])
    first = train(experiment, tmp_path / "first", devices=jax.devices()[:1])
    still = dataclasses.replace(
        experiment,
        start=(Run(str(tmp_path / "first")),),
        optimizer=dataclasses.replace(
            experiment.optimizer, rate=dataclasses.replace(experiment.optimizer.rate, peak=0.0)
        ),
    )
    second = train(still, tmp_path / "second", devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    assert checkpoint.steps(tmp_path / "second" / "checkpoints") == [1]
    other = dataclasses.replace(still, start=())
    with pytest.raises(InputError, match=r"of another experiment(?s:.)*- start\.0"):
        train(other, tmp_path / "second", devices=jax.devices()[:1])
