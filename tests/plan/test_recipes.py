"""The recipes still fit, and send no more than they did: `docs/measured/plans`.

The smallest is planned anew by the slow tests. All of them, some minutes each:
    PLANS=all python -m pytest -n 0 -s -m slow tests/plan/test_recipes.py
"""

import json
import os
import pathlib

import pytest

import train.plan

PLANS = sorted((pathlib.Path(__file__).parents[2] / "docs/measured/plans").glob("*.json"))
QUICK = "vit_s16_imagenet.v5e-4x4"


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_a_recorded_plan_is_whole(path):
    plan = read(path)
    config, *rest = plan["command"]
    assert pathlib.Path(config).stem == path.stem.split(".")[0] and "--topology" in rest
    assert plan["fits"] and plan["memory"]["total"] < plan["memory"]["limit"]
    seconds = plan["model_flops"] / (plan["mfu"] * plan["cost"]["seconds"])
    assert seconds > 0 and 0 < plan["mfu"] < 1
    assert not any("?" in c["axes"] for c in plan["cost"]["collectives"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [p for p in PLANS if p.stem == QUICK or os.environ.get("PLANS") == "all"],
    ids=lambda p: p.stem,
)
def test_a_recipe_still_fits_and_sends_no_more(path, tmp_path, capsys):
    old, new = read(path), tmp_path / "new.json"
    assert train.plan.main([*old["command"], "--json", str(new)]) == 0
    found = read(new)
    assert found["fits"]
    print(
        f"\n{path.stem}: {found['collective_bytes']:,} bytes, were {old['collective_bytes']:,}"
    )
    assert found["collective_bytes"] <= 1.05 * old["collective_bytes"]
    assert found["memory"]["total"] <= 1.05 * old["memory"]["total"]
