"""A model that unmasks, asked as the harness asks: by bounds, and by filling in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate.run import Trained
from evaluate.unmask_harness import UnmaskHarness
from jaxformer.data.tokenizer import Bytes
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.models.mdlm import denoiser
from jaxformer.models.timed import TimedDecoder
from jaxformer.objectives.stages import Stages
from jaxformer.objectives.unmask import Unmask, exact
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from tests.layers.test_block import randomized

MASK = 258
SIZES = {"vocab": 259, "width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2, "causal": False}
KINDS = {"plain": Decoder(**SIZES), "told the time": TimedDecoder(**SIZES, condition=4)}


@functools.cache
def judge(kind="plain", **options):
    model = KINDS[kind]
    inputs = (jnp.zeros((1, 4), jnp.int32), *([jnp.ones(1)] if kind != "plain" else []))
    drawn = jax.jit(model.init)(jax.random.key(0), *inputs)
    params = randomized(drawn, jax.random.key(1))
    mesh = make_mesh("", jax.devices()[:1])
    trained = Trained(model.apply, params, mesh, FSDP_TENSOR, 4, model)
    return UnmaskHarness(trained, Bytes(), 12, mask_id=MASK, **options)


@pytest.mark.parametrize(
    ("kind", "shift"),
    [
        ("plain", False),
        ("plain", True),
        pytest.param("told the time", False, marks=pytest.mark.slow),
    ],
)
def test_a_likelihood_is_the_bound_of_what_follows_its_context(kind, shift):
    """Over all sets of masked tokens, for a continuation of three."""
    asked = judge(kind, samples=900, shift=shift)
    (found, greedy), (other, _) = asked.loglikelihood([("ab", "cde"), ("zz", "cde")])
    ids = jnp.asarray([256, *b"abcde"])
    denoise = denoiser(asked.trained.model, asked.trained.params, shift=shift)

    def with_context(tokens, share):
        rows = jnp.broadcast_to(ids[:3], (len(tokens), 3))
        # Told the share of the text, of which the context is half.
        return denoise(jnp.concatenate([rows, tokens], 1), share / 2)[:, 3:]

    bound = float(exact(with_context, ids[3:], mask_id=MASK))
    assert found == pytest.approx(-bound, rel=0.02) and found != other
    assert not greedy


def test_padding_is_seen_by_nobody():
    asked = judge()
    model, params = asked.trained.model, asked.trained.params
    tokens, real = jnp.asarray([[*b"abcde", 0, 0, 0]]), jnp.arange(8)[None] < 5
    says = asked._says(model.apply, params, real.astype(jnp.int32))
    alone = denoiser(model, params)(tokens[:, :5], jnp.ones(1))
    np.testing.assert_allclose(says(tokens, jnp.ones(1))[:, :5], alone, atol=1e-5)


def test_a_model_of_blocks_is_refused():
    trained = judge().trained
    for objective in (
        Unmask(MASK, block=4),
        Stages((Unmask(MASK), Unmask(MASK, block=4)), (1,)),
    ):
        blocks = dataclasses.replace(trained, objective=objective)
        with pytest.raises(InputError, match="a model of block diffusion does not see"):
            UnmaskHarness(blocks, Bytes(), 12, mask_id=MASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": 259}, "mask_id=259 must be an id of the model, below 259"),
        ({"mask_id": ord("b")}, "mask_id=98 must be an id of the model, below 259, that no"),
        ({"mask_id": MASK, "samples": 0}, "samples=0 must be 1 draw or more"),
    ],
)
def test_numbers_that_do_not_fit_are_told(options, message):
    with pytest.raises(InputError, match=message):
        UnmaskHarness(judge().trained, Bytes(), 12, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_what_is_filled_in(kind):
    found = []
    for length in (12, 20):
        asked = judge(kind)
        asked = UnmaskHarness(asked.trained, Bytes(), length, mask_id=MASK)
        found.append(asked._go_on([list(b"abc")], 4, 0.0))
    assert found[0] == found[1]


@pytest.mark.slow
def test_what_is_filled_in_greedily_is_called_so():
    asked = judge()
    options = {"max_gen_toks": 4}
    texts = asked.generate_until([("ab", options), ("x" * 30, options)])
    assert all(len(text) <= 4 for text in texts)
    steps = dataclasses.replace(Bytes())  # The bytes that came must be text to be asked for.
    if "\ufffd" not in texts[0] and len(steps.encode([texts[0]])[0]) == 4:
        assert asked.loglikelihood([("ab", texts[0])])[0][1]


@pytest.mark.slow
def test_prompts_beside_it_do_not_change_an_answer():
    asked = judge()
    options = {"max_gen_toks": 4, "until": []}
    alone = asked.generate_until([("abc", options)])
    assert asked.generate_until([("abc", options), ("zzzz", options)])[:1] == alone
    values = asked.loglikelihood_rolling([("abc",), ("a" * 20,)])
    assert np.isfinite(values).all() and max(values) < 0
