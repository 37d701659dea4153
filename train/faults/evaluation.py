"""Evaluation on several processes: the same integers, and sums to float32's rounding."""

import json
import math
import pathlib
from typing import Any

import numpy as np

from train.faults.processes import TINY, begin, end, ended, meeting, started
from train.faults.row import Row, wrongs

DEVICES = 4  # of all processes together.
CLOSE = 1e-6  # Devices add float32 in another order where they lie in several processes.
# Scores of each record, and a bank of features that every device holds whole.
CONFIG = """
import dataclasses
from configs.vit_digits import experiment as digits
from evaluate.knn import KNN

def experiment():
    made = digits()
    test = made.evals["test"]
    train = dataclasses.replace(test, source=dataclasses.replace(test.source, split="train"))
    return dataclasses.replace(made, tasks={"knn": KNN(train, test)})
"""


def on_processes(folder: pathlib.Path, counts: tuple[int, ...] = (1, 2)) -> Row:
    """A checkpoint, and models of four families, judged by one process and by several.

    As many devices in all each time. In the checkpoint's case by the command itself.
    """
    config = folder / "judged.py"
    config.write_text(CONFIG)
    argv = (str(config), *TINY, "steps=2", f"mesh=data={DEVICES}")
    with started(folder / "run", 1, *argv, "tasks={}", devices=DEVICES) as processes:
        ((status, out),) = ended(processes, 600)
        if status:
            raise RuntimeError(f"a run ended with status {status}: {out}")
    command = ("evaluate", *argv, "--checkpoint", str(folder / "run"))
    found = {
        n: _said(folder, command, n)["evals"] | _said(folder, ("train.faults.judged",), n)
        for n in counts
    }
    first, *others = (dict(_numbers(found[n])) for n in counts)
    apart = max(
        abs(a - b) / max(abs(a), 1e-30) for other in others for a, b in _pairs(first, other)
    )
    exact = sum(
        all(other[name] == value for other in others)
        for name, value in first.items()
        if not float(value).is_integer()
    )
    whole = {name for name, value in first.items() if float(value).is_integer()}
    return Row(
        f"evaluation on {' and '.join(map(str, counts))} processes of {DEVICES} devices in "
        "all: classes and neighbours; perplexity, retrieval, Frechet distance, VQA",
        f"{len(whole)} integers equal; {len(first) - len(whole)} other sums differ by "
        f"{apart:.1e} at most, {exact} not at all",
        wrongs(
            all_measure_the_same=all(first.keys() == other.keys() for other in others),
            integers_are_equal=all(
                other[name] == first[name] for other in others for name in whole
            ),
            sums_are_equal_to_1e_6=apart <= CLOSE,
        ),
        {
            "apart": apart,
            "numbers": len(first),
            "integers": len(whole),
            "exact": exact,
            "sums": {
                n: [some[n] for some in (first, *others)] for n in first if n not in whole
            },
        },
    )


def _pairs(a: dict[str, float], b: dict[str, float]):
    return ((a[name], b[name]) for name in a.keys() & b.keys())


def _said(folder: pathlib.Path, command: tuple[str, ...], count: int) -> dict[str, Any]:
    """What `count` processes write down together."""
    out = folder / f"{command[0]}.{count}.json"
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} "
        "--xla_backend_optimization_level=0"
    }
    argv = (*command, "--json", str(out))
    processes = [begin((*argv, *meet), environment) for meet in meeting(count)]
    try:
        for status, said in ended(processes, 600):
            if status:
                raise RuntimeError(f"a process of {count} ended with status {status}: {said}")
    finally:
        for process in processes:
            end(process)
    return json.loads(out.read_text())


def _numbers(found: dict[str, Any]):
    """(name, number) of every sum and count."""
    for task, group in found.items():
        for name, metric in group.items():
            for part in ("sum", "count"):
                for i, value in enumerate(np.ravel(metric[part])):
                    if value is not None and math.isfinite(value):
                        yield f"{task}/{name}/{part}/{i}", value
