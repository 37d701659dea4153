"""Rows `[noisy, clean]` of block diffusion: which models can read them, and packed ones."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.models.mdlm import denoiser
from jaxformer.objectives.unmask import Unmask, nats, two_streams
from jaxformer.ops.attention import explain
from tests.layers.test_block import randomized

MASK, T = 11, 8
MODEL = Decoder(12, 16, 2, 24, 2, causal=False)
PIPELINE = types.SimpleNamespace(source=None)


@functools.cache
def case():
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, MASK)
    drawn = jax.jit(MODEL.init)(jax.random.key(1), tokens)
    return tokens, tokens.at[:, ::3].set(MASK), randomized(drawn, jax.random.key(2))


@pytest.mark.parametrize("near", [{"windows": (None, 3)}, {"positions": "alibi"}], ids=str)
def test_a_model_that_counts_places_of_a_row_is_refused(near):
    """It would see other tokens in [noisy, clean] than where it draws."""
    model = MODEL.clone(**near)
    with pytest.raises(InputError, match=r"objective.block=4 reads a text twice in one row"):
        Unmask(MASK, block=4).check(model, PIPELINE)
    for objective in (Unmask(MASK), Unmask(MASK, block=1, shift=True)):
        objective.check(model, PIPELINE)


def test_a_text_as_long_as_the_model_is_read_twice():
    """And one that is longer is not."""
    tokens, noisy, params = case()
    for length, fits in ((T, True), (T - 1, False)):
        rows, more = two_streams(noisy, tokens, 4)
        run = functools.partial(MODEL.clone(length=length).apply, **more)
        if fits:
            assert jnp.isfinite(jax.jit(run)({"params": params}, rows)).all()
        else:
            with pytest.raises(ValueError, match="8 tokens are more than the model's length=7"):
                jax.eval_shape(run, {"params": params}, rows)


def test_a_packed_text_is_guessed_as_alone_at_its_place_in_a_block():
    """A block is counted from the row: a text that begins within one has a shorter first."""
    tokens, noisy, params = case()

    def run(segments, where):
        found = {"segments": jnp.asarray([segments] * 2)}
        rows, more = two_streams(noisy, tokens, 4, found)
        return jax.jit(MODEL.apply)({"params": params}, rows, **more)[:, where]

    second = slice(3, 8)
    together = run([1] * 3 + [2] * 5, second)
    chex.assert_trees_all_close(together, run([0] * 3 + [2] * 5, second), atol=1e-5)
    # Alone, with its first block of one token: three that are nothing's before it.
    padded = [jnp.pad(x[:, second], ((0, 0), (3, 0))) for x in (noisy, tokens)]
    rows, more = two_streams(*padded, 4, {"segments": jnp.asarray([[0] * 3 + [1] * 5] * 2)})
    alone = jax.jit(MODEL.apply)({"params": params}, rows, **more)[:, second]
    chex.assert_trees_all_close(together, alone, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_packed_rows_are_a_kernels(platform):
    """Two ranges of keys a query, also where each half has texts."""
    tokens, noisy, _ = case()
    batch = {"segments": jnp.asarray([[1] * 3 + [2] * 5] * 2)}
    mask = two_streams(noisy, tokens, 4, batch)[1]["mask"]
    shape = (2, 2 * T, 4, 64)
    told = explain(shape, shape, mask=mask, platform=platform)
    name = {"tpu": "tpu", "cuda": "gpu"}[platform]
    assert f"forward: {name}" in told and f"backward: {name}" in told
    assert mask.intervals(2 * T, 2 * T).shape == (2, 4, 2 * T)


def test_blocks_of_one_are_the_text_token_by_token():
    """What each token costs, after those before it alone, is what a decoder asks."""
    tokens, _, params = case()
    params = jax.tree.map(lambda x: x / 4, params)  # 2 to 3 nats each, of which 1e-6 is 4 ulp.
    hidden = jnp.full_like(tokens, MASK)
    found = jax.jit(Unmask(MASK, block=1, chunk=None).costs(MODEL.apply, params, {}))
    guess = jax.jit(denoiser(MODEL, params, block=1))
    for i in range(T):
        rows = jnp.where(jnp.arange(T)[None] < i, tokens, MASK)
        expected = nats(guess(rows, jnp.ones(2)), tokens, MASK)[:, i]
        chex.assert_trees_all_close(found(hidden, tokens)[:, i], expected, atol=1e-6)


def test_blocks_of_one_with_a_shift_are_the_decoder_token_by_token():
    tokens, _, params = case()
    objective = Unmask(MASK, block=1, shift=True, chunk=None)
    found = jax.jit(objective.costs(MODEL.apply, params, {}))(tokens, tokens)
    logits = jax.jit(MODEL.clone(causal=True).apply)({"params": params}, tokens)
    chex.assert_trees_all_close(
        found[:, 1:], nats(logits[:, :-1], tokens[:, 1:], MASK), atol=1e-6
    )
