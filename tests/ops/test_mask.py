import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.mask import (
    BlockDiffusion,
    Causal,
    Full,
    Prefix,
    Segments,
    Spans,
    Window,
)  # fmt: skip

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
        (Segments(IDS), r"Segments.q_ids has shape \(1, 5\) and must have 4 columns"),
        (Causal() & Segments(IDS), "must have 4 columns"),
        (BlockDiffusion(2) | Causal(), "an even number; got 4 and 6"),
    ],
)
def test_other_lengths_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.dense(4, 6)
