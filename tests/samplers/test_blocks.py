import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.models.mdlm import Canvas, denoiser
from jaxformer.models.timed import TimedDecoder
from jaxformer.samplers.blocks import growing, refreshed
from jaxformer.samplers.logits import GREEDY
from jaxformer.samplers.unmask import Above, Count, sample
from tests.layers.test_block import randomized

V, T, BLOCK = 12, 20, 4
MASK, END = V - 1, 3


MODELS = {
    "rotary": {},
    "windows": {"windows": (6, None)},
    "alibi": {"positions": "alibi"},
}


@functools.cache
def trained(name):
    """A model that is sure of little, so that draws and orders differ."""
    model = Decoder(V, 16, 2, 24, 4, num_kv_heads=2, causal=False, **MODELS[name])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, T), jnp.int32))
    return model, jax.tree.map(lambda x: 2 * x, randomized(params, jax.random.key(1)))


def canvases():
    """Prompts of several lengths, and blocks that are given in the middle and at the end.

    One token is given at least: masks that see nothing but each other are all alike.
    """
    tokens = jax.random.randint(jax.random.key(2), (7, T), 0, MASK)
    given = jnp.array([1, 3, 4, 9, 12, 17, 2])[:, None] > jnp.arange(T)[None]
    given = given.at[6].set((jnp.arange(T) % 7 == 1) | (jnp.arange(T) // BLOCK == 2))
    return jnp.where(given, tokens, MASK)


KEYS = jax.random.split(jax.random.key(3), 7)


@functools.cache
def made(how, name="rotary", *, blocks=False, shift=False, **options):
    """A compiled sampler `(canvases, keys) -> Filled`; with `blocks` models see by blocks."""
    model, params = trained(name)
    size = BLOCK if blocks else None
    if how is sample:
        canvas = denoiser(model, params, shift=shift, block=size)
    else:
        canvas = Canvas(model, {"params": params}, shift, size)
    return jax.jit(functools.partial(how, canvas, mask_id=MASK, block=BLOCK, **options))


def check_equal(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.shown, other.shown)


HOW = {"show": Above(0.3), "end": END}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotary", {**HOW, "shift": True}),
        pytest.param("rotary", HOW, marks=pytest.mark.slow),
        pytest.param("rotary", {"show": Count(2), "law": GREEDY}, marks=pytest.mark.slow),
        pytest.param("windows", {"show": Count(4, "random")}, marks=pytest.mark.slow),
        pytest.param("alibi", {"show": Above(0.3)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_growing_cache_draws_what_no_cache_draws(name, options):
    """Each row at its own block, and blocks that are given in the middle."""
    plain = made(sample, name, blocks=True, **options)(canvases(), KEYS)
    check_equal(made(growing, name, blocks=True, **options)(canvases(), KEYS), plain)


def test_a_filled_block_is_kept_by_the_call_that_begins_the_next():
    """Nine of twenty tokens are given: a call for the first block, two for each of the last
    three, of which the first keeps the block before it."""
    found = made(growing, blocks=True, show=Count(2))(canvases()[3:4], KEYS[3:4])
    assert found.steps == 1 + 2 * 3
    assert (found.shown[0, 9:] <= 5).all() and found.shown.max() == 5


@pytest.mark.slow
@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK])
def test_a_canvas_of_a_block_or_two_needs_none_before_it(length):
    tokens, keys = canvases()[:2, :length], KEYS[:2]
    plain = made(sample, blocks=True, shift=True, **HOW)(tokens, keys)
    check_equal(made(growing, blocks=True, shift=True, **HOW)(tokens, keys), plain)


@pytest.mark.parametrize(
    ("name", "keep", "options"),
    [
        ("rotary", "around", {"show": Above(0.3)}),
        pytest.param("rotary", "before", {"show": Count(3)}, marks=pytest.mark.slow),
        pytest.param(
            "alibi", "around", {"show": Above(0.3), "shift": True}, marks=pytest.mark.slow
        ),
        pytest.param("windows", "around", {"show": Count(2, "random")}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_cache_refreshed_in_every_step_is_no_cache(name, keep, options):
    plain = made(sample, name, **options)(canvases(), KEYS)
    always = made(refreshed, name, keep=keep, refresh=1, **options)(canvases(), KEYS)
    check_equal(always, plain)


@pytest.mark.parametrize("keep", [pytest.param("before", marks=pytest.mark.slow), "around"])
def test_between_refreshes_it_is_what_was_kept(keep):
    """Row by row and without a cache: keys and values of the rest are as at the start.

    Steps of one token in a block of 4, by a model whose parts are run by hand.
    """
    model, params = trained("rotary")
    canvas = Canvas(model, {"params": params})
    whole, part = jax.jit(canvas.whole), jax.jit(canvas.part, static_argnums=3)
    filled = made(refreshed, keep=keep, show=Count(BLOCK), law=GREEDY)(canvases(), KEYS)
    tokens = canvases()[3:4]  # Nine tokens are given.
    for first in range(8, T, BLOCK):
        at = jnp.arange(first, first + BLOCK)[None]
        logits, cache = whole(tokens, at)
        size = BLOCK if keep == "around" else T - first
        while (tokens[0, at[0]] == MASK).any():
            chances = jax.nn.softmax(logits[0, :, :MASK])
            surest = jnp.where(tokens[0, at[0]] == MASK, chances.max(1), -1).argmax()
            tokens = tokens.at[0, first + surest].set(chances[surest].argmax())
            logits, _ = part(cache, tokens, jnp.array([first]), size, at)
    np.testing.assert_array_equal(filled.tokens[3], tokens[0])


@pytest.mark.parametrize("shift", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_part_gives_what_the_whole_gives_where_nothing_changed(shift):
    """Any part, of any row, beyond the end too: each at its own place."""
    model, params = trained("windows")
    canvas, tokens = Canvas(model, {"params": params}, shift), canvases()
    expected = jax.jit(denoiser(model, params, shift=shift))(tokens, jnp.ones(7))
    read = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    whole, cache = jax.jit(canvas.whole)(tokens, read)
    np.testing.assert_allclose(whole, expected, atol=1e-3)
    first = jnp.array([0, 1, 5, 8, 16, 12, 19])
    read = jnp.minimum(first[:, None] + jnp.arange(4)[None], T - 1)
    found, _ = jax.jit(canvas.part, static_argnums=3)(cache, tokens, first, 4, read)
    expected = jnp.take_along_axis(expected, read[..., None], 1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (growing, {"blocks": True}),
        (refreshed, {"refresh": 2}),
        pytest.param(refreshed, {"keep": "before"}, marks=pytest.mark.slow),
    ],
    ids=["growing", "refreshed", "refreshed_before"],
)
def test_a_batch_is_drawn_as_its_rows_alone(how, options):
    run, tokens = made(how, **HOW, **options), canvases()
    together = run(tokens, KEYS)
    assert (together.tokens != MASK).all()
    for i in range(7):
        check_equal(
            run(tokens[i : i + 1], KEYS[i : i + 1]),
            jax.tree.map(lambda x: x[i : i + 1] if x.ndim else x, together),  # noqa: B023
        )


def test_what_cannot_be_is_told(unchecked):
    with pytest.raises(InputError, match="refresh=0 must be 1 step or more"):
        made(refreshed, show=Count(1), refresh=0)(canvases(), KEYS)
    with pytest.raises(InputError, match="block=4 must divide the canvas of 18 tokens"):
        made(growing, blocks=True, show=Count(1))(canvases()[:, :18], KEYS)
    model, params = trained("rotary")
    canvas, how = Canvas(model, {"params": params}), {"mask_id": MASK, "show": Count(1)}
    with pytest.raises(InputError, match=r"canvas has block=None; .* canvas.replace\(block=4"):
        growing(canvas, canvases(), KEYS, block=BLOCK, **how)
    with pytest.raises(InputError, match="canvas has block=4, and refreshed is for models"):
        refreshed(canvas.replace(block=4), canvases(), KEYS, block=BLOCK, **how)
    with pytest.raises(InputError, match="keep='arround' must be before or around"):
        refreshed(canvas, canvases(), KEYS, block=BLOCK, keep="arround", **how)


@pytest.mark.parametrize("how", [growing, functools.partial(refreshed, keep="before")])
def test_a_canvas_as_long_as_the_model_is_drawn_with_a_shift_too(how):
    model = trained("rotary")[0].clone(positions="learned", length=T)
    tokens = canvases()[3:4]
    drawn = jax.jit(model.init)(jax.random.key(0), tokens)
    params = jax.tree.map(lambda x: 2 * x, randomized(drawn, jax.random.key(1)))
    options = {"mask_id": MASK, "show": Count(2), "block": BLOCK, "law": GREEDY}
    block = BLOCK if how is growing else None
    canvas = Canvas(model, {"params": params}, True, block)
    found = jax.jit(functools.partial(how, canvas, **options))(tokens, KEYS[3:4])
    assert (found.tokens != MASK).all()
    if how is growing:
        plain = denoiser(model, params, shift=True, block=BLOCK)
        expected = jax.jit(functools.partial(sample, plain, **options))(tokens, KEYS[3:4])
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_an_end_in_a_prompt_ends_nothing():
    end = int(canvases()[3, 0])
    how = {"show": Count(2), "law": GREEDY, "end": end}
    for run, more in ((growing, {"blocks": True}), (refreshed, {"refresh": 1})):
        found = made(run, "rotary", **how, **more)(canvases(), KEYS)
        expected = made(sample, "rotary", **how, **({} if run is refreshed else more))
        check_equal(found, expected(canvases(), KEYS))
        assert (found.tokens[3, 9:] != end).any(), "nine are given"


def test_a_model_that_is_told_the_time_has_no_cache():
    model = TimedDecoder(V, 16, 2, 24, 4, causal=False, condition=4)
    with pytest.raises(InputError, match="a TimedDecoder is told one share for all tokens"):
        growing(
            Canvas(model, {"params": {}}, block=BLOCK), canvases(), KEYS,
            mask_id=MASK, show=Count(2), block=BLOCK,
        )  # fmt: skip
    with pytest.raises(InputError, match="a TimedDecoder is told one share for all tokens"):
        denoiser(model, {}, block=BLOCK)
