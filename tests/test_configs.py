"""Every config is an experiment, and says what it costs, what to expect and how to run it."""

import ast
import pathlib

import pytest

import jaxformer
from jaxformer.experiment import describe, load

CONFIGS = sorted((pathlib.Path(jaxformer.__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_an_experiment_that_tells_about_itself(path):
    experiment = load(path)
    assert describe(experiment)["type"] == "Experiment"
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m train configs/{path.name}" in doc
    assert "Expected:" in doc and "Data:" in doc
    assert experiment.flops is not None, "or no run of it knows its speed"
