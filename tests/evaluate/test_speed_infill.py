"""The benchmark of holes: its sides fill what the task fills, and so much of it."""

import dataclasses

import numpy as np
import pytest

from evaluate.speed import infill
from evaluate.speed.unmask import Side
from jaxformer.data.tokenizer import Bytes
from jaxformer.samplers.unmask import Count
from tests.evaluate.test_infill import HOLES, MASK, trained


def side(kind):
    """A model of a byte, and its task."""
    made = trained(kind == "decoder")
    task = HOLES if kind == "decoder" else dataclasses.replace(HOLES, mask_id=MASK)
    if kind == "blocks":
        task = dataclasses.replace(task, block=infill.BLOCK, before=1.0, align=infill.BLOCK)
    return Side(made.model, made.params, task, Bytes(), None)


@pytest.mark.slow
def test_every_side_fills_what_the_task_fills(monkeypatch):
    names = {
        "decoder": "decoder",
        "masked, 2 steps": "masked",
        "blocks, 2 steps, cache": "blocks",
    }
    monkeypatch.setattr(infill, "trained", lambda config, run: side(run))
    monkeypatch.setattr(infill, "SIDES", {name: infill.SIDES[name] for name in names})
    found = infill.run(batch=2, decoder="decoder", masked="masked", blocks="blocks")
    assert found["holes"] == 2 and found["hidden"] == 28
    assert found["trained"] == ["blocks", "decoder", "masked"]
    rows = {row["side"]: row for row in found["rows"]}
    assert rows["decoder"]["calls"] == 16 and rows["decoder"]["ratio_to_decoder"] == 1
    assert rows["masked, 2 steps"]["calls"] == 2
    for name, kind in names.items():
        task = dataclasses.replace(side(kind).infill, show=Count(2))
        expected = {k: m.sum / m.count for k, m in task.run(trained(kind == "decoder")).items()}
        assert {k: rows[name][k] for k in expected} == expected
        once = infill.SIDES[name][1](side(kind))
        for ids, (_, other) in zip(once(task.holes())[0], task.fill(trained(kind == "decoder")),
                                   strict=True):  # fmt: skip
            np.testing.assert_array_equal(ids, other)
