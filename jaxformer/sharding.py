"""One alphabet: the letter of a dimension names its logical axis, a rule names its mesh axis.

Models write letters, rule tables join logical axes to mesh axes, and only this file and
the configs ever write the name of a mesh axis. See "The alphabet" in the README.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxformer.errors import InputError

# Letters of parameter dimensions -> logical axes. A letter that is not here is unnamed.
PARAMETERS = {
    "D": "embed",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "mlp",
    "V": "vocab",
    "L": "layers",
    "E": "expert",
}
# Letters of activation dimensions -> logical axes.
ACTIVATIONS = {
    "B": "batch",
    "T": "seq",
    "D": "act_embed",
    "N": "act_heads",
    "K": "act_heads",
    "F": "act_mlp",
    "V": "act_vocab",
    "E": "expert",
}
MESH_AXES = ("data", "fsdp", "tensor", "seq", "expert")

Rules = tuple[tuple[str, str | tuple[str, ...]], ...]

# Logical axis -> mesh axis or axes. What a table leaves out stays whole on each device.
DATA_PARALLEL: Rules = (("batch", ("data", "fsdp")),)
FSDP: Rules = (*DATA_PARALLEL, ("embed", "fsdp"))
FSDP_TENSOR: Rules = (
    *FSDP,
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("seq", "seq"),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)
# With the batch split over the experts' devices too: tokens travel all to all.
EXPERT: Rules = (("batch", ("data", "fsdp", "expert")), *FSDP_TENSOR[1:])


def without(rules: Rules, axes: Sequence[str]) -> Rules:
    """Returns `rules` with the logical `axes` kept whole on every device."""
    known = {logical for logical, _ in FSDP_TENSOR} | {name for name, _ in rules}
    for axis in axes:
        if axis not in known:
            raise InputError(
                f"replicate: no logical axis is named {axis!r}; known are {sorted(known)}"
            )
    return tuple(rule for rule in rules if rule[0] not in axes)


def make_mesh(
    sizes: Mapping[str, int] | str = "", devices: Sequence[Any] | None = None
) -> Mesh:
    """Lays devices out on the axes of `MESH_AXES`; those not named have size 1.

    Of several TPU slices each has its own part of `data`, and every other axis lies within one.

    Args:
      sizes: `{"data": 2, "fsdp": 4}` or `"data=2,fsdp=4"`. Empty: all devices on `data`.
      devices: the devices to use, all that JAX sees if not given. Every one is used.

    Raises:
      InputError: an unknown axis, a size that is no positive integer, sizes whose product is
        not the number of devices, or a `data` that the slices do not divide.
    """
    devices = jax.devices() if devices is None else list(devices)
    named = _parse(sizes) if isinstance(sizes, str) else dict(sizes)
    for name, size in named.items():
        if name not in MESH_AXES:
            raise InputError(
                f"mesh: no axis is named {name!r}; choose from {', '.join(MESH_AXES)}"
            )
        if size < 1:
            raise InputError(f"mesh: {name}={size} must be a positive integer")
    if not named:
        named = {"data": len(devices)}
    if math.prod(named.values()) != len(devices):
        shape = ",".join(f"{k}={v}" for k, v in named.items())
        raise InputError(
            f"mesh: {shape} needs {math.prod(named.values())} devices but there are "
            f"{len(devices)}; the sizes must multiply to that, for instance "
            f"data={len(devices)}"
        )
    shape = [named.get(name, 1) for name in MESH_AXES]
    slices: dict[int, list[Any]] = {}
    for device in devices:  # A slice's own links are fast; between slices is a network.
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    if shape[0] % len(slices):
        raise InputError(
            f"mesh: data={shape[0]} must be a multiple of the {len(slices)} slices, as the "
            "network between them is too slow for the other axes"
        )
    shape[0] //= len(slices)
    parts = [_laid_out(shape, slices[index]) for index in sorted(slices)]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=_AUTO)


# Explicit axes, the default of jax.make_mesh, break linen's logical partitioning.
_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def _laid_out(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice in an order in which each axis has links of its own."""
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=_AUTO, devices=devices).devices
    except NotImplementedError:  # No such order is known.
        return np.array(devices).reshape(shape)


def _parse(text: str) -> dict[str, int]:
    sizes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if not size.isdecimal():
            raise InputError(f"mesh: {part!r} must be AXIS=SIZE, for instance data=2,fsdp=4")
        sizes[name] = int(size)
    return sizes


def partitioned(init: nn.initializers.Initializer, letters: str) -> Callable[..., Any]:
    """Wraps an initializer so that its array carries the axes its letters name."""
    return nn.with_logical_partitioning(init, tuple(map(PARAMETERS.get, letters)))


def constrain(x: Array, letters: str) -> Array:
    """Places an activation by the rules in force (`use`); outside of them does nothing."""
    where = place(x.shape, letters)
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


def place(shape: Sequence[int], letters: str) -> PartitionSpec | None:
    """Where an activation lies by the rules in force; None outside of them.

    Raises:
      InputError: a dimension does not divide over its mesh axes.
    """
    rules = nn.get_logical_axis_rules()
    if not rules:
        return None
    found = spec(map(ACTIVATIONS.get, letters), rules)
    mesh = jax.sharding.get_abstract_mesh()
    for letter, size, where in zip(letters, shape, found, strict=True):
        if size % ways(mesh, where):
            raise InputError(
                f"an activation {letters} {tuple(shape)}: {letter} of size {size} does not "
                f"divide over {'*'.join(mesh_names(where))}={ways(mesh, where)}; choose "
                f"another mesh, or keep the axis whole with replicate={ACTIVATIONS[letter]}"
            )
    return found


