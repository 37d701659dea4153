"""Which tiles are seen: lists and spans against every query and key."""

import functools

import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxformer.kernels import visits
from tests.kernels.dense import window


@st.composite
def masks(draw):
    """Two intervals a row, most of them as in the rows before; and how many keys."""
    T, S = draw(st.sampled_from([(37, 90), (32, 64), (5, 7)]))
    ends = st.integers(-5, S + 5)
    rows, changes = [], draw(st.lists(st.integers(1, T), min_size=1, max_size=6))
    for repeats in [*changes, T]:
        rows += [draw(st.tuples(ends, ends, ends, ends))] * repeats
    one = draw(st.sampled_from([2, 4]))
    return np.array(rows[:T], np.int32).T[:one], S


def seen_by(intervals, s):
    """Which of the keys `s` each query sees, `[T, s]`."""
    pairs = zip(intervals[::2, :, None], intervals[1::2, :, None], strict=True)
    return np.any([(s >= start) & (s < stop) for start, stop in pairs], 0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(masks(), st.sampled_from([(8, 16, 8), (16, 32, 16), (64, 64, 4)]))
def test_spans_cover_what_is_seen(mask, cut):
    (intervals, S), (chunk, most, grain) = mask, cut
    found, patterns = visits.spans(intervals, S, chunk, most, grain)
    assert len(found) == -(-intervals.shape[1] // chunk)
    for n, pieces in enumerate(found):
        rows = intervals[:, n * chunk : (n + 1) * chunk]
        covered, made = np.zeros(S, int), np.zeros((rows.shape[1], S), bool)
        for start, size, what, (first, count) in pieces:
            assert start % grain == 0 and 0 < size <= most
            assert first % grain == 0 and 0 < count <= chunk - first
            assert count % grain == 0 or first + count == chunk
            keys, some = slice(start, start + size), slice(first, first + count)
            covered[keys] += 1
            made[some, keys] = True if what is None else patterns[what].T
        assert covered.max(initial=0) <= 1
        np.testing.assert_array_equal(made, seen_by(rows, np.arange(S)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def traced(intervals, S, bq, bk):
    kind = visits.kinds(visits.clip(intervals, S), S, bq, bk)
    return kind, visits.Visits.of(kind), visits.Visits.of(kind, swap=True)


def lists(intervals, S, bq, bk):
    """The kinds of tiles, and the lists by queries and by keys, in numpy."""
    return jax.tree.map(np.asarray, traced(intervals, S, bq, bk))


def touching(T: int, S: int):
    """Two intervals that see what neither sees alone."""
    return np.tile(np.array([[40], [S], [-3], [40]], np.int32), T), S


@settings(deadline=None, max_examples=100, derandomize=True)
@given(masks())
@example(touching(37, 90))
def test_lists_hold_what_is_seen(mask):
    intervals, S = mask
    batch = np.stack([intervals, intervals[:, ::-1]])
    kind, by_queries, by_keys = lists(batch, S, 8, 16)
    s = np.arange(kind.shape[2] * 16)
    for row, found in zip(batch, kind, strict=True):
        seen = np.pad(seen_by(row, s) & (s < S), ((0, -row.shape[1] % 8), (0, 0)), "edge")
        seen = seen.reshape(kind.shape[1], 8, kind.shape[2], 16)
        expected = np.where(seen.all((1, 3)), 0, np.where(seen.any((1, 3)), 1, 2))
        np.testing.assert_array_equal(found, expected)
    for made, (order, counts) in ((kind, by_queries), (kind.swapaxes(1, 2), by_keys)):
        ordered = np.take_along_axis(made, order, -1)
        assert (np.diff(ordered * made.shape[2] + order, axis=-1) > 0).all()
        assert (counts == np.stack([(made < n).sum(-1) for n in (1, 2)], -1)).all()


def test_a_wide_mask_visits_few_tiles():
    (kind,), *_ = lists(window(1024, 63, 1), 1024, 64, 64)
    np.testing.assert_array_equal(np.argwhere(kind < 2)[:4], [[0, 0], [1, 0], [1, 1], [2, 1]])
    assert (kind < 2).sum() == 31
