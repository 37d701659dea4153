"""From a table of entries to arrays on a mesh, a tensor at a time, and back to tensors.

A family of models is a `Family`: how a config makes a model and a model a config, and a
table of `Entry`: which of their tensors is which of our parameters, and how it lies in it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from jaxformer import sharding
from jaxformer.convert.files import Stored
from jaxformer.convert.layout import Layout, parse
from jaxformer.convert.stacks import layers_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Chain, Stack
from jaxformer.models.decoder import LanguageModel

PIECE = 4 * 2**20  # bytes of their tensor that are in memory at a time.


Named = tuple[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a family's table.

    `ours` is the path of a parameter, `theirs` the name of a tensor, with `{}` where the
    number of a layer stands: then our parameter has a leading axis of layers, the i-th of
    which is their layer `layers[i]`, or i. `layout` is read by `layout.parse`, and says
    nothing of that axis; `sizes` are those of letters that stand in groups. `part` = (i, n):
    it is the i-th of n equal parts of their axis `axis`. `at` is the row of our first axis
    that it fills, where ours is made of several of theirs.
    """

    ours: str
    theirs: str
    layout: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    part: tuple[int, int] | None = None
    axis: int = 0
    at: int | None = None
    layers: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of models must say to be loaded and saved.

    `model(config, names, dtype)` makes the module from their config and the set of names
    in the file, as `rename` leaves them, or raises InputError for a config that it does
    not know; `config(model)` gives the config that saves it, `architectures` and
    `model_type` included, or None where the model is not of this family;
    `entries(model)` is the table; `inputs(model)` are shapes that `init` can be called
    with. `rename` are regular expressions and replacements that take other layouts of
    the same tensors to the table's; `ignore` match names that hold no parameter;
    `spell(model, name)` is what the hub calls a tensor of the table in a file of this
    model, where that is another name; `unpack(config, tensors)` are the table's tensors,
    where a file may hold them otherwise than one by one, and `pack(model, tensors)` those
    of the file, names and arrays one by one.
    """

    name: str  # the model_type of their config.
    model: Callable[[dict[str, Any], set[str], Any], nn.Module]
    config: Callable[[Any], dict[str, Any] | None]
    entries: Callable[[Any], Iterable[Entry]]
    inputs: Callable[[Any], Sequence[jax.ShapeDtypeStruct]]
    rename: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    spell: Callable[[Any, str], str] = lambda model, name: name
    unpack: Callable[[Mapping[str, Any], dict[str, Stored]], dict[str, Stored]] = (
        lambda config, tensors: tensors
    )
    pack: Callable[[Any, Iterator[Named]], Iterator[Named]] = lambda model, tensors: tensors

    def tensors(
        self, config: Mapping[str, Any], stored: Mapping[str, Stored]
    ) -> dict[str, Stored]:
        """What a file holds, under the table's names."""
        kept = {self.canonical(n): x for n, x in stored.items() if not self.ignores(n)}
        return self.unpack(config, kept)

    def canonical(self, name: str) -> str:
        """The table's name of a tensor."""
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor holds no parameter."""
        return any(re.search(pattern, name) for pattern in self.ignore)


@dataclasses.dataclass(frozen=True)
class _Use:
    """One tensor's place: `lead` are the indices of our first axes that it fills."""

    entry: Entry
    lead: tuple[int, ...]
    layout: Layout
    sizes: dict[str, int]

    def shape(self) -> tuple[int, ...]:
        shape = self.layout.shape_of_theirs(self.sizes)
        if self.entry.part is None:
            return shape
        axis, n = self.entry.axis, self.entry.part[1]
        return (*shape[:axis], shape[axis] * n, *shape[axis + 1 :])


