"""QK-clip (MuonClip): which kernels are scaled, by how much, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer.errors import InputError
from jaxformer.muon import clip_qk
from jaxformer.optim import Constant, Muon
from tests.test_muon import FLOAT32, D, H, K, N, close, normal


def attention(seed, kv_heads, *, stacked, bias, loud=()):
    """Parameters of one attention; heads in `loud` have large queries."""
    lead = ("layers",) if stacked else ()
    kv = {N: "heads", K: "kv_heads"}[kv_heads]
    axes = {
        "query": {"kernel": P(*lead, "embed", "heads", "head_dim")},
        "key": {"kernel": P(*lead, "embed", kv, "head_dim")},
        "value": {"kernel": P(*lead, "embed", kv, "head_dim")},
    }
    if bias:
        axes["query"]["bias"] = P(*lead, "heads", "head_dim")
        axes["key"]["bias"] = P(*lead, kv, "head_dim")
    params = normal(seed, axes)
    for head in loud:
        kernel = params["query"]["kernel"]
        params["query"]["kernel"] = kernel.at[..., head, :].multiply(5.0 + head)
    return params


def max_logits(params, x):
    """[N] or [L, N]: the largest scaled logit of each query head, by numpy."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    q = np.einsum("TD,...DNH->...TNH", x, params["query"]["kernel"])
    k = np.einsum("TD,...DKH->...TKH", x, params["key"]["kernel"])
    if "bias" in params["query"]:
        q += params["query"]["bias"][..., None, :, :]
        k += params["key"]["bias"][..., None, :, :]
    k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    return (np.einsum("...TNH,...SNH->...NTS", q, k) / H**0.5).max((-2, -1))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
@pytest.mark.parametrize("kv_heads", [N, K], ids=["mha", "gqa"])
def test_clip_holds_the_logits(kv_heads, stacked, bias):
    x = np.random.default_rng(15).normal(size=(20, D))
    params = attention(16, kv_heads, stacked=stacked, bias=bias, loud=(1, 3))
    updates = jax.tree.map(
        lambda p: 0.01 * p, attention(17, kv_heads, stacked=stacked, bias=bias)
    )
    before = max_logits(optax.apply_updates(params, updates), x)
    quiet = before[..., [0, 2]].max()
    threshold = float(1.01 * quiet)
    over = before > threshold
    assert over[..., [1, 3]].all() and not over[..., [0, 2]].any()

    tx = clip_qk(threshold)
    params, updates = (
        {"block": {"attention": params}},
        {"block": {"attention": updates}},
    )
    stats = {"block": {"attention": {"max_logit": (jnp.asarray(before, jnp.float32),)}}}
    stats["block"]["moe"] = {"load": jnp.ones(3)}
    clipped, _ = jax.jit(tx.update)(updates, tx.init(params), params, stats=stats)
    u, c = updates["block"]["attention"], clipped["block"]["attention"]
    after = max_logits(optax.apply_updates(params, clipped)["block"]["attention"], x)
    assert np.all(after <= threshold * (1 + 1e-5))
    if not bias:  # Otherwise the one clipped side still holds them, yet not tightly.
        np.testing.assert_allclose(after[over], threshold, rtol=1e-5)

    for side in ("query", "key"):
        for leaf in u[side]:
            same = np.asarray(u[side][leaf] == c[side][leaf]).all(-1)
            same = same.all(-2) if leaf == "kernel" else same
            if side == "key" and kv_heads == K:
                assert same.all()
            else:
                np.testing.assert_array_equal(same, ~over)
    np.testing.assert_array_equal(u["value"]["kernel"], c["value"]["kernel"])


def test_clip_shares_gamma_between_query_and_key():
    params = {"a": attention(18, N, stacked=False, bias=True)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    stats = {"a": {"max_logit": jnp.array([400.0, 100.0, -500.0, jnp.inf])}}
    tx = clip_qk(100.0)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params, stats=stats)
    factor = jnp.array([0.5, 1, 1, 1])[:, None]
    for side in ("query", "key"):
        made = optax.apply_updates(params, updates)["a"][side]
        close(made["bias"], factor * params["a"][side]["bias"], rtol=1e-6)
        close(made["kernel"], factor[None] * params["a"][side]["kernel"], rtol=1e-6)


def test_clip_takes_the_largest_of_several_calls():
    params = {"a": attention(19, N, stacked=False, bias=False)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = clip_qk(100.0)
    calls = (jnp.array([0.0, 400, 0, 0]), jnp.array([0.0, 200, 900, 0]))
    made = [
        jax.jit(tx.update)(zeros, tx.init(params), params, stats={"a": {"max_logit": logits}})[
            0
        ]
        for logits in (calls, jnp.maximum(*calls))
    ]
    close(*made, rtol=0)


def qk_recipe():
    axes = {
        "a": jax.tree.map(
            lambda x: P("embed", "heads", "head_dim"),
            {"query": {"kernel": 0}, "key": {"kernel": 0}},
        )
    }
    return axes, Muon(Constant(0.1), qk_clip=100.0, newton_schulz=FLOAT32)


def test_recipe_clips_what_it_updated():
    axes, recipe = qk_recipe()
    params, grads = normal(20, axes), normal(21, axes)
    tx = recipe.make(axes, 10)
    plain = Muon(Constant(0.1), newton_schulz=FLOAT32).make(axes, 10)
    stats = {"a": {"max_logit": (jnp.array([400.0, 50, 50, 50]),)}}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    other, _ = jax.jit(plain.update)(grads, plain.init(params), params, stats=stats)
    factor = jnp.array([0.5, 1, 1, 1])[None, :, None]
    want = jax.tree.map(lambda p: factor * p, optax.apply_updates(params, other))
    close(optax.apply_updates(params, updates), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        (None, "needs the largest logit of each head"),
        ({}, r"- a/max_logit \[4\]"),
        (
            {"b": {"max_logit": jnp.ones(4)}},
            r"- a/max_logit \[4\]; \+ b/max_logit \[4\]",
        ),
        (
            {"a": {"max_logit": jnp.ones((2, 4))}},
            r"- a/max_logit \[4\]; \+ a/max_logit \[2, 4\]",
        ),
    ],
)
def test_clip_refuses_stats_that_do_not_fit(stats, says):
    axes, recipe = qk_recipe()
    params, tx = normal(22, axes), recipe.make(axes, 10)
    with pytest.raises(InputError, match=says):
        jax.eval_shape(tx.update, params, tx.init(params), params, stats=stats)


def test_clip_needs_params():
    with pytest.raises(InputError, match="pass params"):
        clip_qk(1.0).update({}, optax.EmptyState(), stats={})


def test_clip_refuses_qk_norm():
    axes, recipe = qk_recipe()
    axes["a"]["query_norm"] = {"scale": P("head_dim")}
    with pytest.raises(InputError, match="no effect under QK-norm, which a/query_norm"):
        recipe.make(axes, 10)
    with pytest.raises(InputError, match="no effect under QK-norm"):
        clip_qk(100.0).init(normal(23, axes))
    Muon(Constant(0.1)).make(axes, 10).init(normal(23, axes))


def test_clip_refuses_a_threshold_of_zero():
    with pytest.raises(InputError, match="must be positive"):
        clip_qk(0.0)
