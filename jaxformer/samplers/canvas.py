"""Canvases to be filled by `samplers.unmask`: what is given, and masks where text is to be."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxformer.errors import InputError


def after(
    prompts: Sequence[Sequence[int]], length: int, mask_id: int
) -> Int[np.ndarray, "B T"]:
    """Rows of `length` tokens that begin with these prompts, and masks behind them.

    Example:
      >>> after([[5, 7], [5]], 4, mask_id=9).tolist()
      [[5, 7, 9, 9], [5, 9, 9, 9]]

    Raises:
      InputError: a prompt that leaves no room, or holds the mask.
    """
    rows = np.full((len(prompts), length), mask_id, np.int32)
    for number, prompt in enumerate(prompts):
        if len(prompt) >= length:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and the canvas has {length}; cut "
                "the prompt, or make the canvas longer"
            )
        rows[number, : len(prompt)] = given(prompt, mask_id)
    return rows


def hide(
    tokens: Sequence[int], spans: Sequence[tuple[int, int]], mask_id: int
) -> Int[np.ndarray, " T"]:
    """A text with masks in these spans, each from a first token to before another.

    Example:
      >>> hide([5, 6, 7, 8, 5], [(0, 1), (2, 4)], mask_id=9).tolist()
      [9, 6, 9, 9, 5]

    Raises:
      InputError: spans that overlap, are empty or reach beyond the text; none at all; a text
        that holds the mask already.
    """
    row = given(tokens, mask_id)
    if not spans:
        raise InputError("there is no span to fill in; give one or more")
    ordered = sorted(spans)
    for start, stop in ordered:
        if not 0 <= start < stop <= len(row):
            raise InputError(
                f"span ({start}, {stop}) must hold a token or more of the text's {len(row)}"
            )
    for (a, b), (c, d) in itertools.pairwise(ordered):
        if c < b:
            raise InputError(f"spans ({a}, {b}) and ({c}, {d}) overlap; make them one span")
    for start, stop in ordered:
        row[start:stop] = mask_id
    return row


def given(tokens: Sequence[int], mask_id: int) -> Int[np.ndarray, " T"]:
    """These tokens, of which none is the mask."""
    row = np.array(tokens, np.int32)
    if (row == mask_id).any():
        at = int((row == mask_id).argmax())
        raise InputError(
            f"token {at} of what is given is the mask, mask_id={mask_id}; leave masks to spans"
        )
    return row
