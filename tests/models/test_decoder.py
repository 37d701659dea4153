import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.block import PostBlock, SandwichBlock
from jaxformer.layers.cache import empty
from jaxformer.layers.moe import Experts
from jaxformer.layers.norm import LayerNorm, OneRMSNorm
from jaxformer.models.decoder import Decoder
from jaxformer.ops.activation import gelu_tanh, mish
from jaxformer.ops.rotary_scaling import Rotary, YaRN
from tests.layers.test_block import randomized

SMALL = Decoder(vocab=17, width=16, depth=2, mlp_dim=24, num_heads=4, length=16)
CASES = {
    "llama": {"num_kv_heads": 2, "tied": False},
    "gpt2": {
        "positions": "learned",
        "norm": LayerNorm,
        "gated": False,
        "activation": gelu_tanh,
        "use_bias": True,
    },
    "mistral": {"windows": (5,), "num_kv_heads": 1},
    "gemma": {
        "depth": 5,
        "windows": (4, None),
        "local_rotary": Rotary(100.0),
        "block": SandwichBlock,
        "norm": OneRMSNorm,
        "head_dim": 6,
        "qk_norm": True,
        "scale": 0.3,
        "softcap": 5.0,
        "final_softcap": 3.0,
        "embed_scale": 4.0,
    },
    "alibi": {"positions": "alibi", "block": PostBlock, "activation": mish},
    "sinks": {"sinks": True, "windows": (3, None), "rotary": Rotary(1e4, YaRN(2.0, 8))},
    "sinusoidal": {"positions": "sinusoidal", "qkv_bias": True},
    "moe": {"experts": Experts(4, 2)},
}


@functools.cache
def case(name: str):
    model = SMALL.clone(**CASES[name])
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 17)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    params = randomized(variables, jax.random.key(2))
    return model, tokens, params, jax.jit(model.apply)({"params": params}, tokens)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_gives_what_the_whole_text_gives(name):
    model, tokens, params, whole = case(name)
    cache = empty(model, {"params": params}, 3, 12)
    lengths = jnp.array([5, 1, 7])  # of the prompts; the rest of them is padding.

    @functools.partial(jax.jit, static_argnames="fresh")
    def step(cache, tokens, at, fresh=False):
        logits, new = model.apply(
            {"params": params, "cache": cache},
            tokens,
            positions=at,
            fresh=fresh,
            mutable=["cache"],
        )
        return logits, new["cache"]

    at = jnp.arange(7)[None]
    at = jnp.where(at < lengths[:, None], at, -1)
    logits, cache = step(cache, tokens[:, :7], at, fresh=True)
    for row, length in enumerate(lengths.tolist()):
        chex.assert_trees_all_close(logits[row, :length], whole[row, :length], atol=3e-5)
    place = lengths
    for count in (1, 3, 1):  # Tokens at a time.
        at = place[:, None] + jnp.arange(count)[None]
        logits, cache = step(cache, jnp.take_along_axis(tokens, at, 1), at)
        expected = jnp.take_along_axis(whole, at[..., None], 1)
        chex.assert_trees_all_close(logits, expected, atol=3e-5)
        place += count


@pytest.mark.parametrize("name", ["gemma", "alibi", "sinks"])
def test_a_prefix_is_shared_by_what_goes_on_from_it(name):
    model, tokens, params, _ = case(name)
    tokens = tokens.at[:, :4].set(tokens[:1, :4])
    whole = jax.jit(model.apply)({"params": params}, tokens)
    cache = empty(model, {"params": params}, 1, 12)
    run = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    _, seen = run(
        {"params": params, "cache": cache}, tokens[:1, :4], positions=jnp.arange(4)[None]
    )
    own = empty(model, {"params": params}, 3, 12)
    variables = {"params": params, "prefix": seen["cache"], "cache": own}
    logits, new = run(variables, tokens[:, 4:9], positions=jnp.arange(4, 9)[None])
    chex.assert_trees_all_close(logits, whole[:, 4:9], atol=3e-5)
    variables |= new
    logits, _ = run(variables, tokens[:, 9:10], positions=jnp.array([[9]]))
    chex.assert_trees_all_close(logits, whole[:, 9:10], atol=3e-5)


@pytest.mark.parametrize("name", ["llama", "gemma", "moe"])
def test_no_token_looks_ahead(name):
    model, _, params, _ = case(name)
    table = jax.random.normal(jax.random.key(3), (3, 12, 16))

    @jax.jit
    @jax.grad
    def seen(x):
        return model.parts().apply({"params": params}, x, method="run")[0, 5].sum()

    found = jnp.abs(seen(table)[0]).sum(-1) > 0
    assert not found[6:].any() and found[5]
    assert found[:5].all() or name == "gemma"  # Whose windows are short.


def test_packed_texts_are_each_as_alone():
    model, tokens, params, whole = case("gemma")
    row = jnp.concatenate([tokens[0, :7], tokens[1, :5], jnp.zeros(4, tokens.dtype)])[None]
    segments = jnp.array([[1] * 7 + [2] * 5 + [0] * 4])
    logits = jax.jit(model.apply)({"params": params}, row, segments=segments)
    chex.assert_trees_all_close(logits[0, :7], whole[0, :7], atol=3e-5)
    chex.assert_trees_all_close(logits[0, 7:12], whole[1, :5], atol=3e-5)


def test_a_window_as_wide_as_the_text_is_none():
    model, tokens, params, whole = case("llama")
    wide = model.clone(windows=(12,))
    chex.assert_trees_all_close(jax.jit(wide.apply)({"params": params}, tokens), whole)


def test_longer_texts_than_the_model_are_refused():
    model, _, params, _ = case("llama")
    with pytest.raises(ValueError, match=r"17 tokens are more than the model's length=16"):
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"scale its rotary positions .* and set length"):
        empty(model, {"params": params}, 1, 17)  # Nor is there a cache for them.
