"""`python -m tests.parity.make [--check] [NAME ...]`: records the originals, or checks them.

Needs the extra `parity`. `--check` runs each original from its recorded files and compares
its answers with what is recorded; then it runs the original from what our `save` wrote of
our parameters, and compares again. Of an encoder of images it writes the tensors under the
names that they have in memory too, and we have to read the same from those.
"""

import argparse
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
import safetensors.torch
import torch

from jaxformer import convert
from tests.parity.case import TOLERANCE, Case, distance, weights
from tests.parity.cases import CASES
from tests.parity.rounding import Rounding

LIMIT = 400_000  # bytes of one case.
# Encoders of transformers whose names in memory, where they are others, we read too.
IN_MEMORY = {"vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae", "swin"}
IN_MEMORY |= {"clip", "siglip", "siglip2", "vivit", "videomae"}


def record(case: Case) -> None:
    """Writes the original with random parameters, its answers and its gradients."""
    shutil.rmtree(case.directory, ignore_errors=True)
    module = case.original().eval()
    randomise(module, case.scales)
    module.save_pretrained(case.directory)
    rename(next(case.directory.glob("*.safetensors")), case.hub)
    inputs = case.inputs(np.random.default_rng(3))
    outputs = case.theirs(module, {k: torch.from_numpy(v) for k, v in inputs.items()})
    found = {name: out.detach().numpy() for name, out in outputs.items()}
    steady(case, module, inputs, found)
    if case.gradients:
        w = weights(found)
        sum((outputs[n] * torch.from_numpy(w[n])).sum() for n in outputs).backward()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            for kept in module.buffers():
                kept.zero_()
        module.save_pretrained(case.directory / "gradients")
        for path in (case.directory / "gradients").iterdir():
            if path.suffix == ".json" and "index" not in path.name:
                path.unlink()
    (case.directory / "generation_config.json").unlink(missing_ok=True)
    arrays = {f"in:{k}": v for k, v in inputs.items()} | {
        f"out:{k}": v for k, v in found.items()
    }
    np.savez_compressed(case.directory / "answers.npz", **arrays)
    size = sum(p.stat().st_size for p in case.directory.rglob("*") if p.is_file())
    assert size < LIMIT, f"{case.name}: {size:,} bytes; make it smaller"
    print(f"{case.name}: recorded, {size:,} bytes")


def steady(case: Case, module: torch.nn.Module, inputs, found) -> None:
    """Refuses a case whose answers another processor's rounding would move too far."""
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    for seed in range(3):
        with torch.no_grad(), Rounding(seed):
            again = case.theirs(module, tensors)
        far = distance({k: v.numpy() for k, v in again.items()}, found)
        rule = f"keep it below {TOLERANCE / 2:.0e} by smaller `scales` or inputs"
        assert far < TOLERANCE / 2, f"{case.name}: rounding moves it by {far:.1e}; {rule}"


def rename(path: pathlib.Path, hub: tuple[tuple[str, str], ...]) -> None:
    """Writes the tensors of a file under other names."""
    tensors = safetensors.torch.load_file(path)
    for pattern, replacement in hub:
        tensors = {re.sub(pattern, replacement, name): x for name, x in tensors.items()}
    if hub:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def randomise(module: torch.nn.Module, scales) -> None:
    """Every parameter: N(0, 1 / fan-in) for matrices, and 0.3 N added to all the others."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn_like(p)
            if p.ndim >= 2:
                p.copy_(noise / math.sqrt(math.prod(p.shape[1:])))
            else:
                p.add_(0.3 * noise)
            for part, factor in scales.items():
                if part in name:
                    p.mul_(factor)


def check(case: Case) -> bool:
    """Whether the original still answers what is recorded, from its files and from ours."""
    kind = type(case.original())
    inputs, recorded = case.answers()
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    model, params = convert.load(case.directory)
    worst, in_memory = {}, True
    with tempfile.TemporaryDirectory() as ours, torch.no_grad():
        convert.save(ours, model, params)
        for name, directory in (
            ("recorded", case.directory),
            ("saved by us", pathlib.Path(ours)),
        ):
            module, told = kind.from_pretrained(directory, output_loading_info=True)
            wrong = {k: v for k, v in told.items() if v}
            found = case.theirs(module.eval(), tensors)
            found = {k: v.detach().numpy() for k, v in found.items()}
            worst[name] = float("inf") if wrong else distance(found, recorded)
        if kind.__module__.split(".")[2] in IN_MEMORY:
            path = pathlib.Path(ours) / "model.safetensors"
            safetensors.torch.save_file(
                {name: x.contiguous() for name, x in module.state_dict().items()}, path
            )
            again, same = convert.load(ours)
            equal = jax.tree.map(np.array_equal, params, same)
            in_memory = again == model and all(jax.tree.leaves(equal))
    # The original differs from itself by 2e-6 on another kind of processor.
    fine = max(worst.values()) < TOLERANCE / 2 and in_memory
    told = "" if in_memory else " names in memory are read otherwise"
    print(f"{case.name}: {'equal' if fine else 'DIFFERENT'} {worst}{told}")
    return fine


def main() -> int:
    """Records or checks the named cases, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.make")
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    cases = [CASES[name] for name in args.names]
    if args.check:
        fine = [check(case) for case in cases]
        return 0 if all(fine) else 1
    for case in cases:
        record(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
