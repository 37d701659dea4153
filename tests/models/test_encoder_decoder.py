"""An encoder-decoder by the parts: it learns, and writes with a cache what it would without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import CrossBlock, Mlp, Stack
from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.text import TokenTable
from jaxformer.models.decoder import Decoder, LanguageModel
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.objectives.next_token import NextToken
from jaxformer.ops.rotary_scaling import Rotary
from jaxformer.samplers import autoregressive
from jaxformer.samplers.logits import GREEDY
from tests.layers.test_block import randomized

V, F32 = 8, {"dtype": jnp.float32, "parent": None}


def model(width=12, heads=3):
    """A source of width 16 is read by two layers; two others write, in sight of it."""
    encoder = Decoder(vocab=V, width=16, depth=2, mlp_dim=24, num_heads=2, causal=False)
    own = Attention(heads, 4, scores=Scores(Rotary()), **F32)
    cross = Attention(heads, 4, 1, **F32)
    block = CrossBlock(own, Mlp(20, **F32), RMSNorm, cross=cross, parent=None)
    table = TokenTable(V, width, **F32)
    decoder = LanguageModel(table, Stack(block, 2, parent=None), RMSNorm(parent=None))
    return EncoderDecoder(encoder.parts(), decoder)


MODEL = model()
SOURCE = jnp.array([[3, 1, 4, -1, -1], [1, 5, 2, 6, 5]])
TOKENS = jnp.array([[0, 3, 1, 4, 7, 7], [0, 1, 5, 2, 6, 5]])


@functools.cache
def params():
    shapes = jax.jit(MODEL.init)(jax.random.key(0), TOKENS, SOURCE)
    return randomized(shapes, jax.random.key(1))


def says(source=SOURCE, tokens=TOKENS):
    return jax.jit(MODEL.apply)({"params": params()}, tokens, source)


def test_the_source_is_seen_and_its_padding_is_not():
    whole = says()
    alone = says(SOURCE[:1, :3], TOKENS[:1])
    np.testing.assert_allclose(whole[:1], alone, atol=1e-5)
    assert jnp.abs(says(SOURCE.at[:, 0].set(2)) - whole).max(2).min() > 1e-3
    later = says(tokens=TOKENS.at[:, 3:].set(6))
    np.testing.assert_allclose(later[:, :3], whole[:, :3], atol=1e-5)


def test_a_cache_writes_what_the_whole_text_gives():
    variables, whole = {"params": params()}, says()
    context = jax.jit(functools.partial(MODEL.apply, method="encode"))(variables, SOURCE)
    given = {"context": context, "source": SOURCE}
    cache = empty(MODEL, variables, 2, 10, given=given)
    step = Stepper(MODEL, variables, prompt=given, then=given)
    one = jax.jit(lambda cache, tokens, at, fresh: step(cache, tokens, at, fresh=fresh),
                  static_argnums=3)  # fmt: skip
    logits, seen = one(cache, TOKENS[:, :2], jnp.array([[0, 1]] * 2), True)
    np.testing.assert_allclose(logits, whole[:, :2], atol=3e-5)
    for i in range(2, 6):
        logits, seen = one(seen, TOKENS[:, i : i + 1], jnp.array([[i], [i]]), False)
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=3e-5)

    made = jax.jit(functools.partial(
        autoregressive.sample, steps=4, room=slots(cache), law=GREEDY
    ))(step, cache, TOKENS, jnp.array([1, 6]), jax.random.key(0))  # fmt: skip
    text, lengths = jnp.pad(TOKENS, ((0, 0), (0, 4))), jnp.array([1, 6])
    for i in range(4):
        last = says(tokens=text)[jnp.arange(2), lengths + i - 1].argmax(-1)
        text = text.at[jnp.arange(2), lengths + i].set(last)
        np.testing.assert_array_equal(made.tokens[:, i], last)


@pytest.mark.slow
def test_it_learns_to_say_a_source_backwards():
    """By no decoder that does not look at it: that one's loss is log 6 at best."""
    objective = NextToken(inputs=("tokens", "source"), chunk=None)
    big = model(24, 6)
    tx = optax.adam(5e-3)

    def batch(key):
        source = jax.random.randint(key, (32, 5), 1, 7)
        begin = jnp.zeros((32, 1), source.dtype)
        return {"source": source, "tokens": jnp.concatenate([begin, source[:, ::-1]], 1)}

    @jax.jit
    def train(params, state):
        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(2), number)
            loss, grads = jax.value_and_grad(
                lambda p: objective.loss(big.apply, p, batch(key), key)[0]
            )(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), jnp.arange(300))[1]

    first = batch(jax.random.key(0))
    params = jax.jit(big.init)(jax.random.key(1), first["tokens"], first["source"])["params"]
    losses = train(params, tx.init(params))
    last = losses[-10:].mean()
    print(f"\nnats a token: {losses[0]:.2f} at first, {last:.3f} after 300 steps")
    assert last < 0.5  # log 6 is 1.79.
