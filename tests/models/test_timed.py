import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import convert
from jaxformer.errors import InputError
from jaxformer.layers.norm import RMSNorm
from jaxformer.lora import Lora
from jaxformer.models.decoder import Decoder
from jaxformer.models.mdlm import denoiser
from jaxformer.models.timed import TimedDecoder
from jaxformer.objectives.unmask import Unmask, by_time, nats, two_streams
from jaxformer.ops.timestep import sines_first
from tests.layers.test_block import randomized

MASK = 10
MODEL = TimedDecoder(11, 8, 2, 12, num_heads=2, condition=6, causal=False, features=sines_first)


@functools.cache
def case():
    tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, MASK)
    inputs = Unmask(MASK, timed=True).arguments(tokens)
    params = jax.jit(MODEL.init)(jax.random.key(1), *inputs)
    return tokens, nn.unbox(params)["params"], randomized(params, jax.random.key(2))


@functools.cache
def run(options=()):
    return jax.jit(functools.partial(MODEL.apply, **dict(options)))


def test_a_new_one_says_what_its_table_and_norm_say():
    """Whatever time it is told: its blocks are the identity."""
    tokens, new, _ = case()
    table = new["table"]["embedding"]
    expected = RMSNorm().apply({"params": new["last"]["norm"]}, table[tokens]) @ table.T
    for share in (0.1, 0.9):
        found = run()({"params": new}, tokens, share=jnp.full(3, share))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_each_row_heeds_its_own_time_and_a_token_its_own():
    tokens, _, params = case()
    say = functools.partial(run(), {"params": params}, tokens)
    low, high = say(share=jnp.full(3, 0.2)), say(share=jnp.full(3, 0.7))
    assert np.abs(low - high).max() > 1e-2
    mixed = say(share=jnp.array([0.2, 0.7, 0.2]))
    np.testing.assert_allclose(mixed[0], low[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], high[1], atol=1e-5)
    each = say(share=jnp.full((3, 8), 0.2))
    np.testing.assert_allclose(each, low, atol=1e-5)
    one = say(share=jnp.full((3, 8), 0.2).at[1, 3].set(0.7))
    assert np.abs(one - low)[1, 3].max() > 1e-2
    np.testing.assert_allclose(one[0], low[0], atol=1e-5)
    found = jax.jit(denoiser(MODEL, params))(tokens, jnp.array([0.2, 0.7, 0.2]))
    np.testing.assert_array_equal(found, mixed)


@pytest.mark.parametrize("block", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_the_objective_tells_it_the_times_of_its_draw(block):
    """Of blocks: each its own, and none to the clean ones."""
    tokens, _, params = case()
    objective = Unmask(MASK, block=block, timed=True, chunk=None)
    key = jax.random.key(3)
    found, _ = jax.jit(functools.partial(objective.loss, MODEL.apply))(
        params, {"tokens": tokens}, key
    )
    drawn, _ = jax.random.split(key)
    hidden = jnp.ones(tokens.shape, bool)
    noisy = by_time(tokens, drawn, mask_id=MASK, block=block, hidden=hidden)
    if block is None:
        logits = run()({"params": params}, noisy.tokens, share=noisy.share[:, 0])
    else:
        rows, more = two_streams(noisy.tokens, tokens, block)
        share = jnp.pad(noisy.share, ((0, 0), (0, 8)))
        logits = jax.jit(MODEL.apply)({"params": params}, rows, share=share, **more)[:, :8]
    each = jnp.where(noisy.weight > 0, nats(logits, tokens, MASK) * noisy.weight, 0)
    np.testing.assert_allclose(found, each.sum() / tokens.size, rtol=1e-5)


def test_a_prompt_is_of_the_text_whose_share_is_told():
    """As a sampler tells it: of the tokens that are no padding, the prompt's among them."""
    tokens, _, _ = case()
    answer = jnp.array([[0, 0, 0, 1, 1, 1, 0, 0]] * 3)
    segments = jnp.array([[1] * 6 + [0] * 2] * 3)
    batch = {"tokens": tokens, "answer": answer, "segments": segments}
    told = []

    def apply(variables, rows, method=None, share=None, **inputs):
        if share is not None:
            told.append(((rows == MASK).sum(1) / 6, share))
        inputs = {n: x for n, x in inputs.items() if n in ("segments", "mutable")}
        more = {} if share is None else {"share": share}
        return MODEL.apply(variables, rows, method=method, **more, **inputs)

    Unmask(MASK, timed=True, chunk=None).measure(apply, case()[2], batch, jax.random.key(0))
    for masked, share in told:
        np.testing.assert_allclose(masked, share, rtol=1e-6)
    assert told


def test_within_a_lora_it_is_drawn_from_too():
    tokens, _, _ = case()
    wrapped = Lora(MODEL, rank=2)
    params = nn.unbox(wrapped.init(jax.random.key(1), tokens, jnp.ones(3)))["params"]
    found = denoiser(wrapped, params)(tokens, jnp.full(3, 0.5))
    plain = denoiser(MODEL, wrapped.merged(params))(tokens, jnp.full(3, 0.5))
    np.testing.assert_array_equal(found, plain)


def test_who_is_told_the_time_and_who_is_not_must_fit():
    plain = Decoder(11, 8, 1, 12, num_heads=2, causal=False)
    pipeline = type("Pipeline", (), {"source": None})()
    for timed, model in ((True, plain), (False, MODEL)):
        with pytest.raises(InputError, match=f"objective.timed={timed}, which is not for"):
            Unmask(MASK, timed=timed).check(model, pipeline)
    Unmask(MASK, timed=True).check(MODEL, pipeline)


def test_no_file_of_others_can_hold_it(tmp_path):
    with pytest.raises(InputError, match="no family can hold"):
        convert.save(tmp_path, MODEL, case()[1])