def boxed_params(family: Family, model: nn.Module) -> Any:
    """The parameters by shape, with their logical axes; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), *family.inputs(model))["params"]


def flat(tree: Any) -> dict[str, Any]:
    """A tree of dicts as one, by path: `{"stack/block/mlp/up/kernel": ...}`."""
    return traverse_util.flatten_dict(tree, sep="/")  # pyright: ignore[reportReturnType]


def uses(family: Family, model: nn.Module, shapes: Mapping[str, Any]) -> dict[str, list]:
    """For each of their tensors, which entries it serves.

    Raises:
      ValueError: the table does not cover the model's parameters exactly; the fault is in
        the family.
    """
    found: dict[str, list[_Use]] = collections.defaultdict(list)
    filled: collections.Counter[str] = collections.Counter()
    for entry in family.entries(model):
        if entry.ours not in shapes:
            raise ValueError(f"{family.name}: the model has no parameter {entry.ours}")
        shape = shapes[entry.ours].shape
        layout = parse(entry.layout)
        at = () if entry.at is None else (entry.at,)
        stacked = "{}" in entry.theirs
        lead = len(at) + stacked
        sizes = layout.sizes(shape[lead:], entry.sizes)
        numbers = (entry.layers or range(shape[0])) if stacked else (0,)
        filled[entry.ours] += math.prod(shape) // (shape[stacked] if at else 1)
        for i, number in enumerate(numbers):
            index = ((i,) if stacked else ()) + at
            name = entry.theirs.format(number)
            found[name].append(_Use(entry, index, layout, sizes))
    gaps = [path for path, x in shapes.items() if filled[path] != math.prod(x.shape)]
    if gaps:
        raise ValueError(f"{family.name}: the table does not fill {', '.join(gaps)}")
    return found


def mismatches(wanted: Mapping[str, list], tensors: Mapping[str, Stored]) -> list[str]:
    """`- name` for what is missing, `+ name` for what is unknown, `~ name` for shapes."""
    lines = [f"- {name}: missing" for name in sorted(wanted.keys() - tensors.keys())]
    lines += [f"+ {name}: unknown" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        found, expected = tensors[name].shape, wanted[name][0].shape()
        if found != expected:
            hint = " (transposed?)" if found == expected[::-1] else ""
            lines.append(f"~ {name}: has shape {found}, not {expected}{hint}")
    return lines


def read(
    family: Family,
    model: nn.Module,
    tensors: Mapping[str, Stored],
    *,
    mesh: Mesh | None,
    rules: sharding.Rules,
    dtype: Any,
    where: str,
) -> Any:
    """The parameters, from tensors under the table's names.

    Raises:
      InputError: tensors that are missing, unknown or of another shape, all of them named.
    """
    boxed = boxed_params(family, model)
    shapes = flat(nn.unbox(boxed))
    wanted = uses(family, model, shapes)
    lines = mismatches(wanted, tensors)
    if lines:
        raise InputError(
            f"{where}: {len(lines)} tensors are not those of {family.name} with this config "
            "(- missing, + unknown, ~ of another shape); fetch it again, or check "
            "config.json:\n" + "\n".join(lines)
        )
    if mesh is None:
        mesh, rules = sharding.make_mesh(devices=jax.devices()[:1]), ()
    places = flat(sharding.shardings(boxed, mesh, rules))
    by_path: dict[str, list[tuple[str, _Use]]] = collections.defaultdict(list)
    for name, some in wanted.items():
        for use in some:
            by_path[use.entry.ours].append((name, use))
    params = {}
    for path, shape in shapes.items():
        parts = (piece for name, use in by_path[path] for piece in _pieces(tensors[name], use))
        params[path] = _assemble(shape.shape, dtype, places[path], parts)
    return traverse_util.unflatten_dict(params, sep="/")


def _pieces(stored: Stored, use: _Use) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """A tensor as pieces of ours: where each starts, and the piece, with all our axes."""
    layout, sizes = use.layout, use.sizes
    i, n = use.entry.part or (0, 1)
    shape, axis = layout.shape_of_theirs(sizes), use.entry.axis
    own: Any = ...  # Of their rows.
    if axis:  # A part of each row.
        own = (slice(None),) * axis + (slice(i * shape[axis], (i + 1) * shape[axis]),)
        i, n = 0, 1
    lead = (np.newaxis,) * len(use.lead)
    letter = layout.rows
    size = np.dtype(stored.dtype).itemsize
    if letter is None or (math.prod(shape) * size <= PIECE and n == 1):
        rows = None if n == 1 else slice(i * shape[0], (i + 1) * shape[0])
        piece = layout.to_ours(stored.read(rows)[own], sizes)
        yield (*use.lead, *(0,) * piece.ndim), piece[lead]
        return
    count = sizes[letter]
    unit = shape[0] // count  # of their rows, to one of the letter.
    step = max(1, PIECE // (unit * math.prod(shape[1:]) * size))
    along = layout.ours.index((letter,))
    for first in range(0, count, step):
        some = min(step, count - first)
        start = i * shape[0] + first * unit
        piece = stored.read(slice(start, start + some * unit))
        piece = layout.to_ours(piece[own], {**sizes, letter: some})
        starts = [0] * piece.ndim
        starts[along] = first
        yield (*use.lead, *starts), piece[lead]


def _assemble(shape, dtype, place: NamedSharding, pieces) -> jax.Array:
    """An array on a mesh from its pieces: each device is sent what it holds, and no more."""
    held = {
        device: [range(*s.indices(size)) for s, size in zip(index or (), shape, strict=True)]
        for device, index in place.addressable_devices_indices_map(shape).items()
    }
    shards: dict[Any, jax.Array] = {}
    for starts, piece in pieces:
        for device, ranges in held.items():
            local, cut = [], []
            for start, size, r in zip(starts, piece.shape, ranges, strict=True):
                first, last = max(start, r.start), min(start + size, r.stop)
                local.append(first - r.start)
                cut.append(slice(first - start, max(last - start, first - start)))
            part = piece[tuple(cut)].astype(dtype, copy=False)
            if 0 in part.shape:
                continue
            full = tuple(len(r) for r in ranges)
            if part.shape == full:
                shards[device] = jax.device_put(part, device)
                continue
            if device not in shards:
                shards[device] = jnp.zeros(full, dtype, device=device)
            shards[device] = _write(shards[device], jax.device_put(part, device), local)
        jax.block_until_ready([*shards.values()])  # Or pieces that wait would fill the memory.
    arrays = [shards[device] for device in held]
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, part: jax.Array, starts: list) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, part, starts)


# How a model is run and what it checks, of which their config says nothing or more.
_RUNNING = {"parent", "name", "dtype", "remat", "unroll", "dropout", "drop_path", "channels"}
_RUNNING |= {"balance", "z"}  # Losses of a router.


def is_told_by(config: Mapping[str, Any], family: Family, model: nn.Module) -> bool:
    """Whether a config makes this model again, so that nothing of it would be lost."""
    try:
        shapes = flat(nn.unbox(boxed_params(family, model)))
        again = family.model(dict(config), set(uses(family, model, shapes)), jnp.float32)
        return _same(again, model)
    except (InputError, ValueError):  # Its table is not of this model's parameters.
        return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_same, a, b))
    if isinstance(a, Stack | Chain) and isinstance(b, Stack | Chain):
        return _same(*(tuple(x.block for x in layers_of(stack)) for stack in (a, b)))
    if type(a) is not type(b) or not dataclasses.is_dataclass(a) or isinstance(a, type):
        return a == b
    names = {f.name for f in dataclasses.fields(a)} - _RUNNING
    names -= {"length"} if isinstance(a, LanguageModel) else set()  # What it checks.
    return all(_same(_value(a, name), _value(b, name)) for name in names)


def _value(node: Any, name: str) -> Any:
    """A field; of attention, what None stands for, and nothing where it counts for nothing."""
    value = getattr(node, name)
    if isinstance(node, Attention):
        if name in ("key_bias", "out_bias") and value is None:
            return node.use_bias
        if name == "num_kv_heads" and value is None:
            return node.num_heads
        if name == "epsilon" and node.qk_norm is None:
            return None
        if name == "scores" and value.scale is None:
            return dataclasses.replace(value, scale=node.head_dim**-0.5)
    return value


def tensors_of(family: Family, model: nn.Module, params: Any) -> Iterator[Named]:
    """Their tensors, under the hub's names, one at a time.

    Raises:
      InputError: parameters that are not the model's.
    """
    shapes = flat(nn.unbox(boxed_params(family, model)))
    ours = flat(nn.unbox(params))
    lines = [f"- {path}" for path in sorted(shapes.keys() - ours.keys())]
    lines += [f"+ {path}" for path in sorted(ours.keys() - shapes.keys())]
    lines += [
        f"~ {path}: has shape {ours[path].shape}, not {shapes[path].shape}"
        for path in sorted(shapes.keys() & ours.keys())
        if ours[path].shape != shapes[path].shape
    ]
    if lines:
        raise InputError(
            "params are not the model's (- missing, + unknown, ~ of another shape); save them "
            "with the model they are of:\n" + "\n".join(lines)
        )
    return family.pack(model, _theirs(family, model, shapes, ours))


def _theirs(family: Family, model: nn.Module, shapes, ours) -> Iterator[Named]:
    for name, some in uses(family, model, shapes).items():
        parts = sorted(some, key=lambda use: use.entry.part or (0, 1))
        found = [
            use.layout.to_theirs(np.asarray(ours[use.entry.ours][use.lead]), use.sizes)
            for use in parts
        ]
        axis = parts[0].entry.axis
        whole = found[0] if len(found) == 1 else np.concatenate(found, axis)
        yield family.spell(model, name), whole
