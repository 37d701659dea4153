"""Places and angles of tokens among images and videos: transformers' numbers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.mrope import decode_delta, multimodal_places
from jaxformer.ops.rotary import axes_of_sections
from jaxformer.ops.rotary_scaling import DynamicNTK, Linear, MRotary, Rotary
from tests.ops.record_mrope import FILE, HEAD, ROWS, SECONDS, SECTIONS, THETA, VIDEO, layout

RECORDED = json.loads(FILE.read_text())
places_of = jax.jit(multimodal_places)


@functools.cache
def ours(name):
    """Kinds of tokens, grids of what a row holds in tokens, and paces."""
    kinds, rows = layout(ROWS[name])
    most = max(map(len, rows))
    grids = np.zeros((len(rows), most, 3), np.int32)
    pace = np.ones((len(rows), most), np.float32)
    seconds = iter(SECONDS)
    for b, row in enumerate(rows):
        for i, (kind, frames, y, x) in enumerate(row):
            grids[b, i] = frames, y // 2, x // 2
            if name == "qwen2_5_vl" and kind == VIDEO:
                pace[b, i] = 2 * np.float32(next(seconds))
    return kinds, jnp.asarray(grids), jnp.asarray(pace)


@pytest.mark.parametrize("name", ROWS)
def test_places_and_deltas_are_the_originals(name):
    kinds, grids, pace = ours(name)
    here = jnp.asarray(kinds > 0)
    more = {"pace": pace} if name == "qwen2_5_vl" else {}
    here = jnp.pad(here, ((0, 0), (0, 1)))  # A token of text after all.
    found = places_of(here, grids, **more)
    found, after = found[:, :-1], np.asarray(found)
    theirs = np.array(RECORDED[name]["places"])
    real = kinds >= 0
    np.testing.assert_array_equal(np.asarray(found)[real], theirs[real])
    deltas = decode_delta(found, jnp.asarray(real))
    for b, n in enumerate(real.sum(1)):
        assert after[b, n].tolist() == [n + deltas[b]] * 3
    # Theirs is of the last frame too, with which texts do not go on, see decode_delta.
    assert name == "qwen2_5_vl" or deltas.tolist() == RECORDED[name]["deltas"]
    if real.all():
        np.testing.assert_array_equal(decode_delta(found), deltas)


@pytest.mark.parametrize("name", ROWS)
def test_angles_are_the_originals(name):
    interleaved = name == "qwen3_vl"
    rotary = MRotary(THETA, sections=SECTIONS[name], interleaved=interleaved)
    places = jnp.array(RECORDED[name]["places"][0])[None]
    angles = rotary.angles_at(places, HEAD)[0]
    for function in (np.cos, np.sin):
        theirs = np.array(RECORDED[name][function.__name__])
        np.testing.assert_allclose(function(angles), theirs, atol=2e-6)
    other = MRotary(THETA, sections=SECTIONS[name], interleaved=not interleaved)
    wrong = np.cos(other.angles_at(places, HEAD)[0])
    assert np.abs(wrong - np.array(RECORDED[name]["cos"])).max() > 0.1


def test_samples_in_a_row_stand_as_each_alone():
    kinds, grids, _ = ours("qwen2_vl")
    lengths = (kinds >= 0).sum(1)
    row = np.concatenate([kinds[b, :n] for b, n in enumerate(lengths)])
    segments = np.repeat([1, 2, 3], lengths)
    packed = jnp.concatenate([grids[0], grids[1]])[None]
    both = places_of(jnp.asarray(row > 0)[None], packed, segments=jnp.asarray(segments)[None])
    theirs = np.array(RECORDED["qwen2_vl"]["places"])
    alone = np.concatenate([theirs[b, :n] for b, n in enumerate(lengths)])
    np.testing.assert_array_equal(both[0], alone)


def test_text_alone_turns_as_without_sections():
    at = jnp.arange(5)[None]
    places = jnp.broadcast_to(at[..., None], (1, 5, 3))
    for law in (None, Linear(2.0)):
        rotary = MRotary(THETA, law, (4, 3, 3), interleaved=True)
        plain = Rotary(THETA, law).angles(at, HEAD)
        np.testing.assert_array_equal(rotary.angles_at(places, HEAD), plain)
        np.testing.assert_array_equal(rotary.angles(at, HEAD), plain)


def test_axes_of_qwens_sections():
    chunked = axes_of_sections((16, 24, 24))
    assert [(chunked == axis).sum() for axis in range(3)] == [16, 24, 24]
    assert (np.diff(chunked) >= 0).all()
    mixed = axes_of_sections((24, 20, 20), interleaved=True)
    assert [(mixed == axis).sum() for axis in range(3)] == [24, 20, 20]
    assert mixed[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert not mixed[60:].any()


def test_bad_sections_are_told():
    places = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ValueError, match="must sum to half of head_dim=20"):
        MRotary(sections=(2, 2, 2)).angles_at(places, HEAD)
    with pytest.raises(ValueError, match="must not be DynamicNTK"):
        MRotary(scaling=DynamicNTK(2.0, 8), sections=(4, 3, 3)).angles_at(places, HEAD)
    with pytest.raises(ValueError, match="use MRotary"):
        Rotary().angles_at(places, HEAD)
