"""Muon, which makes the momentum of hidden matrices orthogonal, and its QK-clip.

Sources: Jordan 2024 (https://kellerjordan.github.io/posts/muon), Liu et al. 2025
(Moonlight, arXiv 2502.16982) for the scale, Kimi Team 2025 (arXiv 2507.20534) for
QK-clip.
The recipe that puts these together is `jaxformer.optim.Muon`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonDimensionNumbers

from jaxformer import sharding
from jaxformer.errors import InputError
from jaxformer.sharding import names

BATCH = {"layers", "expert"}  # Axes along which matrices are stacked.
HEADS = {"heads", "kv_heads"}
HIDDEN = HEADS | {"head_dim", "mlp", "embed"}
COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan's: the steepest at 0 that stays bounded.
EPSILON = 1e-8


def muon_dimensions(axes: PyTree, *, per_head: bool = False) -> PyTree:
    """Says which leaves Muon takes, and which of their axes are rows and columns.

    A hidden matrix is a `kernel` with "embed" first or last, and only "heads",
    "kv_heads", "head_dim", "mlp" or "embed" on the other side; "layers" and "expert"
    stack matrices and are not counted. Rows are what a product sums away. All else is
    not Muon's: embeddings and patch embeddings, vocabulary heads, routers, norms, and
    biases whatever their rank.

    Args:
      axes: the tree of parameters with a `PartitionSpec` of logical axes at each leaf,
        as `nn.get_partition_spec(jax.eval_shape(model.init, ...))["params"]` gives it.
      per_head: whether each head is a matrix of its own, or all are one matrix.

    Returns:
      The same tree with `optax.contrib.MuonDimensionNumbers` or None at each leaf.

    Example:
      >>> query = {"kernel": PartitionSpec("layers", "embed", "heads", "head_dim")}
      >>> muon_dimensions({"query": query})["query"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
    """
    batch = BATCH | HEADS if per_head else BATCH

    def dimensions(path, spec) -> MuonDimensionNumbers | None:
        spec = tuple(spec or ())
        if names(path)[-1] != "kernel":
            return None
        kept = [i for i, axis in enumerate(spec) if axis not in batch]
        if len(kept) < 2 or not {spec[i] for i in kept} <= HIDDEN:
            return None
        if spec[kept[0]] == "embed":
            return MuonDimensionNumbers((kept[0],), tuple(kept[1:]))
        if spec[kept[-1]] == "embed":
            return MuonDimensionNumbers(tuple(kept[:-1]), (kept[-1],))
        return None

    return jax.tree.map_with_path(dimensions, axes, is_leaf=_is_spec)


def orthogonalize(
    matrix: Float[Array, "... M N"],
    *,
    steps: int = 5,
    dtype: DTypeLike = jnp.bfloat16,
    precision: jax.lax.PrecisionLike = None,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    run: Callable[[Callable[[Array], Array], Array], Array] = lambda f, x: f(x),
) -> Float[Array, "... M N"]:
    """Moves every singular value of each matrix near to 1, by Newton-Schulz iteration.

    From `X = matrix / |matrix|`, each step takes `X <- a X + (b A + c A A) X` with
    `A = X X^T`, so that a singular value `s` becomes `a s + b s^3 + c s^5`. Five steps
    with Jordan's coefficients leave those over 0.002 between 0.68 and 1.2, not at 1,
    and that is enough to train. A zero matrix stays zero.

    Args:
      matrix: matrices, each on its own. The short side is the one that is squared.
      steps: how many times to iterate.
      dtype: of the products; the norm is float32, the result has the dtype of `matrix`.
      precision: of the products, which matters to a float32 `dtype` on an accelerator.
      coefficients: `(a, b, c)`.
      run: calls the iteration with what it begins with, for instance on a mesh: `by_layer`.

    Example:
      >>> made = orthogonalize(jnp.diag(jnp.array([3.0, 1.0, 0.1])), dtype="float32")
      >>> [round(float(value), 2) for value in jnp.diag(made)]
      [0.75, 1.13, 1.13]
    """
    a, b, c = coefficients
    product = partial(jnp.matmul, precision=precision)
    x = matrix.astype(jnp.float32)
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPSILON

    def iterate(x):
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        for _ in range(steps):
            square = product(x, x.mT)
            x = a * x + product(b * square + c * product(square, square), x)
        return x.mT if tall else x

    return run(iterate, x.astype(dtype)).astype(matrix.dtype)


def by_layer(
    shape: Sequence[int], axes: PartitionSpec, numbers: MuonDimensionNumbers
) -> Callable[[Callable[[Array], Array], Array], Array] | None:
    """Has each device iterate on whole matrices of some layers: `run` of `orthogonalize`.

    A product of matrices that are split takes the others' parts, and the compiler gathers
    them at every step of the iteration. But layers are independent: devices trade their parts
    of all layers for some layers whole, once, and back. Over mesh axes that hold copies, such
    as `data`, they share the layers too, as far as these go. Where layers do not divide,
    some devices work on zeros.

    Args:
      shape: of the parameter.
      axes: its logical axes.
      numbers: which of them are rows and columns.

    Returns:
      None outside of rules (`sharding.use`), and where nothing is to be shared.
    """
    rules = nn.get_logical_axis_rules()
    logical = (*axes, *(None,) * (len(shape) - len(axes)))
    if not rules or "layers" not in logical:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    place = sharding.spec(logical, rules)
    batch, rows, columns = _order(len(shape), numbers)
    stack = batch.index(logical.index("layers"))
    lies: list[Any] = [place[i] for i in batch]
    lies += [next((place[i] for i in side if place[i]), None) for side in (rows, columns)]
    taken = {name for entry in lies for name in sharding.mesh_names(entry)}
    # (mesh axis, axis of the matrices that it splits)
    split = [
        (name, axis)
        for axis in (-2, -1)
        for name in reversed(sharding.mesh_names(lies[axis]))
        if mesh.shape[name] > 1
    ]
    ways = math.prod(mesh.shape[name] for name, _ in split)
    layers = shape[batch[stack]] // sharding.ways(mesh, lies[stack])
    copies = []
    for name in mesh.axis_names:
        more = ways * mesh.shape[name]
        if name not in taken and -(-layers // more) < -(-layers // ways):
            copies.append(name)
            ways = more
    if ways == 1:
        return None
    spec = PartitionSpec(*lies)

    def run(iterate, x):
        def share(x):
            count = x.shape[stack]
            pad = [(0, -count % ways) if i == stack else (0, 0) for i in range(x.ndim)]
            x = jnp.pad(x, pad)
            for name, axis in split:
                x = jax.lax.all_to_all(x, name, stack, x.ndim + axis, tiled=True)
            for name in copies:
                size = x.shape[stack] // mesh.shape[name]
                begin = size * jax.lax.axis_index(name)
                x = jax.lax.dynamic_slice_in_dim(x, begin, size, stack)
            x = iterate(x)
            for name in reversed(copies):
                x = jax.lax.all_gather(x, name, axis=stack, tiled=True)
            for name, axis in reversed(split):
                x = jax.lax.all_to_all(x, name, x.ndim + axis, stack, tiled=True)
            return jax.lax.slice_in_dim(x, 0, count, axis=stack)

        # Copies are alike by what is done above, which the check cannot know.
        return jax.shard_map(share, in_specs=spec, out_specs=spec, check_vma=False)(x)

    return run


class MuonState(NamedTuple):
    """What Muon remembers: a running mean of the gradient, shaped as the parameters."""

    momentum: PyTree


def scale_by_muon(
    dimensions: PyTree,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    scale: Literal["rms", "shape"] = "rms",
    mu_dtype: DTypeLike | None = None,
    orthogonalize: Callable[..., Array] = orthogonalize,
    axes: PyTree | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient of each hidden matrix by its orthogonalized momentum.

    `m <- momentum m + (1 - momentum) g`; the direction `d` is `m`, or with `nesterov`
    `momentum m + (1 - momentum) g`; the update is `scale * orthogonalize(d)`. Up to a
    factor that orthogonalizing removes, that is Jordan's and Moonlight's own code;
    `optax.contrib.scale_by_muon` corrects the bias of both terms apart and so differs.

    Args:
      dimensions: from `muon_dimensions`. Its None leaves pass through untouched; mask
        them (`optax.partition` does) and they cost no memory. The numbers hold for 2-D
        leaves too, which optax reads as (0, 1) whatever they say.
      momentum: how much of the mean a step keeps.
      nesterov: whether the direction looks one step ahead.
      scale: "rms" is `0.2 sqrt(max(in, out))`, for updates of about the size of AdamW's
        and so its rates and decay (Moonlight). "shape" is `sqrt(max(1, out / in))`
        (Jordan), for rates near 0.02.
      mu_dtype: the dtype of the mean, that of the parameters if None.
      orthogonalize: acts on the last two axes; takes `run` where `axes` are given.
      axes: as for `muon_dimensions`. With them, and rules in force, each device works on
        whole matrices of some layers, see `by_layer`.
    """
    if scale not in ("rms", "shape"):
        raise InputError(f"scale={scale!r} is not one of rms, shape")

    def init(params) -> MuonState:
        return MuonState(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates, state, params=None):
        del params

        def average(m, g):
            return momentum * m.astype(g.dtype) + (1 - momentum) * g

        def direct(numbers, gradient, direction, spec=None):
            if numbers is None:
                return gradient
            run = None if spec is None else by_layer(direction.shape, spec, numbers)
            matrix, back = _as_matrix(direction, numbers)
            rows, columns = matrix.shape[-2:]
            if scale == "rms":
                size = 0.2 * math.sqrt(max(rows, columns))
            else:
                size = math.sqrt(max(1, columns / rows))
            made = orthogonalize(matrix) if run is None else orthogonalize(matrix, run=run)
            return back(size * made)

        mean = jax.tree.map(average, state.momentum, updates)
        ahead = jax.tree.map(average, mean, updates) if nesterov else mean
        mean = optax.tree.cast(mean, mu_dtype)
        trees = (dimensions, updates, ahead, *(() if axes is None else (axes,)))
        updates = jax.tree.map(direct, *trees, is_leaf=is_numbers)
        return updates, MuonState(mean)

    return optax.GradientTransformation(init, update)


def clip_qk(threshold: float) -> optax.GradientTransformationExtraArgs:
    """QK-clip: shrinks the heads whose largest attention logit passed `threshold`.

    Each query head has `gamma = min(1, threshold / max_logit)`. Its query and its key,
    kernel and bias, are multiplied by `sqrt(gamma)`. Where queries share keys (K < N),
    keys are left alone and the query takes all of gamma. Other heads keep their update
    to the bit, and so does a head whose logit is not finite: that is a fault for the
    training step to refuse. Source: Kimi K2 (arXiv 2507.20534, algorithm 1).

    Put it last: it acts on `params + updates`. The update function takes `stats`, the
    collection that `model.apply(..., mutable=["stats"])` gave in the same step, with
    `max_logit` `[N]` (`[L, N]` in a scanned stack) beside each attention's `query`.

    Raises:
      InputError: from `init` when an attention normalizes its queries or keys, where no
        size of the kernels moves a logit; from `update` when `stats` is missing, or is
        not of exactly the attentions in `params`.

    Example:
      >>> kernel = {"kernel": jnp.ones((4, 2, 8))}  # [D, N, H]
      >>> params = {"attention": {"query": kernel, "key": kernel}}
      >>> stats = {"attention": {"max_logit": (jnp.array([400.0, 90.0]),)}}
      >>> tx = clip_qk(100.0)
      >>> updates = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(updates, tx.init(params), params, stats=stats)
      >>> updates["attention"]["query"]["kernel"][0, :, 0].tolist()
      [-0.5, 0.0]
    """
    if not threshold > 0:
        raise InputError(f"qk_clip={threshold} must be positive, for instance 100.0")

    def init(params):
        refuse_qk_norm(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, stats=None, **_):
        if params is None:
            raise InputError("QK-clip rescales parameters; pass params to tx.update")
        if stats is None:
            raise InputError(
                "QK-clip needs the largest logit of each head: give tx.update the stats "
                'of model.apply(..., mutable=["stats"]), or set qk_clip=None'
            )
        shapes = {names(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
        logits = _find_logits(stats)
        _match(shapes, logits)

        def clip(path, u, p):
            where, side = names(path)[:-2], names(path)[-2:-1]
            if where not in logits or side not in (("query",), ("key",)):
                return u
            heads = shapes[*where, "query", "kernel"][-2]
            shared = shapes[*where, "key", "kernel"][-2] < heads
            if shared and side == ("key",):
                return u
            logit = logits[where].astype(jnp.float32)
            over = (logit > threshold) & jnp.isfinite(logit)
            gamma = threshold / jnp.where(over, logit, threshold)
            factor = gamma if shared else jnp.sqrt(gamma)
            inner = (slice(None),) if p.ndim == logit.ndim + 1 else (None, slice(None))
            index = (..., *inner, None)  # [... N] beside [... D N H] or [... N H].
            return jnp.where(over[index], factor[index] * (p + u) - p, u).astype(u.dtype)

        return jax.tree.map_with_path(clip, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def refuse_qk_norm(tree: PyTree) -> None:
    """Raises InputError if a parameter of `tree` normalizes queries or keys."""
    for path, _ in jax.tree.leaves_with_path(tree):
        where = names(path)
        if {"query_norm", "key_norm"} & set(where):
            raise InputError(
                f"QK-clip has no effect under QK-norm, which {'/'.join(where)} belongs "
                "to: set qk_clip=None, or turn the norm off"
            )


def is_numbers(x) -> bool:
    """Whether `x` is a leaf of what `muon_dimensions` returns."""
    return x is None or isinstance(x, MuonDimensionNumbers)


def _find_logits(stats: PyTree) -> dict[tuple[str, ...], Array]:
    """Path of an attention -> `[... N]`, the largest over the calls that were sown."""
    found = {}
    for path, value in jax.tree.leaves_with_path(stats):
        where = names(path)
        if "max_logit" in where:
            where = where[: where.index("max_logit")]
            found[where] = jnp.maximum(found[where], value) if where in found else value
    return found


def _match(shapes, logits) -> None:
    """Raises one error for all attentions and logits that do not belong together."""
    wanted = {
        where[:-2]: (*shape[:-3], shape[-2])
        for where, shape in shapes.items()
        if where[-2:] == ("query", "kernel") and (*where[:-2], "key", "kernel") in shapes
    }
    given = {where: x.shape for where, x in logits.items()}
    lines = [
        f"{sign} {'/'.join((*where, 'max_logit'))} {list(shape)}"
        for sign, here, there in (("-", wanted, given), ("+", given, wanted))
        for where, shape in sorted(here.items())
        if there.get(where) != shape
    ]
    if lines:
        raise InputError(
            "QK-clip: stats must hold the largest logits of each attention, and of no "
            f"other (- missing, + extra): {'; '.join(lines)}"
        )


def _as_matrix(x: Array, numbers: MuonDimensionNumbers):
    """`x` as `[batch..., rows, columns]`, and the function that undoes that."""
    batch, rows, columns = _order(x.ndim, numbers)
    order = batch + rows + columns
    shape = [x.shape[axis] for axis in order]
    matrix = x.transpose(order).reshape(
        *shape[: len(batch)], math.prod(x.shape[axis] for axis in rows), -1
    )
    inverse = tuple(map(int, np.argsort(order)))
    return matrix, lambda y: y.reshape(shape).transpose(inverse)


def _order(ndim: int, numbers: MuonDimensionNumbers) -> tuple[tuple[int, ...], ...]:
    """The axes that stack matrices, those of their rows and those of their columns."""
    rows, columns = (
        tuple(int(axis) % ndim for axis in np.atleast_1d(side))
        for side in (numbers.reduction_axis, numbers.output_axis)
    )
    return tuple(sorted({*range(ndim)} - {*rows, *columns})), rows, columns


def _is_spec(x) -> bool:
    return x is None or isinstance(x, PartitionSpec)