class use:
    """`with use(mesh, rules):` activations are placed, and bare specs mean this mesh.

    An abstract mesh will do to lower a program for devices that are not there.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, rules: Rules):
        there = isinstance(mesh, Mesh)
        here = jax.set_mesh(mesh) if there else jax.sharding.use_abstract_mesh(mesh)
        self.contexts = (here, nn.logical_axis_rules(rules))

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def spec(axes, rules) -> PartitionSpec:
    """Logical axes -> mesh axes; a mesh axis is used once, by the first that asks."""
    table, used, out = dict(rules), set(), []
    for axis in axes:
        names = table.get(axis) or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        names = tuple(name for name in names if name not in used)
        used.update(names)
        out.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*out)


def ways(mesh: Any, where: str | tuple[str, ...] | None) -> int:
    """Over how many devices one entry of a PartitionSpec splits its dimension."""
    return math.prod(mesh.shape[name] for name in mesh_names(where))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """How the leading axis of every array of a batch lies on the mesh."""
    return NamedSharding(mesh, spec(("batch",), rules))


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one parameter lies: `axes` and `mesh_axes` have one entry a dimension."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    mesh_axes: PartitionSpec
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The placement of a tree of parameters, and every reason why it cannot be."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("parameter", "shape", "logical axes", "mesh axes", "bytes a device")]
        for r in self.rows:
            shape = " ".join(map(str, r.shape))
            axes = " ".join(a or "-" for a in r.axes)
            mesh = " ".join("*".join(mesh_names(m)) or "-" for m in r.mesh_axes)
            cells.append((r.path, shape, axes, mesh, f"{r.bytes_per_device:,}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        whole = sum(r.bytes for r in self.rows)
        each = sum(r.bytes_per_device for r in self.rows)
        lines.append(f"in all {whole:,} bytes, {each:,} on each device")
        return "\n".join([*lines, *self.problems])


def explain(params: PyTree, mesh: Mesh, rules: Rules) -> Explanation:
    """Says where every parameter would lie, before anything is compiled.

    Args:
      params: as `jax.eval_shape(model.init, ...)["params"]` gives them: shapes in the
        boxes that carry their logical axes. Arrays without a box stay whole.
      mesh: the devices.
      rules: logical axis -> mesh axis.
    """
    rows, problems = [], []
    for logical, where in rules:
        for name in mesh_names(where):
            if name not in mesh.shape:
                problems.append(
                    f"rules: {logical!r} goes to mesh axis {name!r}, which this mesh has "
                    f"not; name one of {', '.join(mesh.axis_names)}"
                )
    if problems:
        return Explanation((), tuple(problems))
    axes_tree = nn.get_partition_spec(params)
    for path, leaf in jax.tree.leaves_with_path(nn.unbox(params)):
        axes = _follow(axes_tree, path)
        axes = (*axes, *(None,) * (leaf.ndim - len(axes)))
        place = spec(axes, rules)
        name = path_name(path)
        shards = 1
        for axis, size, where in zip(axes, leaf.shape, place, strict=True):
            shards *= ways(mesh, where)
            if size % ways(mesh, where):
                wanted = ",".join(f"{m}={mesh.shape[m]}" for m in mesh_names(where))
                fits = [n for n in range(1, mesh.size + 1) if not size % n]
                problems.append(
                    f"{name} {tuple(leaf.shape)}: axis {axis!r} of size {size} does not "
                    f"divide over {wanted}; choose one of {fits}, or keep the axis whole "
                    f"with replicate={axis}"
                )
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        rows.append(Row(name, leaf.shape, axes, place, size, size // shards))
    return Explanation(tuple(rows), tuple(problems))


def shardings(params: PyTree, mesh: Mesh, rules: Rules) -> PyTree[NamedSharding]:
    """The placement of `params` (as for `explain`), or every problem in one error."""
    explanation = explain(params, mesh, rules)
    if explanation.problems:
        raise InputError("; ".join(explanation.problems))
    places = iter(explanation.rows)
    return jax.tree.map(lambda _: NamedSharding(mesh, next(places).mesh_axes), nn.unbox(params))


def shardings_like(tree: PyTree, params: PyTree[NamedSharding], mesh: Mesh) -> PyTree:
    """The placement of a tree that holds copies of `params`, such as optimizer state.

    A leaf whose path ends in a parameter's path lies as that parameter does, and any
    other leaf is whole on every device.
    """
    known = {names(path): s for path, s in jax.tree.leaves_with_path(params)}

    def place(path, leaf):
        path = names(path)
        for start in range(len(path)):
            found = known.get(path[start:])
            if found is not None and len(found.spec) <= leaf.ndim:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(place, tree)


def names(path) -> tuple[str, ...]:
    """The keys of a tree path as plain strings."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def path_name(path) -> str:
    """A tree path as a person reads it: `block/attention/query/kernel`."""
    return "/".join(names(path))


def mesh_names(where: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return (where,) if isinstance(where, str) else tuple(where or ())


def _follow(tree, path):
    for name in names(path):
        tree = tree[name]
    return tuple(tree)
