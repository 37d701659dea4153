import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.convert.rotary import length_of, rotary_of, told_length, told_of
from jaxformer.errors import InputError
from jaxformer.ops.rotary_scaling import NTK, DynamicNTK, Llama3, Rotary, YaRN
from tests.convert.record_rotary import FILE, HEAD_DIM, LENGTH, config_of

CASES = json.loads(FILE.read_text())


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['law']['rope_type']}-{case['times']}"
)
def test_angles_are_transformers(case):
    """At once, twice and eight times the length, as float32 has them."""
    rotary = rotary_of(config_of(case["law"]))
    positions = jnp.arange(case["times"] * LENGTH)
    found = np.asarray(rotary.angles(positions, HEAD_DIM))[-1]
    expected = np.asarray(case["frequencies"]) * (len(positions) - 1)
    np.testing.assert_allclose(found, expected, rtol=5e-7)
    assert rotary.factor_of_logits == pytest.approx(case["factor"], rel=1e-9)
    cosines = np.cos(found) * rotary.factor_of_logits
    np.testing.assert_allclose(cosines, case["cosines"], atol=3e-4)


@pytest.mark.parametrize("times", [1, 2, 8])
@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_is_as_its_author_wrote_it(factor, times):
    """bloc97's lines, in float64; transformers has the dynamic law alone."""
    base = 1e4 * factor ** (HEAD_DIM / (HEAD_DIM - 2))
    frequencies = 1 / base ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    positions = jnp.arange(times * LENGTH)
    found = np.asarray(Rotary(1e4, NTK(factor)).angles(positions, HEAD_DIM))
    np.testing.assert_allclose(found[-1], frequencies * (len(positions) - 1), rtol=5e-7)
    ratio = found[-1] / np.asarray(Rotary(1e4).angles(positions, HEAD_DIM))[-1]
    np.testing.assert_allclose(ratio[[0, -1]], [1, 1 / factor], rtol=1e-6)


@pytest.mark.parametrize("times", [1, 2, 8])
def test_the_dynamic_law_is_ntks_of_the_text_at_hand(times):
    positions = jnp.arange(times * LENGTH)
    found = Rotary(1e4, DynamicNTK(3.0, LENGTH)).angles(positions, HEAD_DIM)
    expected = Rotary(1e4, NTK(3.0 * times - 2)).angles(positions, HEAD_DIM)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case["law"]["rope_type"])
def test_what_is_told_is_read_again(case):
    config = config_of(case["law"])
    rotary = rotary_of(config)
    length = length_of(config, rotary)
    told = {"rope_parameters": told_of(rotary)} | told_length(length, rotary)
    assert rotary_of(told) == rotary
    assert length_of(told, rotary) == length


def test_transformers_4_and_5_say_the_same():
    law = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    old = {"rope_theta": 5e5, "rope_scaling": law, "max_position_embeddings": 32}
    new = {"rope_parameters": {"rope_theta": 5e5, **law}, "max_position_embeddings": 128}
    assert rotary_of(old) == rotary_of(new) == Rotary(5e5, YaRN(4.0, 32))
    assert length_of(old, rotary_of(old)) == length_of(new, rotary_of(new)) == 128
    assert rotary_of({"rope_theta": 5e5, "rope_scaling": None}) == Rotary(5e5)
    assert rotary_of({}, 1e6) == Rotary(1e6)


def test_llama3_is_as_long_as_its_config_says():
    law = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
    law["original_max_position_embeddings"] = 8192
    config = {"rope_scaling": law, "rope_theta": 5e5, "max_position_embeddings": 131072}
    assert rotary_of(config) == Rotary(5e5, Llama3(8.0, 8192))
    assert length_of(config, rotary_of(config)) == 131072


@pytest.mark.parametrize(
    ("law", "sentence"),
    [
        ({"rope_type": "longrope"}, "rope_type='longrope' is not known; known are default"),
        ({"rope_type": "linear"}, "rope_type='linear' needs factor"),
        ({"type": "linear", "factor": "2"}, "factor='2' must be a positive float"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"full_attention": {}}, "must be one law for all layers"),
        ({"rope_theta": 0}, "rope_theta=0 must be a positive float"),
    ],
)
def test_what_is_not_known_is_said(law, sentence):
    with pytest.raises(InputError, match=sentence):
        rotary_of({"rope_parameters": law, "max_position_embeddings": 16})
