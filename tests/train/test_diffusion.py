"""A tiny DiT learns, is drawn from while it learns, and is judged by a tiny classifier."""

import json

import pytest

import evaluate.__main__
from jaxformer.experiment import load
from tests.train.test_commands import FAST
from train.run import train

TINY = ("model.width=16", "model.depth=1", "model.num_heads=2", "batch_size=16", "steps=4")
FEW = ("pictures.digits.rows=1", "pictures.digits.draw.sampler.steps=2", "eval_every=4")


@pytest.mark.slow
def test_a_dit_learns_draws_and_is_judged(tmp_path, capsys):
    judge, run = tmp_path / "judge", tmp_path / "run"
    train(load("configs/vit_digits.py", FAST), judge)
    train(load("configs/dit_digits.py", [*TINY, *FEW, "tasks={}"]), run)
    assert [p.name for p in (run / "pictures").iterdir()] == ["digits_000004.png"]
    given = [*TINY, *FEW]
    for name in ("plain", "guided"):
        given += [f"tasks.{name}.count=20", f"tasks.{name}.draw.sampler.steps=2"]
        given += [f"tasks.{name}.encoder.checkpoint={judge}"]
        given += [f"tasks.{name}.encoder.overrides={tuple(FAST)}"]
    out = tmp_path / "out.json"
    argv = ["configs/dit_digits.py", "--checkpoint", str(run), "--json", str(out), *given]
    assert evaluate.__main__.main(argv) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())["evals"]
    told = found["guided"]["protocol"]["value"]
    assert told["encoder"] == "vit_digits at step 4" and told["guidance"] == 1.5
    assert found["plain"]["frechet"]["value"] > 0 and found["plain"]["as_asked"]["count"] == 20
    assert told["reference"] == found["plain"]["protocol"]["value"]["reference"]
