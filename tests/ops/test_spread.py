"""Attention on a mesh of 8 devices equals attention on one, with its gradients."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxformer import sharding
from jaxformer.errors import InputError
from jaxformer.ops.alibi import Alibi
from jaxformer.ops.attention import attend, explain
from jaxformer.ops.mask import Causal, Mask, Prefix, Segments
from jaxformer.ops.norm import Norm
from jaxformer.sharding import FSDP_TENSOR, make_mesh

B, T, N, K, H = 4, 8, 4, 2, 16


class Odd(Mask):
    """A mask that no range of keys holds."""

    def visible(self, q, k, lengths):
        return ((q[:, None] + k[None]) % 2 == 0)[None]


IDS = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]] * 2 + [[5, 5, 3, 3, 3, 3, 3, 3]] * 2)
MASKS = {
    "full": None,
    "causal": Causal(),
    "rows": Causal() & Segments(IDS) | Prefix(jnp.array([1, 2, 0, 3])),
    "no ranges": Odd(),
}
MESHES = ("data=2,fsdp=2,tensor=2", "data=2,seq=4", "seq=2,tensor=2,data=2")


def arguments(key, what):
    keys = jax.random.split(key, 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    x = dict(zip("qkv", map(jax.random.normal, keys, shapes), strict=True))
    if what == "bias":
        x["bias"] = jax.random.normal(keys[3], (1, N, T, T))
    if what == "norm":
        x |= {"a": jnp.linspace(1, 2, H), "b": jnp.linspace(2, 1, H)}
    return x


def run(x, mask, impl, what):
    options = {"bias": x.get("bias")}
    if what == "norm":
        options["norm"] = (Norm(x["a"]), Norm(x["b"]))
        options["angles"] = jnp.linspace(0, 3, T * H // 2).reshape(1, T, H // 2)
    if what == "alibi":
        options["bias"] = Alibi(jnp.linspace(0.1, 1, N))
    out = attend(x["q"], x["k"], x["v"], mask=mask, impl=impl, **options)
    return jnp.sin(out).sum(), out


def both(x, mask, impl, what):
    f = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=(2, 3))
    return jax.block_until_ready(f(x, mask, impl, what))


CASES = [
    *((MESHES[0], mask, "plain") for mask in ("full", "rows", "no ranges")),
    *((MESHES[1], mask, "plain") for mask in ("causal", "rows", "no ranges")),
    *((MESHES[2], "rows", what) for what in ("bias", "norm", "alibi")),
]


@pytest.mark.parametrize(("mesh", "mask", "what"), CASES)
def test_sharded_equals_unsharded(mesh, mask, what, key):
    x = arguments(key, what)
    expected = both(x, MASKS[mask], "reference", what)
    with sharding.use(make_mesh(mesh), FSDP_TENSOR):
        found = both(x, MASKS[mask], "auto", what)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_queries_stay_where_they_are(key):
    x = arguments(key, "plain")
    with sharding.use(make_mesh(MESHES[2]), FSDP_TENSOR):
        _, out = jax.jit(lambda x: run(x, Causal(), "auto", "plain"))(x)
        cut = jax.jit(jax.grad(lambda x: run(x, Causal(), "auto", "plain")[0]))
        text = cut.lower(x).compile().as_text()
    assert out.sharding.shard_shape(out.shape) == (2, T // 2, N // 2, H)
    assert "all-gather" in text, "keys are gathered over the sequence"


def test_heads_that_do_not_divide(key):
    x = arguments(key, "plain")
    with (
        sharding.use(make_mesh("tensor=4,data=2"), FSDP_TENSOR),
        pytest.raises(InputError, match=r"K of size 2 does not divide over tensor=4"),
    ):
        both(x, None, "auto", "plain")


def test_other_queries_than_keys(key):
    """Keys of a length that the mesh does not divide stay whole."""
    x = arguments(key, "plain")
    x |= {n: x[n][:, :5] for n in "kv"}
    expected = both(x, None, "reference", "plain")
    with sharding.use(make_mesh(MESHES[1]), FSDP_TENSOR):
        found = both(x, None, "auto", "plain")
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_explain_names_the_mask_that_keeps_kernels_out():
    text = explain((B, T, N, H), (B, T, K, H), platform="tpu", mask=Odd())
    assert "forward: reference; not tpu: Odd has no intervals" in text
