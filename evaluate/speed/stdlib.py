"""AdamW and Muon side by side on configs/decoder_stdlib.py, by steps and by CPU seconds.

Each run is evaluated as it goes, and with `--whole` on the whole held-out split at its end.
CPU seconds are those of the process for training: compiling, input and steps, and neither
evaluations nor saves, nor what is done once before: tokens are learned and texts encoded.
The picture of the runs that a file holds, and their table in Markdown:
    python -m evaluate.speed.stdlib RUNS.json PICTURE.png
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import pathlib
import tempfile

import jax
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from evaluate.speed.__main__ import held
from jaxformer.experiment import load
from train.run import train

CONFIGS = {"Muon": "configs/decoder_stdlib.py", "AdamW": "configs/decoder_stdlib_adamw.py"}
TASKS = ("held_out", "completions")
SCORE = "eval/test/bits_per_byte"
LIMIT = 600  # CPU seconds.
COLOURS = {"Muon": "tab:blue", "AdamW": "tab:orange"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--seed", type=int, help="the first, default 0; --rounds seeds")
    parser.add_argument("--every", type=int, help="steps between evaluations, default 80")
    parser.add_argument("--optimizer", choices=CONFIGS, help="default: both")
    parser.add_argument("--whole", action="store_true", help="the tasks too, at the end")
    parser.add_argument("--runs", help="a folder for the runs, which go on where one ended")
    parser.add_argument("--set", dest="overrides", nargs="*", help="such as model.width=256")


def run(
    rounds: int = 3,
    seed: int = 0,
    every: int = 80,
    optimizer: str | None = None,
    whole: bool = False,
    runs: str | None = None,
    overrides: list[str] | None = None,
) -> dict:
    """Trains each recipe with `rounds` seeds; prints and returns a row a run."""
    rows = []
    for number in range(seed, seed + rounds):
        for name in [optimizer] if optimizer else CONFIGS:
            each = [f"seed={number}", f"eval_every={every}", f"keep.every={every}"]
            # What was spent up to an evaluation is then told before it.
            each.append(f"log_every={math.gcd(every, 10)}")
            each += overrides or []
            workdir = pathlib.Path(runs, f"{name}_{number}") if runs else None
            made = one(CONFIGS[name], each, TASKS if whole else (), workdir)
            rows.append({"optimizer": name, "seed": number} | made)
            shown = [f"{k} {v}" for k, v in rows[-1].items() if k != "curve"]
            print("  ".join(shown), flush=True)
    return {"overrides": overrides or [], "rows": rows}


def one(
    config: str, overrides: list[str], names: tuple[str, ...], workdir: pathlib.Path | None
) -> dict:
    """A run's curve and its last scores, those of the tasks with these names among them."""
    experiment = load(config, overrides)
    tasks = {name: experiment.tasks[name] for name in names}
    experiment = dataclasses.replace(experiment, tasks=tasks)
    with tempfile.TemporaryDirectory() as passing, contextlib.redirect_stdout(io.StringIO()):
        workdir = workdir or pathlib.Path(passing)
        state = train(experiment, workdir)
        text = (workdir / "metrics.jsonl").read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    scores = {k: v for row in logged for k, v in row.items() if k.startswith("eval/")}
    points = curve(logged)
    return {
        "steps": experiment.steps,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "cpu_seconds": points[-1]["cpu_seconds"],
        "cpu_seconds_of_all": round(sum(row["seconds/cpu"] for row in logged), 1),
        **{name.removeprefix("eval/"): round(v, 4) for name, v in scores.items()},
        "curve": points,
    }


def curve(logged: list[dict]) -> list[dict]:
    """Steps, CPU seconds of training and bits a byte, of the rows of a metrics.jsonl."""
    spent, points = 0.0, []
    for row in logged:
        if SCORE in row:  # Its seconds are of the evaluation, and of a save.
            point = {"step": row["step"], "cpu_seconds": round(spent, 1)}
            points.append(point | {"bits_per_byte": round(row[SCORE], 4)})
        elif not any(name.startswith("eval/") for name in row):
            spent += row["seconds/cpu"]
    return points


def table(rows: list[dict]) -> str:
    """Markdown: a row a run, with the last evaluation and the last within ten CPU minutes."""
    lines = [
        "| optimizer | seed | steps | CPU seconds | bits a byte | within 600 CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["optimizer"], row["seed"])):
        last = row["curve"][-1]
        early = [p for p in row["curve"] if p["cpu_seconds"] <= LIMIT][-1:]
        told = "".join(f"{p['bits_per_byte']:.3f}, step {p['step']}" for p in early)
        lines.append(
            f"| {row['optimizer']} | {row['seed']} | {last['step']} | "
            f"{last['cpu_seconds']:.0f} | {last['bits_per_byte']:.3f} | {told} |"
        )
    return "\n".join(lines)


def draw(found: list[dict], path: pathlib.Path) -> None:
    """Bits a byte against steps and CPU seconds; a line a run."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True)
    for axis, by, label in zip(
        axes, ("step", "cpu_seconds"), ("steps", "CPU seconds of training"), strict=True
    ):
        named = set()
        for row in (row for run in found for row in run["rows"]):
            name = row["optimizer"]
            xs = [point[by] for point in row["curve"]]
            ys = [point["bits_per_byte"] for point in row["curve"]]
            told = None if name in named else name
            axis.plot(xs, ys, color=COLOURS[name], label=told, marker=".", linewidth=1)
            named.add(name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("bits a byte of 128 held-out rows")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    drawer = argparse.ArgumentParser(prog="python -m evaluate.speed.stdlib")
    drawer.add_argument("runs", type=pathlib.Path, help="a file that --json wrote")
    drawer.add_argument("picture", type=pathlib.Path, help="a PNG to draw")
    told = drawer.parse_args()
    draw(held(told.runs), told.picture)
    print(table([row for run in held(told.runs) for row in run["rows"]]))
