"""AdamW and Muon side by side on configs/vit_digits.py: steps to 97 %, final accuracy."""

import contextlib
import io
import json
import pathlib
import tempfile
import time

from jaxformer.experiment import load
from train.run import train

CONFIGS = {"Muon": "configs/vit_digits.py", "AdamW": "configs/vit_digits_adamw.py"}
SEEDS = (0, 1, 2)
GOAL, EVERY = 0.97, 25


def run(rounds: int = len(SEEDS)) -> dict:
    """Trains each recipe with `rounds` seeds and prints a row a run."""
    rows = []
    for seed in range(rounds):
        for name, config in CONFIGS.items():
            experiment = load(config, [f"seed={seed}", f"eval_every={EVERY}"])
            with tempfile.TemporaryDirectory() as workdir:
                start = time.monotonic()
                with contextlib.redirect_stdout(io.StringIO()):
                    train(experiment, workdir)
                seconds = time.monotonic() - start
                text = pathlib.Path(workdir, "metrics.jsonl").read_text()
            scores = [json.loads(line) for line in text.splitlines()]
            scores = [r for r in scores if "eval/test/top1" in r]
            reached = [r["step"] for r in scores if r["eval/test/top1"] >= GOAL]
            rows.append(
                {
                    "optimizer": name,
                    "seed": seed,
                    "steps": experiment.steps,
                    "steps_to_97": reached[0] if reached else None,
                    "top1": scores[-1]["eval/test/top1"],
                    "seconds": round(seconds, 1),
                }
            )
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return {"rows": rows}
