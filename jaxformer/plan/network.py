"""What the chips say to each other: the collectives of a program, and their time."""

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxformer.plan.chips import Slice
from jaxformer.plan.program import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

Groups = Int[np.ndarray, "groups size"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over some mesh axes, all of a step together.

    `calls` in a step; `bytes` that a chip sends in them; `seconds` that its links need;
    `hidden` is the part of `seconds` that the compiler lets other work go on beside.
    """

    kind: str
    axes: tuple[str, ...]
    calls: int
    bytes: int
    seconds: float
    hidden: float


def kind_of(line: Instruction) -> str | None:
    """Which collective an instruction is, or begins."""
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def collective(
    line: Instruction, kind: str, where: str, program: Program, mesh: Mesh, chips: Slice
) -> Collective:
    """One call of a collective: what it sends and how long the links take.

    `kind` may say more than the instruction: an all-reduce of which each chip keeps its
    slice runs as a reduce-scatter.
    """
    groups = read_groups(line.rest, mesh.size)
    size = groups.shape[1]
    read = sum(s.data for s in program.shapes(line, where))
    made = sum(s.data for s in line.shapes)
    if line.opcode.endswith("-start"):  # gives what it reads, too.
        made = made - read if kind == "all-gather" else read
    share = (size - 1) / size
    sent = {
        "all-gather": made * share,
        "reduce-scatter": read * share,
        "all-reduce": 2 * read * share,
        "all-to-all": read * share,
        "collective-permute": read,
    }[kind]
    seconds = _seconds(kind, read, sent, groups[0], mesh, chips)
    axes = axes_of(groups, mesh)
    if axes == ("?",) and kind == "collective-permute":  # A shift, which makes no groups.
        axes = spanned(groups, mesh)
    return Collective(kind, axes, 1, round(sent), seconds, 0.0)


def merged(found: list[Collective]) -> tuple[Collective, ...]:
    """Those of one kind over the same axes as one, the longest first."""
    table: dict[tuple, Collective] = {}
    for c in found:
        key = (c.kind, c.axes)
        old = table.get(key, Collective(*key, 0, 0, 0.0, 0.0))
        table[key] = Collective(
            *key,
            old.calls + c.calls,
            old.bytes + c.bytes,
            old.seconds + c.seconds,
            old.hidden + c.hidden,
        )
    return tuple(sorted(table.values(), key=lambda c: -c.seconds))


def _seconds(kind, read, sent, group, mesh: Mesh, chips: Slice) -> float:
    """By the links that a group of chips has among itself.

    Along each dimension of the slice over which a group reaches, a chip has two links
    where that dimension closes to a ring and the group fills it, else one that counts:
    the chip at the end of a line has no more. Gathering and reducing keep all of them
    busy; in an all-to-all the middle of the longest line is what is full.
    """
    devices: Any = mesh.devices.reshape(-1)
    places = np.array([devices[i].coords for i in group])
    link = chips.chip.link / chips.chip.devices
    lengths = [len(set(column)) for column in places.T]
    links, longest, round_trip = 0, 1, False
    for length, whole, ring in zip(lengths, chips.shape, chips.rings, strict=False):
        if length > 1:
            closed = ring and length == whole
            links += 2 if closed else 1
            if length > longest:
                longest, round_trip = length, closed
    if not links:  # The devices of one chip.
        return sent / (2 * link)
    if kind == "collective-permute":
        return sent / link
    if kind == "all-to-all":
        return read * longest / ((8 if round_trip else 4) * link)
    return sent / (links * link)


def axes_of(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, or ("?",)."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    wanted = {frozenset(row.tolist()) for row in groups}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            along = [mesh.axis_names.index(name) for name in chosen]
            rest = [i for i in range(ids.ndim) if i not in along]
            size = math.prod(mesh.shape[name] for name in chosen)
            rows = ids.transpose(*rest, *along).reshape(-1, size)
            if {frozenset(row.tolist()) for row in rows} == wanted:
                return chosen
    return ("?",)


def spanned(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of any group differ, whole or not."""
    places = np.array(np.unravel_index(groups, mesh.devices.shape))
    differ = (places != places[:, :, :1]).any((1, 2))
    return tuple(name for name, is_one in zip(mesh.axis_names, differ, strict=True) if is_one)


def read_groups(text: str, devices: int) -> Groups:
    """The groups of devices that a collective runs in, in each of XLA's spellings."""
    everyone = np.arange(devices)[None]
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return _rings([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? "
        r"\{([^}]*)\}",
        text,
    )
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
        return _named(sizes, along, _order(named[2], devices))
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if tiled:
        return _order(tiled[2], devices).reshape(-1, int(tiled[1].split(",")[-1]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text)
    if listed:
        rows = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    return everyone


def _order(text: str | None, devices: int) -> Int[np.ndarray, " devices"]:
    """Devices as `[4,64]T(1,0)` puts them: counted in a grid, whose axes then change."""
    if not text:
        return np.arange(devices)
    if text.startswith("["):
        sizes, order = (
            [int(n) for n in re.findall(r"\d+", part)] for part in (text + "T").split("T")[:2]
        )
        return (
            np.arange(devices).reshape(sizes).transpose(order or range(len(sizes))).reshape(-1)
        )
    return np.array([int(n) for n in text.split(",")])


def _named(sizes: dict[str, int], along, order: Int[np.ndarray, " devices"]) -> Groups:
    """Groups along axes of a grid; `'x':(2)4` is a part of an axis, of 4 after 2."""
    if math.prod(sizes.values()) != len(order):
        return order[None]
    shape, chosen = [], []
    for name, size in sizes.items():
        parts = [(int(b), int(n)) for axis, b, n in along if axis == name and n]
        if parts:
            before, part = parts[0]
            chosen.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            chosen += [len(shape)] if name in [axis for axis, *_ in along] else []
            shape.append(size)
    ids = order.reshape(shape)
    rest = [i for i in range(len(shape)) if i not in chosen]
    return ids.transpose(*rest, *chosen).reshape(-1, math.prod(shape[i] for i in chosen))


def _rings(pairs: list[tuple[int, int]]) -> Groups:
    """The devices that a permutation joins, as groups of one size."""
    group: dict[int, set[int]] = {}
    for a, b in pairs:
        both = group.get(a, {a}) | group.get(b, {b})
        for member in both:
            group[member] = both
    sets = {frozenset(g) for g in group.values()}
    size = max(map(len, sets), default=1)
    return np.array(sorted(sorted(s) for s in sets if len(s) == size))
