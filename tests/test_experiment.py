import functools
import json
import pathlib
import sys

import pytest

from jaxformer import experiment
from jaxformer.errors import InputError
from jaxformer.experiment import describe, differences, fields, load, override

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "vit_digits.py"


@pytest.fixture(scope="module")
def digits():
    return load(CONFIG)


def test_overrides_reach_every_part(digits):
    changed = override(
        digits, "model.depth=8", "steps=500", "optimizer.rate.peak=1", "ema=0.99",
        "replicate=vocab", "model.pool=map", "data.workers=2", "evals.test.workers=1",
        "data.transforms.0.degrees=3", "mesh=data=2,fsdp=4", "ema=none", "keep.best=0",
    )  # fmt: skip
    assert (changed.model.depth, changed.steps) == (8, 500)
    assert changed.optimizer.rate.peak == 1.0 and type(changed.optimizer.rate.peak) is float
    assert changed.ema is None and changed.replicate == ("vocab",)
    assert changed.model.pool == "map" and changed.data.workers == 2
    assert changed.evals["test"].workers == 1 and changed.mesh == "data=2,fsdp=4"
    assert changed.data.transforms[0].degrees == 3 and changed.keep.best == 0
    assert changed.data.transforms[1] is digits.data.transforms[1]
    assert digits.model.depth != 8, "the original stays"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.dept=3", "model.dept: ViT has no field 'dept'; did you mean 'depth'?"),
        ("step=3", "step: Experiment has no field 'step'; did you mean 'steps'?"),
        ("data.transforms.7.shift=1", "tuple has no field '7'; it has 0, 1"),
        ("steps.x=3", "steps.x: int has no field 'x'; it is a value"),
        ("steps=many", "steps: expected int, got 'many'"),
        ("steps=1.5", "steps: expected int, got '1.5'"),
        ("model.pool=mean", "model.pool: expected cls or tok or gap or map, got 'mean'"),
        ("ema=yes", "ema: expected float | None, got 'yes'"),
        (
            "evals.test=3",
            "is a Pipeline, and no '3'; set its fields, such as evals.test.source",
        ),
        ("data.source=x", "data.source: expected RandomAccessDataSource, got 'x'"),
        ("objective=x", "objective: expected Objective, got 'x'"),
        ("steps", "'steps' must be NAME=VALUE, such as steps=500"),
    ],
)
def test_an_override_that_does_not_fit_says_what_would(assignment, message, digits):
    with pytest.raises(InputError) as error:
        override(digits, assignment)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_listed_field_can_be_set_to_its_own_value(digits):
    for name, value in fields(digits):
        if callable(value) or name == "rules":
            continue
        assert describe(override(digits, f"{name}={value}")) == describe(digits), name


def test_a_value_is_never_run(digits, tmp_path):
    for text in ("__import__('os')", "().__class__"):
        assert override(digits, f"mesh={text}").mesh == text
    with pytest.raises(InputError, match="expected int"):
        override(digits, "steps=2+2")


def test_description_is_json_and_differences_list_all_at_once(digits):
    old = json.loads(json.dumps(describe(digits)))
    assert not differences(old, describe(digits))
    new = describe(
        override(digits, "model.depth=9", "seed=4", "mesh=data=2", "model.remat=full")
    )
    assert differences(old, new) == [
        f"- model.depth: {digits.model.depth}", "+ model.depth: 9", "- seed: 0", "+ seed: 4",
    ]  # fmt: skip
    assert differences({"a": 1}, {"b": 2}) == ["- a: 1", "+ b: 2"]


def test_configs_that_are_none(tmp_path):
    with pytest.raises(
        InputError, match=r"there is no such config; beside it are .*vit_digits"
    ):
        load(CONFIG.with_name("vit_digit.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(InputError, match="a config defines a function experiment"):
        load(empty)


def test_loading_leaves_no_module_behind(tmp_path):
    config = tmp_path / "fleeting.py"
    config.write_text("from configs.vit_digits import experiment\n")
    assert load(config, ["steps=4"]).steps == 4
    assert "fleeting" not in sys.modules
    config.write_text("def experiment():\n    return {'steps': 3}\n")
    with pytest.raises(InputError, match=r"returned dict; it returns an Experiment"):
        load(config)
    with pytest.raises(InputError, match=r"a config is a Python file"):
        load(CONFIG.parent.parent / "README.md")


@pytest.mark.parametrize(
    "assignment",
    [
        "steps=0",
        "keep.every=0",
        "eval_every=0",
        "accumulate=0",
        "ema=2.0",
        "objective.smoothing=2.0",
    ],
)
def test_numbers_out_of_range_are_named(assignment, digits):
    with pytest.raises(InputError, match=assignment.removeprefix("objective.")):
        override(digits, assignment)


def test_what_is_no_dataclass_is_described_by_its_name_alone():
    class Source:
        pass

    assert describe(Source()) == describe(Source())
    a, b = (functools.partial(sorted, reverse=r) for r in (True, False))
    assert describe(a) != describe(b)


def test_free_fields_exist(digits):
    names = {name for name, _ in fields(digits)}
    for free in experiment.FREE:
        assert any(n == free or n.startswith(f"{free}.") for n in names), free
