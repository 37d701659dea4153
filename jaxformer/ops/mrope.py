"""Where tokens of text, images and videos stand in a row: frame, row and column (M-RoPE).

Text counts on along all three axes at once; an image or a video lies in a box of its own
that begins where the text before it ends, and the text after it goes on behind the box's
longer side. Source: Qwen2-VL, Wang et al. 2024, arXiv 2409.12191.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.ops.intervals import runs


def multimodal_places(
    here: Bool[Array, "B T"],
    grids: Int[Array, "B n 3"],
    *,
    segments: Int[Array, "B T"] | None = None,
    pace: Float[Array, "B n"] | None = None,
) -> Int[Array, "B T 3"]:
    """Frame, row and column of every token, for `ops.rotary_scaling.MRotary`.

    Args:
      here: the tokens in whose places features of images and videos stand.
      grids: frames, rows and columns of those of each image or video of a row, in the
        order of their places; zeros are none.
      segments: samples of a row; each counts from 0. All of one if not given.
      pace: how many places a frame is after the one before it, rounded down (Qwen2.5-VL:
        2 tokens a second times the seconds of a frame); 1 if not given.

    Example:
      >>> here = jnp.array([[False, True, True, True, True, False]])
      >>> multimodal_places(here, jnp.array([[[1, 2, 2]]]))[0].tolist()
      [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]]
    """
    sizes = grids.prod(-1)
    stops = jnp.cumsum(sizes, 1)
    number = jnp.cumsum(here, 1) - 1  # of a feature in its row.
    item = (number[..., None] >= stops[:, None]).sum(-1)
    item = jnp.minimum(item, grids.shape[1] - 1)
    grid = jnp.maximum(jnp.take_along_axis(grids, item[..., None], 1), 1)
    rows, columns = grid[..., 1], grid[..., 2]
    own = number - jnp.take_along_axis(stops - sizes, item, 1)
    frame = own // (rows * columns)
    longer = jnp.maximum(rows, columns)
    step = jnp.where(here, jnp.where(own == 0, longer, 0), 1)
    after = jnp.cumsum(step, 1)
    begin = after - jnp.where(here, longer, 1)
    if segments is not None:
        start, _ = runs(segments)
        begin -= jnp.take_along_axis(after - step, start, 1)
    if pace is not None:
        frame = jnp.floor(frame * jnp.take_along_axis(pace, item, 1)).astype(begin.dtype)
    inside = jnp.stack([frame, own // columns % rows, own % columns], -1)
    return begin[..., None] + jnp.where(here[..., None], inside, 0)


def decode_delta(
    places: Int[Array, "B T 3"], real: Bool[Array, "B T"] | None = None
) -> Int[Array, " B"]:
    """What is added to the index of a token after a prompt, for its place on all axes.

    A box takes fewer places than it has tokens, so that this is seldom above 0. Tokens that
    follow stand as they would in one text with the prompt. transformers takes the greatest
    place of all: another one where a video's last frame is farther on than what follows it.
    `real` are the tokens that are none of padding, all if not given.

    Example:
      >>> decode_delta(jnp.array([[[0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 2, 2]]])).tolist()
      [-1]
    """
    if real is None:
        real = jnp.ones(places.shape[:2], bool)
    last = jnp.where(real[..., None], places[..., 1:], -1).max((1, 2))  # But for frames.
    return last + 1 - real.sum(1)
