"""Who gets Muon, and what it does to a matrix, sharded or not."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Numbers

from jaxformer.errors import InputError
from jaxformer.muon import (
    is_numbers,
    muon_dimensions,
    orthogonalize,
    scale_by_muon,
)
from jaxformer.optim import Constant, Muon, NewtonSchulz, Rest

L, D, N, K, H, F, V, E = 2, 16, 4, 2, 8, 24, 10, 3
SIZES = {
    None: 12,
    "layers": L,
    "embed": D,
    "heads": N,
    "kv_heads": K,
    "head_dim": H,
    "mlp": F,
    "vocab": V,
    "expert": E,
}
EXACT = jax.jit(partial(orthogonalize, dtype=jnp.float32, precision="highest"))

# A model's whole tree: path, logical axes, and rows and columns if it is Muon's.
TABLE = """
patches/kernel                      - embed
patches/bias                        embed
cls/embedding                       - embed
positions/embedding                 - embed
token/embedding                     vocab embed
blocks/attention_norm/scale         layers embed
blocks/attention_norm/bias          layers embed
blocks/attention/query/kernel       layers embed heads head_dim        1 2,3
blocks/attention/query/bias         layers heads head_dim
blocks/attention/key/kernel         layers embed kv_heads head_dim     1 2,3
blocks/attention/key/bias           layers kv_heads head_dim
blocks/attention/value/kernel       layers embed kv_heads head_dim     1 2,3
blocks/attention/value/bias         layers kv_heads head_dim
blocks/attention/out/kernel         layers heads head_dim embed        1,2 3
blocks/attention/out/bias           layers embed
blocks/mlp/up/kernel                layers embed mlp                   1 2
blocks/mlp/up/bias                  layers mlp
blocks/mlp/down/kernel              layers mlp embed                   1 2
blocks/moe/router/kernel            layers embed expert
blocks/moe/up/kernel                layers expert embed mlp            2 3
blocks/moe/down/kernel              layers expert mlp embed            2 3
pool/attention/query/kernel         embed heads head_dim               0 1,2
pool/attention/query/bias           heads head_dim
pool/attention/key/kernel           embed heads head_dim               0 1,2
pool/attention/out/kernel           heads head_dim embed               0,1 2
pool/mlp/up/kernel                  embed mlp                          0 1
pool/mlp/down/kernel                mlp embed                          0 1
projector/kernel                    embed embed                        0 1
queries/embedding                   mlp embed
unmarked/kernel
norm/scale                          embed
head/kernel                         embed vocab
head/bias                           vocab
"""


def read_table():
    """Returns the tree of axes and that of dimension numbers."""
    axes, numbers = {}, {}
    for line in TABLE.strip().splitlines():
        path, *words = line.split()
        spec = P(*(None if w == "-" else w for w in words if not w[0].isdigit()))
        sides = [tuple(map(int, w.split(","))) for w in words if w[0].isdigit()]
        *folders, leaf = path.split("/")
        a, n = axes, numbers
        for folder in folders:
            a, n = a.setdefault(folder, {}), n.setdefault(folder, {})
        a[leaf], n[leaf] = spec, Numbers(*sides) if sides else None
    return axes, numbers


AXES, NUMBERS = read_table()


def normal(seed, axes=AXES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(size=[SIZES[a] for a in spec]), jnp.float32),
        axes,
        is_leaf=lambda x: isinstance(x, P),
    )


def close(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)


def polar(matrix):
    u, _, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u @ v


# --- who gets what -------------------------------------------------------------------


def test_table():
    assert muon_dimensions(AXES) == NUMBERS


def test_no_spec_is_not_muons():
    assert muon_dimensions({"a": {"kernel": None}}) == {"a": {"kernel": None}}


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        (P("layers", "embed", "kv_heads", "head_dim"), Numbers((1,), (3,))),
        (P("heads", "head_dim", "embed"), Numbers((1,), (2,))),
        (P("embed", "mlp"), Numbers((0,), (1,))),
    ],
)
def test_per_head(spec, numbers):
    assert muon_dimensions({"kernel": spec}, per_head=True) == {"kernel": numbers}


def test_recipe_follows_the_table():
    """What the recipe remembers of a leaf tells whose it is: a momentum, or two means."""
    state = jax.eval_shape(Muon(Constant(0.1)).make(AXES, 10).init, normal(0))
    of_muon, of_adam = (
        {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
        for tree in (optax.tree.get(state, "momentum"), optax.tree.get(state, "nu"))
    )
    paths = jax.tree.leaves_with_path(NUMBERS, is_leaf=is_numbers)
    named = {jax.tree_util.keystr(path): n for path, n in paths}
    assert of_muon == {name for name, n in named.items() if n is not None}
    assert of_adam == {name for name, n in named.items() if n is None}


# --- orthogonalize -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (2, 3, 8, 24)])
def test_orthogonalize_is_that_of_optax(shape):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    numbers = Numbers(len(shape) - 2, len(shape) - 1)
    tx = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )  # No momentum: what is left is the iteration.
    theirs, _ = jax.jit(tx.update)(matrix, tx.init(matrix))
    close(EXACT(matrix), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("float32", 0.68, 1.21), ("bfloat16", 0.64, 1.25)]
)
def test_orthogonalize_singular_values(dtype, low, high):
    matrix = np.random.default_rng(1).normal(size=(3, 64, 16)).astype(np.float32)
    made = jax.jit(partial(orthogonalize, dtype=dtype))(matrix)
    assert made.dtype == jnp.float32
    values = np.linalg.svd(made, compute_uv=False)
    assert low < values.min() and values.max() < high
    # The singular vectors stay: it is near the polar factor, in the same half space.
    assert np.all(np.sum(made * polar(matrix), axis=(-2, -1)) / 16 > 0.8)


def test_orthogonalize_squares_the_short_side():
    text = str(jax.make_jaxpr(EXACT)(jnp.zeros((40, 8))))
    assert "f32[8,8]" in text and "f32[40,40]" not in text


def test_orthogonalize_dtype_and_precision_reach_the_products():
    for dtype, precision in (("bfloat16", None), ("float32", "highest")):
        made = partial(orthogonalize, dtype=dtype, precision=precision)
        jaxpr = jax.make_jaxpr(made)(jnp.zeros((8, 40))).jaxpr
        products = []

        def walk(jaxpr, products=products):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name == "dot_general":
                    products.append(eqn)
                for sub in jax.tree.leaves(list(eqn.params.values())):
                    if hasattr(sub, "jaxpr"):
                        walk(sub.jaxpr)

        walk(jaxpr)
        assert len(products) == 15
        assert {str(e.outvars[0].aval.dtype) for e in products} == {dtype}
        assert all(
            ("HIGHEST" in str(e.params["precision"])) == bool(precision) for e in products
        )


def test_orthogonalize_zero_and_tiny():
    zero = jnp.zeros((2, 4, 6))
    assert not np.any(jax.jit(orthogonalize)(zero.at[1, 0, 0].set(1.0))[0])
    tiny = 1e-6 * jnp.asarray(np.random.default_rng(2).normal(size=(8, 8)), jnp.float32)
    np.testing.assert_allclose(EXACT(tiny), EXACT(1e6 * tiny), rtol=0.05, atol=0.05)


# --- scale_by_muon -------------------------------------------------------------------


def test_momentum_is_that_of_optax_without_nesterov():
    """Bias correction is then one factor, which orthogonalizing removes."""
    params = {"up": jnp.zeros((8, 24)), "query": jnp.zeros((2, 8, 3, 5))}
    numbers = {"up": Numbers(0, 1), "query": Numbers((1,), (2, 3))}
    theirs = optax.contrib.muon(
        -1.0, nesterov=False, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    mine = scale_by_muon(numbers, nesterov=False, orthogonalize=EXACT)
    states = [mine.init(params), theirs.init(params)]
    updates = [jax.jit(mine.update), jax.jit(theirs.update)]
    rng = np.random.default_rng(3)
    for _ in range(3):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
        )
        (a, states[0]), (b, states[1]) = (
            update(grads, state, params) for update, state in zip(updates, states, strict=True)
        )
        close(a, b, atol=2e-5)


def test_nesterov_is_moonlights_code():
    """`buffer = 0.95 buffer + g; direction = g + 0.95 buffer`."""
    rng = np.random.default_rng(4)
    tx = scale_by_muon({"w": Numbers(0, 1)}, orthogonalize=EXACT)
    buffer, state = 0.0, tx.init({"w": jnp.zeros((6, 9))})
    for _ in range(4):
        g = rng.normal(size=(6, 9)).astype(np.float32)
        buffer = 0.95 * buffer + g
        updates, state = tx.update({"w": jnp.asarray(g)}, state)
    want = 0.2 * 3 * EXACT(jnp.asarray(g + 0.95 * buffer))
    np.testing.assert_allclose(updates["w"], want, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "numbers", "size"),
    [
        ((8, 32), Numbers(0, 1), 2.0),
        ((8, 32), Numbers(1, 0), 1.0),  # Optax would take the axes as (0, 1).
        ((32, 8), Numbers(0, 1), 1.0),
        ((32, 8), Numbers(1, 0), 2.0),
        ((3, 8, 4, 8), Numbers((1,), (2, 3)), 2.0),
        ((4, 8, 8), Numbers((0, 1), (2,)), 1.0),
        ((4, 8, 8), Numbers((-1,), (0, 1)), 2.0),
    ],
)
def test_scale_follows_the_numbers(shape, numbers, size):
    grads = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)
    made = {}
    for scale in ("shape", "rms"):
        tx = scale_by_muon(numbers, scale=scale, orthogonalize=lambda x: x)
        made[scale], _ = jax.jit(tx.update)(grads, tx.init(grads))
    direction = (1 - 0.95**2) * grads
    np.testing.assert_allclose(made["shape"], size * direction, rtol=1e-5)
    np.testing.assert_allclose(made["rms"], 0.2 * 32**0.5 * direction, rtol=1e-5)


def test_unknown_scale():
    with pytest.raises(InputError, match="scale='width' is not one of rms, shape"):
        inspect.unwrap(scale_by_muon)(Numbers(), scale="width")  # Past beartype.


def test_stacked_is_each_layer_alone():
    stacked, alone = (
        P("layers", "heads", "head_dim", "embed"),
        P("heads", "head_dim", "embed"),
    )
    grads = normal(6, {"out": {"kernel": stacked}})
    update = {}
    for spec in (stacked, alone):
        tx = scale_by_muon(muon_dimensions({"out": {"kernel": spec}}), orthogonalize=EXACT)
        update[spec] = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0]["out"]["kernel"])
    whole = update[stacked](grads)
    for layer in range(L):
        one = update[alone](jax.tree.map(lambda x, layer=layer: x[layer], grads))
        np.testing.assert_allclose(whole[layer], one, atol=1e-5)


# --- the recipe ----------------------------------------------------------------------

FLOAT32 = NewtonSchulz(dtype="float32", precision="highest")
QUICK = NewtonSchulz(steps=1, dtype="float32")  # Where the matrix is not the point.


@pytest.fixture(scope="module")
def first_step():
    """The first updates at rate 1 and no decay, and their gradients."""
    grads = normal(7)
    recipe = Muon(Constant(1.0), decay=0.0, rest=Rest(ratio=0.5, decay=0.0))
    tx = recipe.make(AXES, 10)
    return jax.jit(tx.update)(grads, tx.init(grads), grads)[0], grads


def test_rms_of_every_hidden_kernel(first_step):
    hidden = jax.tree.map(
        lambda n, u: u if n else None, NUMBERS, first_step[0], is_leaf=is_numbers
    )
    for path, update in jax.tree.leaves_with_path(hidden):
        rms = float(jnp.sqrt(jnp.mean(update**2)))
        assert 0.15 < rms < 0.22, (path, rms)
    assert len(jax.tree.leaves(hidden)) == 14


def test_the_rest_is_adamw(first_step):
    """1.0 x rate x ratio on the first step; that of optax.contrib.muon is 1.47 x rate."""
    updates, grads = first_step
    for name in ("patches", "positions", "norm", "head", "token"):
        want = jax.tree.map(lambda g: -0.5 * jnp.sign(g), grads[name])
        close(updates[name], want, rtol=1e-3)
    bias = updates["blocks"]["attention"]["query"]["bias"]
    np.testing.assert_allclose(jnp.abs(bias), 0.5, rtol=1e-3)


def test_decay_is_decoupled():
    params = normal(8)
    zeros = jax.tree.map(jnp.zeros_like, params)
    rest = Rest(ratio=0.5, decay=0.2)
    tx = Muon(Constant(0.1), decay=0.5, newton_schulz=QUICK, rest=rest).make(AXES, 10)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)

    def factor(path, numbers):
        if numbers is not None:
            return -0.1 * 0.5
        return -0.05 * 0.2 if path[-1].key in ("kernel", "embedding") else 0.0

    factors = jax.tree.map_with_path(factor, NUMBERS, is_leaf=is_numbers)
    close(updates, jax.tree.map(lambda f, p: f * p, factors, params), rtol=1e-5)


def test_clip_is_over_both_parts():
    axes = {"up": {"kernel": P("embed", "mlp")}, "head": {"bias": P("vocab")}}
    grads = normal(9, axes)
    norm = float(optax.tree.norm(grads))
    for clip, scale in ((1.0, 1 / norm), (None, 1.0)):
        tx = Muon(Constant(0.1), clip=clip, newton_schulz=QUICK).make(axes, 10)
        _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
        up = optax.tree.get(state, "momentum")["up"]["kernel"]
        bias = optax.tree.get(state, "mu")["head"]["bias"]
        close(up, 0.05 * scale * grads["up"]["kernel"], rtol=1e-4)
        close(bias, 0.1 * scale * grads["head"]["bias"], rtol=1e-4)


def test_dtype_of_momentum_is_not_that_of_the_products():
    axes = {"up": {"kernel": P("embed", "mlp"), "bias": P("mlp")}}
    params = normal(10, axes)
    recipe = Muon(Constant(0.1), mu_dtype="bfloat16", newton_schulz=QUICK)
    tx = recipe.make(axes, 10)
    first = tx.init(params)
    updates, state = jax.jit(tx.update)(params, first, params)
    for name, dtype in (
        ("momentum", "bfloat16"),
        ("mu", "bfloat16"),
        ("nu", "float32"),
    ):
        for tree in (first, state):
            (leaf,) = jax.tree.leaves(optax.tree.get(tree, name))
            assert leaf.dtype == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(updates)} == {"float32"}


def test_state_keeps_the_boxes_of_linen():
    """`nn.get_partition_spec` of the state then says where each momentum lies."""
    axes = {"up": {"kernel": P("embed", "mlp"), "bias": P("mlp")}}
    boxed = jax.tree.map(
        lambda x, spec: nn.LogicallyPartitioned(x, tuple(spec)), normal(11, axes), axes
    )
    state = jax.eval_shape(Muon(Constant(0.1)).make(axes, 10).init, boxed)
    specs = nn.get_partition_spec(state)
    assert optax.tree.get(specs, "momentum")["up"]["kernel"] == P("embed", "mlp")
    assert optax.tree.get(specs, "nu")["up"]["bias"] == P("mlp")


RULES = {"embed": "fsdp", **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor")}


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids=["fsdp8", "fsdp4-tensor2"])
def test_sharded_is_unsharded(shape):
    attention, mlp = AXES["blocks"]["attention"], AXES["blocks"]["mlp"]
    axes = {
        "attention": {name: attention[name] for name in ("query", "key", "out")},
        "mlp": {"down": mlp["down"]},
        "head": AXES["head"],
    }
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, P(*(RULES.get(a) for a in spec))), axes
    )
    tx = Muon(Constant(0.1), newton_schulz=FLOAT32).make(axes, 10)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, first, second = trees = [normal(seed, axes) for seed in (12, 13, 14)]
    alone, take = params, jax.jit(step)
    state = jax.jit(tx.init)(params)
    for grads in (first, second):
        alone, state = take(alone, state, grads)

    sharded, first, second = jax.device_put(trees, [places] * 3)
    known = {jax.tree_util.keystr(path): s for path, s in jax.tree.leaves_with_path(places)}
    abstract = jax.eval_shape(tx.init, params)
    whole = NamedSharding(mesh, P())

    def place(path, _):
        path = jax.tree_util.keystr(path)
        return next((s for name, s in known.items() if path.endswith(name)), whole)

    state_places = jax.tree.map_with_path(place, abstract)
    state = jax.jit(tx.init, out_shardings=state_places)(sharded)
    take = jax.jit(step, out_shardings=(places, state_places))
    for grads in (first, second):
        sharded, state = take(sharded, state, grads)

    for tree in (sharded, optax.tree.get(state, "momentum")):
        query = tree["attention"]["query"]["kernel"]
        shard = (L, D // shape[0], N // shape[1], H)
        assert query.sharding.shard_shape(query.shape) == shard
    close(sharded, alone, atol=1e-5)
