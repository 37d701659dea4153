"""Every config is an experiment, and says what it costs, what to expect and how to run it."""

import ast
import dataclasses
import pathlib

import jax
import pytest

import jaxformer
from evaluate.run import batches, check
from jaxformer.data import stand_in
from jaxformer.errors import InputError
from jaxformer.experiment import arguments, describe, load
from jaxformer.lora import Lora
from jaxformer.optim import Parts
from jaxformer.plan.ahead import laid_out
from jaxformer.setup import model_flops

CONFIGS = sorted((pathlib.Path(jaxformer.__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_an_experiment_that_tells_about_itself(path):
    experiment = load(path)
    assert describe(experiment)["type"] == "Experiment"
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m train configs/{path.name}" in doc
    assert "Expected:" in doc and "Data:" in doc
    assert experiment.flops is not None, "or no run of it knows its speed"


@pytest.mark.parametrize("name", ["dit_digits", "dit_mean_digits", "mmdit_glyphs"])
def test_the_work_of_a_step_is_counted_of_what_the_model_is_called_with(name):
    experiment = load(CONFIGS[0].with_name(f"{name}.py"))
    first = next(iter(batches(next(iter(experiment.evals.values())), 1, 1)))
    work = model_flops(experiment, arguments(experiment.objective, first))
    assert work is not None and work > 1e8


ALONE = [path for path in CONFIGS if path.stem not in ("ldm_digits", "dit_repa_digits")]


@pytest.mark.slow  # Reads or makes each one's data.
@pytest.mark.parametrize("path", ALONE, ids=lambda p: p.stem)
def test_a_config_is_laid_out_without_its_data(path):
    """As a plan does it and a run; but for those that read what another run has made."""
    experiment = load(path, ["mesh="])
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    made = laid_out(experiment, batch, jax.devices()[:1])
    assert list(made.inputs) == arguments(experiment.objective, batch)


def with_lora(name):
    experiment = load(CONFIGS[0].with_name(f"{name}.py"), ["tasks={}", "pictures={}"])
    thin = Parts(experiment.optimizer, ("lora",))
    return dataclasses.replace(experiment, model=Lora(experiment.model), optimizer=thin)


KINDS = ["vit_digits", "mae_digits", "dit_digits"]
LONGER = ["clip_glyphs", "mdlm_stdlib", "mmdit_glyphs"]
KINDS += [pytest.param(name, marks=pytest.mark.slow) for name in LONGER]


@pytest.mark.parametrize("name", KINDS)
def test_thin_matrices_go_with_every_kind(name):
    experiment = with_lora(name)
    check(experiment)
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    made = laid_out(experiment, batch, jax.devices()[:1])
    assert model_flops(experiment, made.inputs) and set(made.state.params) == {"model", "lora"}


def test_what_is_all_convolutions_has_no_room_for_thin_matrices():
    experiment = with_lora("kl_digits")
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    with pytest.raises(InputError, match="has no hidden matrix for LoRA"):
        laid_out(experiment, batch, jax.devices()[:1])
