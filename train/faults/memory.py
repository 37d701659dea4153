"""What a plan says of memory, beside what a step takes: on 8 devices that are this CPU."""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax

from jaxformer.data import stand_in
from jaxformer.data.loader import to_mesh, train_batches
from jaxformer.plan.ahead import laid_out, lasting, measured
from train.faults.meshes import experiment
from train.faults.processes import ROOT
from train.faults.row import Row, wrongs

CASES = (("vit", "data=8"), ("vit", "fsdp=4,tensor=2"), ("decoder", "data=2,fsdp=4"))
DEVICES, BATCH, WIDTH, DEPTH = 8, 1024, 128, 4
CLOSE = 0.10


def beside_truth(cases: tuple[tuple[str, str], ...] = CASES, say=print) -> Row:
    """Temporaries of a step as the compiler says, and as the kernel counts them."""
    found = {}
    for family, mesh in cases:
        out = subprocess.run(
            [sys.executable, "-m", "train.faults.memory", family, mesh],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
                # Arrays lie in mappings of their own, and a freed one is the kernel's at
                # once: what malloc keeps back is no array of a step (some 6 % of its peak).
                "MALLOC_MMAP_THRESHOLD_": str(2**16),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found[f"{family} {mesh}"] = one = json.loads(out.splitlines()[-1])
        one["off"] = one["planned"] / one["real"] - 1
        say(
            f"{family:8} {mesh:16} temporaries planned {one['planned'] / 1e6:,.0f} MB, real "
            f"{one['real'] / 1e6:,.0f} MB: {one['off']:+.1%}"
        )
    told = ", ".join(f"{name} {one['off']:+.1%}" for name, one in found.items())
    return Row(
        f"the plan's memory beside the truth, {DEVICES} devices of a CPU",
        f"parameters, optimizer and batch to the byte; temporaries: {told}",
        wrongs(
            temporaries_are_within_10_percent=all(
                abs(one["off"]) <= CLOSE for one in found.values()
            ),
            the_rest_is_to_the_byte=all(one["exact"] for one in found.values()),
        ),
        found,
    )


def measure(family: str, mesh: str) -> dict[str, float]:
    """Of all devices together, in a process that has done nothing else."""
    made = experiment(family)
    model = dataclasses.replace(made.model, width=WIDTH, depth=DEPTH, remat="none")
    made = dataclasses.replace(made, model=model, mesh=mesh, batch_size=BATCH)
    batch = stand_in.shapes(made.data, BATCH)
    on = laid_out(made, batch, jax.devices())
    step = on.lower(batch).compile()
    counter = on.state.step.dtype.itemsize  # of steps, in no part of a plan.
    planned = measured(lasting(on, batch, 0), step)
    key = jax.random.key(0)
    with contextlib.closing(train_batches(made.data, batch_size=BATCH, seed=0)) as data:
        real = to_mesh(next(data), on.batch)
    state = jax.block_until_ready(on.init(key))
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state, real))]
    ctypes.CDLL(None).malloc_trim(0)  # What is free is not counted.
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
    jax.block_until_ready(step(state, real, key))
    assert planned.temporaries is not None
    return {
        "planned": DEVICES * planned.temporaries,
        "real": _status("VmHWM") - before,
        "exact": sum(held) == planned.state + planned.batch + counter,
    }


def _status(name: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
