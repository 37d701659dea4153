import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxformer.ops import intervals as sets
from jaxformer.ops.mask import (
    BlockDiffusion,
    Causal,
    Full,
    Positions,
    Prefix,
    Segments,
    Spans,
    Twice,
    Window,
)  # fmt: skip
from tests.ops.random_masks import random_masks

IDS = jnp.array([[1, 1, 2, 2, 0]])

# A mask, and the picture of it: a row a query, a column a key.
TABLE = {
    "full": (Full(), "11111 11111 11111 11111 11111"),
    "causal": (Causal(), "10000 11000 11100 11110 11111"),
    "causal, 2 before": (Causal(2), "11100 11110 11111 11111 11111"),
    "window": (Window(1, 1), "11000 11100 01110 00111 00011"),
    "window, right open": (Window(0, None), "11111 01111 00111 00011 00001"),
    "sliding": (Causal() & Window(1, None), "10000 11000 01100 00110 00011"),
    "prefix": (Prefix(2), "11000 11000 11000 11000 11000"),
    "prefix lm": (Causal() | Prefix(3), "11100 11100 11100 11110 11111"),
    "segments": (Segments(IDS), "11000 11000 00110 00110 00000"),
    "packed causal": (Causal() & Segments(IDS), "10000 11000 00100 00110 00000"),
    "spans": (
        Causal() | Spans(jnp.array([[1, 0]]), jnp.array([[4, 0]])),
        "10000 11110 11110 11110 11111",
    ),
}


def picture(mask) -> str:
    return " ".join(
        "".join(map(str, row)) for row in np.asarray(mask.dense(5, 5))[0].astype(int)
    )


@pytest.mark.parametrize("name", TABLE)
def test_pictures(name):
    mask, expected = TABLE[name]
    assert picture(mask) == expected


def test_block_diffusion_is_the_papers_three_masks():
    mask = BlockDiffusion(2).dense(8, 8)[0].astype(int)
    noisy = ["1100", "1100", "0011", "0011"]
    before = ["0000", "0000", "1100", "1100"]
    upto = ["1100", "1100", "1111", "1111"]
    rows = [a + b for a, b in zip(noisy, before, strict=True)] + ["0000" + c for c in upto]
    assert ["".join(map(str, row)) for row in np.asarray(mask)] == rows


def test_block_of_one_is_autoregression_and_block_of_all_is_full():
    one = BlockDiffusion(1).dense(8, 8)[0]
    assert (one[4:, 4:] == Causal().dense(4, 4)[0]).all()
    assert (one[:4, 4:] == Causal(-1).dense(4, 4)[0]).all()
    assert BlockDiffusion(4).dense(8, 8)[0, :4, :4].all()


def test_lengths_are_data():
    compiled = []

    @jax.jit
    def count(mask):
        compiled.append(1)
        return mask.dense(6, 6).sum()

    assert [int(count(Causal() | Prefix(jnp.array([n])))) for n in (0, 3, 6)] == [21, 24, 36]
    assert len(compiled) == 1


def test_part_of_a_mask_is_its_part():
    mask = (Causal() & Segments(IDS)) | Prefix(jnp.array([1]))
    part = mask.visible(jnp.array([1, 4]), jnp.array([0, 3, 2]), (5, 5))
    assert (part == mask.dense(5, 5)[:, jnp.array([1, 4])][:, :, jnp.array([0, 3, 2])]).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments(IDS), r"Segments.q_ids has shape \(1, 5\) and must be \[B, 4\]"),
        (Causal() & Segments(IDS), r"must be \[B, 4\]"),
        (BlockDiffusion(2) | Causal(), "an even number; got 4 and 6"),
    ],
)
def test_other_lengths_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.dense(4, 6)


def check_intervals(mask, T, S):
    """The lowering of a mask equals its meaning; says how many ranges it takes."""

    @jax.jit
    def run(mask):
        dense, intervals = mask.dense(T, S), mask.intervals(T, S)
        if intervals is None:
            return dense, None, None, None
        return dense, intervals, sets.seen(intervals, jnp.arange(S)), sets.covered(intervals, S)

    dense, intervals, seen, covered = jax.tree.map(np.asarray, run(mask))
    if intervals is None:
        assert dense.all()
        return 0
    assert intervals.dtype == jnp.int32 and intervals.shape[2] == T
    assert (np.broadcast_to(seen, np.broadcast_shapes(seen.shape, dense.shape)) == dense).all()
    assert (covered[0] == seen.any(2)).all() and (covered[1] == seen.any(1)).all()
    return intervals.shape[1] // 2


