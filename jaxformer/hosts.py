"""Many processes that run one program: how they join, agree, and share a batch.

On Cloud TPUs, under SLURM and under Open MPI JAX finds the others by itself; anywhere else
they are told by hand. See docs/pods.md.
"""

import argparse
import dataclasses
import glob
import hashlib
import importlib.util
import os
import pathlib
import socket
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxformer
from jaxformer.errors import InputError

# After so many seconds without a sign of life a process is taken for dead by the others.
HEARTBEAT = 30
_NAME = 64  # bytes of a host's name that are told.
_NOBODY = "coordinator_address should be defined"  # JAX, where it finds nothing to join.


@dataclasses.dataclass(frozen=True)
class Together:
    """Where the processes meet, where nothing around them says it."""

    coordinator: str  # HOST:PORT of process 0.
    processes: int
    process: int


def join(by_hand: Together | None = None) -> None:
    """Joins the other processes, if there are any; before any array is made.

    Raises:
      InputError: the others were not found, or the numbers do not fit.
    """
    if by_hand is not None and not 0 <= by_hand.process < by_hand.processes:
        raise InputError(
            f"--process {by_hand.process} must be from 0 to {by_hand.processes - 1}, as "
            f"there are --processes {by_hand.processes}"
        )
    told = _told() if by_hand is None else by_hand.processes
    if by_hand is None and (told == 1 or (told is None and not _on_a_tpu())):
        return
    options = () if by_hand is None else dataclasses.astuple(by_hand)
    try:
        jax.distributed.initialize(*options, heartbeat_timeout_seconds=HEARTBEAT)
    except Exception as error:
        if told is None and _NOBODY in str(error):
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the other processes were not found ({reason}); start the same command on every "
            "host, or name the meeting place with --coordinator HOST:PORT"
        ) from error


def _told() -> int | None:
    """How many processes the surroundings speak of at the least; None where they do not."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    told = [int(os.environ[name]) for name in counts if os.environ.get(name)]
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # Of GKE.
        addresses = os.environ.get(name, "")
        if addresses and " " not in addresses:  # Else it is a sentence of libtpu's.
            told.append(addresses.count(",") + 1)
    return max(told, default=None)


def _on_a_tpu() -> bool:
    """Whether JAX may find TPUs here; it then asks the machine's metadata for other hosts."""
    wanted = "tpu" in (getattr(jax.config, "jax_platforms", None) or "tpu")
    chips = any(glob.glob(pattern) for pattern in ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"))
    return wanted and chips and importlib.util.find_spec("libtpu") is not None


def agree(**facts: str) -> None:
    """Raises InputError on every process where one has other facts than the first.

    Args:
      **facts: a name of what must be the same, such as "config", and its fingerprint.
    """
    if jax.process_count() == 1:
        return
    mine = [socket.gethostname(), *facts.values()]
    rows = np.zeros((len(mine), _NAME), np.uint8)
    for row, text in zip(rows, mine, strict=True):
        data = text.encode()[:_NAME]
        row[: len(data)] = np.frombuffer(data, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(rows))
    first = everyone[0]
    found = []
    for process, theirs in enumerate(everyone):
        wrong = [
            name
            for name, a, b in zip(facts, theirs[1:], first[1:], strict=True)
            if not np.array_equal(a, b)
        ]
        if wrong:
            host = bytes(theirs[0]).rstrip(b"\0").decode()
            found.append(f"process {process} on {host} has another {' and '.join(wrong)}")
    if found:
        raise InputError(
            f"{'; '.join(found)} than process 0; start the same command from the same code "
            "and data on every host"
        )


def meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def code() -> str:
    """A fingerprint of this library's source."""
    digest = hashlib.sha256(sys.version.encode() + jax.__version__.encode())
    root = pathlib.Path(jaxformer.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def check_rows(sharding: jax.sharding.NamedSharding, batch_size: int) -> None:
    """Raises InputError unless process i of n holds the i-th part of n of each batch."""
    index, count = jax.process_index(), jax.process_count()
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    held = {row for s in slices if s is not None for row in range(*s[0].indices(batch_size))}
    size = batch_size // count
    if batch_size % count or held != set(range(index * size, (index + 1) * size)):
        raise InputError(
            f"process {index} of {count} would not hold part {index} of a batch of "
            f"{batch_size}; choose a mesh in which data times fsdp is a multiple of the "
            f"{count} processes, and a batch_size that is one"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How the processes meet where nothing around them says it."""
    group = parser.add_argument_group("several processes, where they do not find each other")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which one this is, from 0")


def join_by(args: argparse.Namespace) -> None:
    """`join`, as the command line says."""
    told = (args.coordinator, args.processes, args.process)
    if any(x is not None for x in told) and any(x is None for x in told):
        raise InputError("--coordinator, --processes and --process go together; give all three")
    join(None if args.coordinator is None else Together(*told))


def end(status: int) -> NoReturn:
    """Ends this process; after a fault here and now.

    JAX would keep a process that failed until all others come to their end, too, and threads
    that were writing when a disk was full would speak on after the sentence that tells of it.
    """
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
