"""`python -m evaluate.speed NAME [--json FILE [--add]]`: benchmarks, one file a family."""

import argparse
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax

from jaxformer.errors import InputError
from jaxformer.program import entry, write_json

NAMES = {
    "attention": "ours beside other kernels, by a GPU, a CPU, or a TPU's compiler",
    "decoder": "training, prefill and decoding of a language model beside torch's",
    "dit": "DiT on latents, training and sampling, beside diffusers'",
    "digits": "AdamW and Muon side by side on the main job, three seeds",
    "infill": "holes filled by unmasking beside text by the token: speed and quality",
    "stdlib": "AdamW and Muon side by side on the decoder's job, by CPU seconds",
    "unmask": "text by unmasking beside text by the token: speed and quality",
    "vit": "ViTs from Ti to L, training and inference, beside torch's",
    "vlm": "training, prefill and decoding of a model that sees beside torch's",
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


def commit() -> str:
    """What is checked out, "-dirty" where it was changed; "unknown" without git."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def held(path: pathlib.Path) -> list[dict]:
    """The runs that a file holds: one, or a list, or none if it is not there.

    Raises:
      InputError: it holds something else.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: holds no runs ({error}); name another file") from error
    return found if isinstance(found, list) else [found]


@entry
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
    parser.add_argument("--add", action="store_true", help="to the runs that FILE holds")
    parser.add_argument("--rounds", type=int, help="how often each side is timed")
    name = next((a for a in sys.argv[1:] if a in NAMES), None)
    module = importlib.import_module(f"evaluate.speed.{name}") if name else None
    if module is not None and hasattr(module, "add_options"):
        module.add_options(parser)
    options = {k: v for k, v in vars(parser.parse_args()).items() if v}
    assert module is not None and name == options.pop("name")
    file, add = options.pop("json", None), options.pop("add", False)
    if add and not file:
        parser.error("--add needs the --json FILE to which it adds")
    command = " ".join(["python -m evaluate.speed", *sys.argv[1:]])
    measured = module.run(**options)  # It may choose the devices, so hardware comes after.
    found = {"hardware": hardware(), "command": command, "commit": commit(), **measured}
    if file:
        path = pathlib.Path(file)
        write_json(path, [*held(path), found] if add else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