SPANS = Spans(jnp.array([[1, 3, 2], [0, 1, 0]]), jnp.array([[3, 5, 4], [0, 5, 0]]))
TWO = jnp.array([[1, 1, 2, 2, 0], [0, 3, 0, 2, 2]])
ONE_RANGE = {
    **{
        name: mask
        for name, (mask, _) in TABLE.items()
        if not name.startswith(("full", "spans"))
    },
    "causal or prefix of rows": Causal() | Prefix(jnp.array([2, 5])),
    "windows": Window(None, 1) | Window(None, 2),
    "windows, right": Window(1, None) | Window(2, None),
    "window or causal": Causal(-1) | Window(None, 1),
    "segments with padding between": Segments(TWO),
    "spans alone": SPANS,
    "and of many": Causal() & Prefix(3) & Segments(TWO) & Window(1, 1),
}


@pytest.mark.parametrize("name", ONE_RANGE)
def test_one_range_is_enough(name):
    assert check_intervals(ONE_RANGE[name], 5, 5) == 1


def test_two_ranges_and_none():
    assert check_intervals(Full(), 5, 3) == 0
    assert check_intervals(Full() | Causal(), 5, 5) == 0
    assert check_intervals(Window(None, None), 5, 5) == 0
    assert check_intervals(Full() & Causal(), 5, 5) == 1
    assert check_intervals((Causal() | SPANS) & Segments(TWO), 5, 5) == 2
    for T, size in ((8, 1), (8, 3), (10, 2), (10, 7)):
        assert check_intervals(BlockDiffusion(size), T, T) == 2
    for size, ids in ((1, TWO), (2, TWO), (3, jnp.sort(TWO)), (5, IDS)):
        assert check_intervals(BlockDiffusion(size) & Twice(Segments(ids)), 10, 10) == 2
        assert check_intervals(Twice(Segments(ids)) & BlockDiffusion(size), 10, 10) == 2
    assert check_intervals(Twice(Causal()), 10, 10) == 2
    assert check_intervals(Twice(Window(1, 1)), 10, 10) == 2
    cross = Segments(TWO, jnp.array([[2, 2, 1], [0, 4, 3]]))
    assert check_intervals(cross, 5, 3) == 1


def test_more_than_two_ranges_are_refused_with_the_reason():
    mask = BlockDiffusion(2) | Window(1, 1)
    with pytest.raises(NotImplementedError, match="Or of BlockDiffusion and Window takes 3"):
        mask.intervals(6, 6)


def test_padding_is_told_from_the_mask():
    for mask in (Segments(IDS), Prefix(2), SPANS, Causal() & Prefix(2), Prefix(1) | SPANS):
        assert mask.pads
    for mask in (Full(), Causal(), Window(1, 1), BlockDiffusion(2), Causal() | SPANS):
        assert not mask.pads


def test_torn_segments_are_told_where_the_ids_are_at_hand():
    torn = Segments(jnp.array([[1, 2, 1, 0, 0]]))
    with pytest.raises(ValueError, match=r"q_ids \(1, 5\) has an id in two places"):
        torn.check(5, 5)
    jax.jit(lambda mask: mask.dense(5, 5))(torn)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_the_ranges_of_random_masks_are_their_meaning(data):
    T, S = data.draw(st.sampled_from([(1, 6), (5, 7)]))
    mask = data.draw(random_masks(T, S))
    try:
        check_intervals(mask, T, S)
    except NotImplementedError as error:
        assert "ranges of keys a query" in str(error)


def test_positions_are_data():
    q, k = jnp.array([[0, 1, 2, 3, -1]]), jnp.array([[3, 0, -1, 1, 2]])
    assert picture(Positions(q, k)) == "01000 01010 01011 11011 00000"
    assert picture(Positions(q, k, window=2)) == "01000 01010 00011 10001 00000"
    assert picture(Positions(q, k, block=2)) == "01010 01010 11011 11011 00000"
    assert picture(Positions(q, k, window=2, block=None)) == "01010 01011 10011 10001 00000"
    with pytest.raises(
        ValueError, match=r"Positions.k has shape \(1, 5\) and must be \[1 or B, 6\]"
    ):
        Positions(q, k).dense(5, 6)


def test_both_halves_see_both_as_one_sees_itself():
    mask = Twice(Causal()).dense(4, 4)[0].astype(int)
    rows = ["".join(map(str, row)) for row in np.asarray(mask)]
    assert rows == ["1010", "1111", "1010", "1111"]
    with pytest.raises(NotImplementedError, match="Twice of And takes 4 ranges"):
        Twice((Causal() | SPANS) & Segments(TWO)).intervals(10, 10)
    with pytest.raises(ValueError, match="Twice takes two halves"):
        Twice(Causal()).dense(3, 3)
