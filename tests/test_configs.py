"""Every config is an experiment, and says what it costs, what to expect and how to run it."""

import ast
import pathlib

import pytest

import jaxformer
from evaluate.run import batches
from jaxformer.experiment import arguments, describe, load
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
