"""Guesses that stand one token earlier, as a decoder's, in masked and in block diffusion."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxformer.models.mdlm import denoiser
from jaxformer.objectives.next_token import NextToken
from jaxformer.objectives.unmask import Noisy, Unmask, nats
from tests.objectives.test_unmask import MODEL, T, case

MASK = 11


def everything(tokens):
    """All of it masked."""
    ones = jnp.ones(tokens.shape)
    return Noisy(jnp.full_like(tokens, MASK), ones, ones)


def guess(objective, params, tokens, noisy):
    """The nats of each token."""

    @jax.jit
    def run(tokens, noisy):
        how = {"mutable": ["losses"]}
        return objective._guess(MODEL.apply, params, {"tokens": tokens}, noisy, how)[0]

    return run(tokens, noisy)


def test_a_block_of_one_is_the_decoders_loss():
    """In packed texts, of which some is a prompt; the decoder has no row for the mask."""
    tokens, params = case()
    batch = {
        "tokens": tokens,
        "segments": jnp.array([[1] * 5 + [2] * 3, [1] * 3 + [2] * 4 + [0]]),
        "answer": jnp.array([[1, 0, 0, 1, 1, 1, 1, 1], [1] * T]),
    }
    table = params["table"]["embedding"][:MASK]
    own = {**params, "table": {"embedding": table}}
    decoder = MODEL.clone(vocab=MASK, causal=True)

    def of(objective, model, params):
        def loss(params):
            return objective.loss(model.apply, params, batch, jax.random.key(0))[0]

        return jax.jit(loss)(params)

    found = of(Unmask(MASK, block=1, shift=True), MODEL, params)
    expected = of(NextToken(chunk=None), decoder, own)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_it_guesses_as_the_denoiser_does():
    """Of a row at once, and block by block, after the clean ones: what a sampler sees."""
    tokens, params = case()
    noisy = everything(tokens).replace(tokens=tokens.at[:, ::3].set(MASK))

    def seen(canvas, block=None):
        logits = jax.jit(denoiser(MODEL, params, shift=True, block=block))(canvas, None)
        return nats(logits, tokens, MASK)[:, 1:]

    found = guess(Unmask(MASK, shift=True), params, tokens, noisy)
    chex.assert_trees_all_close(found[:, 1:], seen(noisy.tokens), atol=1e-5)
    found = guess(Unmask(MASK, block=4, shift=True), params, tokens, noisy)[:, 1:]
    first = seen(noisy.tokens, 4)
    later = seen(jnp.concatenate([tokens[:, :4], noisy.tokens[:, 4:]], 1), 4)
    chex.assert_trees_all_close(found[:, :3], first[:, :3], atol=1e-5)
    chex.assert_trees_all_close(found[:, 3:], later[:, 3:], atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_no_clean_token_of_its_own_block_or_later_is_seen(block):
    tokens, params = case()
    objective = Unmask(MASK, block=block, shift=True)
    run = functools.partial(guess, objective, params, noisy=everything(tokens))
    found = run(tokens)
    at = jnp.arange(T)
    changed = (tokens + 1) % MASK

    def where(some):
        return jnp.where(some, changed, tokens)

    others = [where((at >= i // block * block) & (at != i)) for i in range(T)]
    after = run(jnp.concatenate(others), noisy=everything(jnp.concatenate(others)))
    for i in range(1, T):
        chex.assert_trees_all_close(after[2 * i : 2 * i + 2, i], found[:, i], atol=1e-5)
    moved = run(where(at < block))[:, block] - found[:, block]
    assert (jnp.abs(moved) > 1e-4).all()  # What stands before it is.


def test_one_block_is_masked_diffusion_without_the_first_token():
    tokens, params = case()
    batch, key = {"tokens": tokens}, jax.random.key(5)
    both = [
        jax.jit(functools.partial(Unmask(MASK, block=block, shift=True).measure, MODEL.apply))
        for block in (None, T)
    ]
    a, b = (run(params, batch, key)["loss"] for run in both)
    assert a.count == b.count == tokens.size - len(tokens)
    chex.assert_trees_all_close(a.sum, b.sum, rtol=1e-5)
