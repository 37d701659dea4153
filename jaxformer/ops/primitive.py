"""Attention as an operation of JAX's own, with a lowering a platform.

Three primitives know how to be lowered, batched and differentiated:

- `forward`: by a kernel. Its derivative is `tangent`.
- `tangent`: linear in the tangents; by XLA, forward mode. Its transpose is `backward`.
- `backward`: by a kernel. Its derivative is XLA's.

So reverse mode runs kernels both ways, forward mode the kernel and XLA, and every higher
order XLA alone. That is more than `custom_vjp` (no forward mode) or `custom_jvp` with
`linear_call` (no vmap, no second order) give. A kernel is traced where something is
compiled for its platform and nowhere else, and one set of residuals serves all platforms.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxformer.kernels.case import Case, Gradients
from jaxformer.ops import choose
from jaxformer.ops.choose import How, Problem
from jaxformer.ops.dense import join, split
from jaxformer.ops.fold import batched
from jaxformer.ops.mask import Mask

# The names by which a rematerialisation policy may keep what `backward` needs.
NAMES = ("attention_out", "attention_lse")

PLATFORMS = (None, "tpu", "cuda")
PARAMETERS = ("trees", "how", "wanted", "with_lse", "fixed_bias")


def attention(q, k, v, case: Case, mask: Mask | None, how: How):
    """`(out, lse)` as in `kernels.case`; a `mask` stands in for intervals.

    The angles, slopes and intervals of the case, and the mask, are constants.
    """
    learned, rest = split(q, k, v, case)
    leaves, learned_tree = jax.tree.flatten(learned)
    others, rest_tree = jax.tree.flatten((rest, mask))
    if how.impl != "auto":  # What it cannot do is told here, not by the compiler.
        problem = functools.partial(Problem, mask=mask, how=how)
        jax.eval_shape(lambda *x: choose.forward(problem(*x), None)[0], q, k, v, case)
    args = _level(*leaves, *others)
    return tuple(forward_p.bind(*args, trees=(learned_tree, rest_tree), how=how))


def _level(*args):
    """Under shard_map, all operands vary over the mesh axes that any varies over."""
    varying = [_varying(x) for x in args]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(union - has), to="varying") if union - has else x
        for x, has in zip(args, varying, strict=True)
    ]


def _varying(x) -> frozenset:
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", None) or getattr(jax.typeof(x), "vma", ()))


def _parts(args, trees):
    """Operands -> learned, rest, mask, and the operands after them."""
    n, m = (tree.num_leaves for tree in trees)
    learned = jax.tree.unflatten(trees[0], args[:n])
    rest, mask = jax.tree.unflatten(trees[1], args[n : n + m])
    return learned, rest, mask, args[n + m :]


def _problem(learned: Gradients, rest: Case, mask, how: How) -> Problem:
    return Problem(*join(learned, rest), mask, how)


def _alone(context) -> bool:
    """Whether what is lowered is one device's part, which a kernel may be."""
    around = context.module_context.axis_context
    if (manual := getattr(around, "manual_axes", None)) is not None:
        return all(n == 1 or name in manual for name, n in around.mesh.shape.items())
    return (getattr(around, "num_devices", None) or 1) == 1


# XLA cannot cut a kernel in pieces.
SEVERAL = "arrays lie on several devices; cut them by sharding.use or a jax.shard_map of yours"


def _tell(choice: choose.Choice, platform: str | None, queries: int) -> None:
    """Says that an accelerator's kernels were left, and why; for one query XLA will do."""
    if platform in choose.ORDER and choice.name in choose.XLA and queries > 1:
        # Told once: Python shows the same warning of the same line a single time.
        warnings.warn(f"attend on {platform}: {choice}", stacklevel=2)


