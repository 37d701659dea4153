"""`python -m evaluate.speed.table FILE ...`: Markdown for the README from attention's JSON."""

import json
import pathlib
import sys
from collections.abc import Iterable

from jaxformer.errors import InputError
from jaxformer.program import entry

ROWS = ("layers", "kernels", "masks", "rows", "timed", "sized")


def markdown(found: dict | list[dict]) -> str:
    """The tables of one file that `python -m evaluate.speed attention --json` wrote.

    Of several runs of one ruler, what the last one found of a case.
    """
    runs = found if isinstance(found, list) else [found]
    rows = {name: [r for run in runs for r in run.get(name, ())] for name in ROWS}
    tables = {"tpu": _tpu, "gpu": _gpu, "cpu": _cpu}[runs[0]["ruler"]](rows)
    return "\n\n".join([*map(_head, runs), *tables]) + "\n"


def _head(run: dict) -> str:
    where = run["hardware"]["device"]
    told = f"`{run['command']}`, commit {run['commit']}, jax {run['hardware']['jax']}"
    if run["ruler"] == "tpu":
        return f"Compiled ahead of time by libtpu {run['libtpu']}; no TPU was used. {told}"
    if run["ruler"] == "gpu":
        return f"TFLOP/s by useful area on {where}, bf16, medians. {told}"
    clock = "CPU seconds" if run.get("clock") == "cpu" else "the wall's clock"
    return f"On {where}, float32, forward + backward, medians by {clock}. {told}"


TPU = {
    "layers": ("HBM bytes of a layer, X", ("chip", "H", "T", "backward", "fused"), "X"),
    "kernels": ("Cycles a head", ("chip", "H", "T", "backward"), "cycles_a_head"),
    "masks": (
        "Masks, by useful area of unmasked",
        ("mask", "chip", "H", "backward"),
        "price",
    ),
}


def _tpu(found: dict) -> list[str]:
    """The tables of those parts that were measured."""
    tables = []
    for part, (title, by, value) in TPU.items():
        rows = [r for r in found[part] if "mask" not in by or r["mask"]]
        third = {"layers": ("XLA",), "kernels": ("flash",)}.get(part, ())
        sides = ("ours", "splash", *third)
        if rows:
            table = _pivot(rows, by, sides, value, ratio=part == "kernels")
            tables.append(f"{title}\n\n{table}")
    return tables


def _gpu(found: dict) -> list[str]:
    sides = ("ours", "auto", "cuDNN", "XLA", "tokamax")
    rows = [r | {"mask": r["mask"] or "full"} for r in found["rows"]]
    return [
        f"{way.capitalize()}\n\n" + _pivot(rows, ("mask", "H", "T"), sides, way)
        for way in ("forward", "backward")
    ]


def _cpu(found: dict) -> list[str]:
    sides = ("auto", "chunked", "reference")
    mib = [r | {"MiB": r["temporaries"] / 2**20} for r in found["sized"]]
    times = _pivot(found["timed"], ("T",), sides, "median_ms")
    alone = [r | {"MiB": r["process"] / 2**20} for r in found["timed"] if r.get("process")]
    return [
        f"Milliseconds\n\n{times}",
        *(["A process, MiB\n\n" + _pivot(alone, ("T",), sides, "MiB")] if alone else []),
        "Temporaries, MiB\n\n" + _pivot(mib, ("T",), sides, "MiB"),
    ]


def _pivot(rows: Iterable[dict], by: tuple, sides: tuple, value: str, ratio=False) -> str:
    """One line for each case, one column for each side."""
    cases: dict[tuple, dict[str, str | float]] = {}
    for row in rows:
        case = tuple(_words(name, row[name]) for name in by)
        cases.setdefault(case, {})[row["side"]] = row.get(value, "cannot")
    columns = [*by, *sides, *(["ratio"] if ratio else [])]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for case, held in cases.items():
        cells = [_number(held.get(side, "")) for side in sides]
        if ratio:
            a, b = (held.get(side) for side in sides[:2])
            if isinstance(a, float) and isinstance(b, float):
                cells.append(f"{a / b:.2f}")
            else:
                cells.append("")
        lines.append("| " + " | ".join([*case, *cells]) + " |")
    return "\n".join(lines)


def _words(name: str, value) -> str:
    if isinstance(value, bool):
        yes, no = {"backward": ("yes", ""), "fused": ("norm, rotary", "plain")}[name]
        return yes if value else no
    return str(value)


def _number(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@entry
def main() -> int:
    """Prints the tables of every file named."""
    for name in sys.argv[1:]:
        try:
            found = json.loads(pathlib.Path(name).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name}: is no file of `evaluate.speed attention --json` ({error})"
            ) from error
        print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
