"""`python -m evaluate.speed NAME [--json FILE]`: benchmarks, one file a family."""

import argparse
import importlib
import json
import os
import pathlib
import platform
import sys

import jax

NAMES = {
    "digits": "AdamW and Muon side by side on the main job, three seeds",
    "vit": "one ViT training step beside torch's",
}


def hardware() -> dict[str, str | int]:
    """What the numbers beside it were measured on."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        "device": f"{platform.processor() or platform.machine()} {kind}",
        "devices": len(devices),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def main() -> int:
    """Runs one benchmark, prints its table and writes its JSON."""
    told = "\n".join(f"  {name}: {what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.speed",
        description=f"benchmarks:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", help="a file for every number")
    parser.add_argument("--rounds", type=int, help="how often each side is timed")
    args = parser.parse_args()
    module = importlib.import_module(f"evaluate.speed.{args.name}")
    rounds = {"rounds": args.rounds} if args.rounds else {}
    found = {"hardware": hardware(), **module.run(**rounds)}
    if args.json:
        path = pathlib.Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
