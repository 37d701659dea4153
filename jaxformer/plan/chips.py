"""The chips that libtpu compiles for on any machine, by their makers' numbers."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxformer.errors import InputError

# No search for a TPU in this machine, and no wait for another process that has libtpu.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. `flops`: bfloat16 operations a second; `hbm`: bytes that a program may
    use; `bandwidth`: of HBM, bytes a second; `links`: to other chips, of `link` bytes a
    second each way; `ring`: the length at which a dimension of a slice closes to a ring;
    `devices`: that JAX sees of one chip.

    Source: cloud.google.com/tpu/docs, a page a generation; the link is the page's
    interconnect bandwidth by the number of links, and `hbm` what the compiler allows.
    """

    flops: float
    hbm: float
    bandwidth: float
    links: int
    link: float
    clock: float
    ring: int
    devices: int = 1


_GIB = 2.0**30
CHIPS = {
    "v5e": Chip(197e12, 15.75 * _GIB, 0.82e12, 4, 50e9, 1.5e9, 16),
    "v5p": Chip(459e12, 95.74 * _GIB, 2.77e12, 6, 100e9, 1.75e9, 4),
    "v6e": Chip(918e12, 31.25 * _GIB, 1.64e12, 4, 112e9, 1.75e9, 16),
    "tpu7x": Chip(2307e12, 192 * _GIB, 7.4e12, 6, 200e9, 2.2e9, 4, devices=2),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
OTHERS = {  # bfloat16 operations a second, from the makers' pages.
    "TPU v4": 275e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(kind: str) -> float | None:
    """bfloat16 operations a second of one device, by JAX's name of it; None if not known."""
    known = {name: CHIPS[chip].flops / CHIPS[chip].devices for name, chip in KINDS.items()}
    known |= OTHERS
    found = [name for name in known if kind.startswith(name)]
    return known[max(found, key=len)] if found else None


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x4", "8x8x8",
    "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _SOLID, "tpu7x": _SOLID}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind in a grid of `shape`; `devices` are JAX's, in order."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring."""
        ring = self.chip.ring
        if len(self.shape) == 3:  # Cubes of 4 x 4 x 4 are joined by switches, or none are.
            whole = all(n % ring == 0 for n in self.shape)
            return (whole,) * 3
        return tuple(n % ring == 0 for n in self.shape)


def find(name: str) -> Slice:
    """The slice of a name such as "v5p:8x8x8".

    Raises:
      InputError: there is no such slice, or no libtpu to compile for it.
    """
    kind, _, grid = name.partition(":")
    known = "; ".join(f"{k}: {' '.join(s)}" for k, s in SHAPES.items())
    sentence = f"no topology is named {name!r}; those that exist are KIND:SHAPE of {known}"
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", grid):
        raise InputError(sentence)
    shape = tuple(map(int, grid.split("x")))
    if len(shape) != len(SHAPES[kind][0].split("x")) or (
        len(shape) == 2 and grid not in SHAPES[kind]  # libtpu would take larger ones.
    ):
        raise InputError(sentence)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu's own words are for its makers.
        if "libtpu" in str(error).lower() and "pip install" in str(error).lower():
            raise InputError(
                "a plan for a TPU needs its compiler; pip install libtpu"
            ) from error
        raise InputError(sentence) from error
    chip = CHIPS[kind]
    if len(found.devices) != math.prod(shape) * chip.devices:
        raise InputError(sentence)
    return Slice(name, chip, shape, tuple(found.devices))


@contextlib.contextmanager
def uncached():
    """Without a persistent cache: what is there for a TPU only a TPU could read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
