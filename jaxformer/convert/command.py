"""`jaxformer-convert SOURCE [TARGET]`: what a checkpoint is, and the same as the hub has it."""

import argparse
import math
import sys

import jax

from jaxformer import convert
from jaxformer.convert.families import FAMILIES
from jaxformer.program import entry, writing


@entry
def main(argv: list[str] | None = None) -> int:
    """Loads, tells, and saves; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="jaxformer-convert",
        description="Reads a directory as Hugging Face saves it, checks every tensor, says "
        "what it is, and writes it again under the hub's names.",
    )
    parser.add_argument("source", help="a directory with config.json and safetensors")
    parser.add_argument(
        "target", nargs="?", help="a directory to write; without it, only tells"
    )
    parser.add_argument("--kind", help=f"write as one of {', '.join(sorted(FAMILIES))}")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="default: 5")
    args = parser.parse_args(argv)
    model, params = convert.load(args.source)
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(x.shape) for x in leaves)
    print(f"{args.source}: {type(model).__name__}, {count:,} parameters")
    if args.target:
        shard = int(args.shard_gb * 1e9)
        with writing():
            convert.save(args.target, model, params, kind=args.kind, shard_bytes=shard)
        print(f"{args.target}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
