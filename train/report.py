"""`python -m train.report DIR`: where the time of a run went, its goodput, and slow hosts."""

import argparse
import pathlib
import sys

from jaxformer.program import entry
from train.curves import shares
from train.goodput import total
from train.pace import slow


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints a table and draws `goodput.png`; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="Says where the time of a run went."
    )
    parser.add_argument("directory", help="a run's, such as runs/vit_digits")
    args = parser.parse_args(argv)
    directory = pathlib.Path(args.directory)
    found = total(directory / "metrics.jsonl")
    whole = sum(found.values())
    for kind, seconds in found.items():
        print(f"{kind:12} {seconds:12,.1f} s {seconds / whole:7.1%}")
    print(f"goodput, the share of steps that were kept: {found['steps'] / whole:.1%}")
    for line in slow(directory):
        print(line)
    picture = directory / "goodput.png"
    shares(directory / "metrics.jsonl", picture)
    print(f"over the run: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
