"""A plan of a tiny model for chips that are not there, and beside the truth on a CPU."""

import json
import pathlib

import jax
import numpy as np
import pytest

import train.plan
from jaxformer.data import stand_in
from jaxformer.data.loader import to_mesh, train_batches
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.plan import plan, search
from jaxformer.plan.advice import advice
from jaxformer.plan.ahead import _compile, held, laid_out, lasting
from jaxformer.setup import Setup

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "vit_digits_adamw.py")
TINY = ("model.width=128", "model.depth=2", "model.mlp_dim=256", "batch_size=64")


WORDS = {  # libtpu's, where a kernel does not fit.
    "leave each chip fewer heads": "E1001: Ran out of memory: Used 72.0M of 64.0M vmem",
    "set LIBTPU_INIT_ARGS": "E1001: RESOURCE_EXHAUSTED: Scoped allocation with size 31.30M and "
    "limit 16.00M exceeded scoped vmem limit by 15.30M",
}


@pytest.mark.parametrize("remedy", WORDS)
def test_a_kernel_that_does_not_fit_has_a_remedy(remedy):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(WORDS[remedy])

    made = object.__new__(Setup)
    object.__setattr__(made, "lower", lambda _: Lowered())
    with pytest.raises(InputError, match=remedy):
        _compile(made, {})


@pytest.fixture(scope="module")
def planned():
    return plan(load(CONFIG, [*TINY, "mesh=data=2,fsdp=2"]), "v5e:2x2")


def test_a_plan_knows_what_runs(planned):
    assert planned.fits and planned.chips == 4 and planned.mesh == {"data": 2, "fsdp": 2}
    cost = planned.cost
    assert 0.9 * planned.model_flops < cost.flops * 4 < 2 * planned.model_flops
    assert cost.seconds >= cost.roofline and 0 < planned.mfu < 1
    assert {axis for c in planned.collectives for axis in c.axes} == {"data", "fsdp"}
    # What lies over fsdp is gathered and its gradients are reduced over all.
    parameters = sum(row.bytes for row in planned.explanation.rows)
    assert parameters < planned.collective_bytes < 6 * parameters
    assert planned.memory.parameters == sum(
        row.bytes_per_device for row in planned.explanation.rows
    )
    assert json.loads(json.dumps(planned.as_json()))["memory"]["total"] > planned.memory.state


def test_a_page_tells_it_to_a_person(planned):
    experiment = load(CONFIG, TINY)
    page = train.plan.page(planned, CONFIG, experiment, price=2.0, parameters=True)
    for part in ("HBM of each device", "predicted", "MFU", "over fsdp", "an epoch of 1,437"):
        assert part in page
    assert "stack/block/mlp/up/kernel" in page
    assert "data=2,fsdp=2" in train.plan.line(planned)
    assert all(sentence[0].islower() or sentence[0].isdigit() for sentence in advice(planned))


CHIPS = ["--topology", "v5e:2x2"]
BAD = {
    "topology": (["--topology", "v5p:3x3x3"], "no topology is named 'v5p:3x3x3'; those that"),
    "kind": (["--topology", "h100:8"], "v5e: 2x2 2x4"),
    "mesh": ([*CHIPS, "--mesh", "data=3"], "data=3 needs 3 devices but there are 4"),
    "batch": ([*CHIPS, "batch_size=6"], "batch_size=6 does not divide over 4"),
    "program": ([*CHIPS, "--program", f"{CONFIG}/p.txt"], CONFIG),
    "search": ([*CHIPS, "--search", "--price", "2"], "--price is of one plan, and --search"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_before_any_compile(name, capsys, monkeypatch):
    monkeypatch.setattr("jaxformer.plan.ahead._compile", lambda *_: pytest.fail("compiled"))
    argv, sentence = BAD[name]
    assert train.plan.main([CONFIG, *TINY, *argv]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_cannot_fit_is_not_compiled(capsys, monkeypatch):
    monkeypatch.setattr("jaxformer.plan.ahead._compile", lambda *_: pytest.fail("compiled"))
    argv = [str(ROOT / "configs" / "decoder_70b.py"), "--topology", "v5e:2x2"]
    assert train.plan.main(argv) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "- parameters and what the optimizer keeps" in out


RECIPES = {
    "vit_s16_imagenet": {"image": (1024, 224, 224, 3), "target": (1024, 1000)},
    "siglip_b16": {"image": (16_384, 256, 256, 3), "tokens": (16_384, 64)},
    "dit_xl2_imagenet": {"image": (256, 32, 32, 4), "label": (256,)},
    "decoder_7b": {"tokens": (1024, 4096), "segments": (1024, 4096)},
    "llava_7b": {"tokens": (256, 768), "images": (256, 1, 336, 336, 3)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_is_known_without_its_data(name):
    experiment = load(ROOT / "configs" / f"{name}.py")
    found = stand_in.shapes(experiment.data, experiment.batch_size)
    assert {k: found[k].shape for k in RECIPES[name]} == RECIPES[name]


def test_a_stand_in_is_shaped_as_the_data():
    experiment = load(CONFIG, TINY)
    found = stand_in.shapes(experiment.data, 64)
    data = train_batches(experiment.data, batch_size=64, seed=0)
    batch = next(data)
    data.close()
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }


def test_a_search_tries_what_can_run():
    experiment = load(CONFIG, TINY)
    found = search.candidates(experiment, "v5e:2x2", 6)
    assert len(found) == 6 and len({(e.mesh, e.model.remat, e.accumulate) for e in found}) == 6
    meshes, own = [e.mesh for e in found], experiment.model.remat
    assert meshes[0] == "data=4,fsdp=1,tensor=1", "a small state may lie on each device"
    assert len(set(meshes[:4])) == 4 and meshes[4:] == meshes[:2]
    assert [e.model.remat == own for e in found] == [True] * 4 + [False] * 2
    every = search.candidates(experiment, "v5e:2x2", 99)
    assert {e.model.remat for e in every} == {"none", "dots", "full"}
    assert {e.accumulate for e in every} == {1, 2, 4}
    assert all("tensor=8" not in e.mesh for e in found), "there are but four chips"


def test_the_state_is_as_large_as_planned():
    """Beside the truth: what 8 devices hold before and after a step, to the byte."""
    experiment = load(CONFIG, [*TINY, "mesh=data=2,fsdp=4", "ema=0.9"])
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    made = laid_out(experiment, batch, jax.devices())
    memory = lasting(made, batch, 2**30)
    state = made.init(jax.random.key(0))
    data = train_batches(experiment.data, batch_size=64, seed=0)
    real = to_mesh(next(data), made.batch)
    data.close()
    state, _ = made.step(state, real, jax.random.key(0))

    def on_the_first(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert on_the_first(state.params) == memory.parameters == held(made.state.params)
    assert on_the_first(state.opt_state) == memory.optimizer
    assert on_the_first(state.ema) == memory.average
    assert on_the_first(real) == memory.batch
    assert np.isfinite(memory.state)