def _still(x) -> ad.Zero:
    """The tangent of what does not move."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


# ---- forward


def _forward(*args, platform, trees, how):
    learned, rest, mask, _ = _parts(args, trees)
    problem = _problem(learned, rest, mask, how)
    (out, lse), choice = choose.forward(problem, platform)
    _tell(choice, platform, problem.q.shape[1])
    return [out, lse]


def _forward_types(*avals, trees, how):
    q = avals[0]
    B, T, N, _ = q.shape
    return [q, q.update(shape=(B, N, T), dtype=jnp.dtype(jnp.float32))]


def _forward_jvp(primals, tangents, *, trees, how):
    out, lse = forward_p.bind(*primals, trees=trees, how=how)
    out, lse = checkpoint_name(out, NAMES[0]), checkpoint_name(lse, NAMES[1])
    moving = tangents[: trees[0].num_leaves]
    wanted = tuple(type(t) is not ad.Zero for t in moving)
    if not any(wanted):
        return [out, lse], [_still(x) for x in (out, lse)]
    moving = [t for t, w in zip(moving, wanted, strict=True) if w]
    params = {"trees": trees, "how": how, "wanted": wanted}
    return [out, lse], tangent_p.bind(*primals, out, lse, *moving, **params)


# ---- tangent


def _tangent(*args, platform, trees, how, wanted):
    learned, rest, mask, (_, _, *moving) = _parts(args, trees)
    leaves = jax.tree.leaves(learned)

    def run(*some):
        some = iter(some)
        whole = [next(some) if w else x for x, w in zip(leaves, wanted, strict=True)]
        problem = _problem(jax.tree.unflatten(trees[0], whole), rest, mask, how)
        xla = choose.in_xla(problem, platform)
        return xla.forward(problem.q, problem.k, problem.v, problem.case, mask)

    some = [x for x, w in zip(leaves, wanted, strict=True) if w]
    return list(jax.jvp(run, some, moving)[1])


def _tangent_types(*avals, trees, how, wanted):
    n = sum(tree.num_leaves for tree in trees)
    return list(avals[n : n + 2])


def _tangent_jvp(primals, tangents, *, trees, how, wanted):
    run = functools.partial(_tangent, platform=None, trees=trees, how=how, wanted=wanted)
    bind = functools.partial(tangent_p.bind, trees=trees, how=how, wanted=wanted)
    n = trees[0].num_leaves
    fixed = len(primals) - sum(wanted)
    out, parts = bind(*primals), []
    if any(type(t) is not ad.Zero for t in tangents[:n]):
        again = lambda *learned: run(*learned, *primals[n:])  # noqa: E731
        moving = [ad.instantiate_zeros(t) for t in tangents[:n]]
        parts.append(jax.jvp(again, list(primals[:n]), moving)[1])
    if any(type(t) is not ad.Zero for t in tangents[fixed:]):
        moving = [ad.instantiate_zeros(t) for t in tangents[fixed:]]
        parts.append(bind(*primals[:fixed], *moving))
    if not parts:
        return out, [_still(x) for x in out]
    return out, [functools.reduce(jnp.add, xs) for xs in zip(*parts, strict=True)]


def _tangent_transpose(cotangents, *args, trees, how, wanted):
    fixed = len(args) - sum(wanted)
    d_out, d_lse = cotangents
    if type(d_out) is ad.Zero and type(d_lse) is ad.Zero:
        return [None] * fixed + [ad.Zero(x.aval) for x in args[fixed:]]
    with_lse = type(d_lse) is not ad.Zero
    given = [ad.instantiate_zeros(d_out)] + ([d_lse] if with_lse else [])
    learned = vars(_parts(args, trees)[0])
    names = [name for name, x in learned.items() if x is not None]
    still = not dict(zip(names, wanted, strict=True)).get("bias", True)
    params = {"trees": trees, "how": how, "with_lse": with_lse, "fixed_bias": still}
    found = backward_p.bind(*args[:fixed], *given, **params)
    return [None] * fixed + [g for g, w in zip(found, wanted, strict=True) if w]


# ---- backward


def _backward(*args, platform, trees, how, with_lse, fixed_bias):
    learned, rest, mask, (out, lse, d_out, *more) = _parts(args, trees)
    rest = dataclasses.replace(rest, fixed_bias=fixed_bias)
    problem = _problem(learned, rest, mask, how)
    d_lse = more[0] if more else None
    found, choice = choose.backward(problem, out, lse, d_out, d_lse, platform)
    _tell(choice, platform, problem.q.shape[1])
    if fixed_bias:  # Which nobody reads: XLA leaves it out.
        found = dataclasses.replace(found, bias=jnp.zeros_like(learned.bias))
    types = jax.tree.leaves(learned)
    return [g.astype(x.dtype) for g, x in zip(jax.tree.leaves(found), types, strict=True)]


def _backward_types(*avals, trees, how, with_lse, fixed_bias):
    return list(avals[: trees[0].num_leaves])


def _backward_jvp(primals, tangents, *, trees, how, with_lse, fixed_bias):
    params = {"trees": trees, "how": how, "with_lse": with_lse, "fixed_bias": fixed_bias}
    out = backward_p.bind(*primals, **params)
    n, last = trees[0].num_leaves, len(primals) - 1 - with_lse

    # `out` and `lse` are functions of the rest: XLA computes them anew, and through them.
    def run(learned, given):
        learned = jax.tree.unflatten(trees[0], learned)
        rest, mask = jax.tree.unflatten(trees[1], primals[n : last - 2])
        p = _problem(learned, rest, mask, how)
        d_lse = given[1] if with_lse else None
        back = choose.in_xla(p).backward
        grads = back(p.q, p.k, p.v, p.case, None, None, given[0], d_lse, mask)
        return jax.tree.leaves(grads)

    moving = [ad.instantiate_zeros(t) for t in tangents]
    at = (list(primals[:n]), list(primals[last:]))
    return out, jax.jvp(run, at, (moving[:n], moving[last:]))[1]


# ---- how JAX is told


def _define(name, run, types, jvp, transpose=None) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind, static_argnames=PARAMETERS)

    def eagerly(*args, **params):
        with jax.disable_jit(False):
            return compiled(*args, **params)

    primitive.def_impl(eagerly)
    primitive.def_abstract_eval(types)

    def lower(context, *args, how, platform, **params):
        if platform in choose.ORDER and not _alone(context):
            how = dataclasses.replace(how, why_not=how.why_not or SEVERAL)
        lowered = functools.partial(run, platform=platform, how=how)
        return mlir.lower_fun(lowered, multiple_results=True)(context, *args, **params)

    for platform in PLATFORMS:
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    ad.primitive_jvps[primitive] = jvp
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(batched, primitive)
    return primitive


forward_p = _define("attention_forward", _forward, _forward_types, _forward_jvp)
tangent_p = _define(
    "attention_tangent", _tangent, _tangent_types, _tangent_jvp, _tangent_transpose
)
backward_p = _define("attention_backward", _backward, _backward_types, _backward_jvp)
