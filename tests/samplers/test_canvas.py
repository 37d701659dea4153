"""Canvases: masks where they are asked for, and what cannot be filled in."""

import pytest

from jaxformer.errors import InputError
from jaxformer.samplers.canvas import after, hide


def test_masks_stand_behind_prompts_and_in_spans():
    assert after([[5, 7], [], [5]], 3, 9).tolist() == [[5, 7, 9], [9, 9, 9], [5, 9, 9]]
    assert hide([5, 6, 7, 8], [(2, 3), (3, 4), (0, 1)], 9).tolist() == [9, 6, 9, 9]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [1, 2, 3, 4]], "prompt 1 has 4 tokens, and the canvas has 3"),
        ([[1, 2, 3]], "prompt 0 has 3 tokens, and the canvas has 3"),
        ([[1, 9]], "token 1 of what is given is the mask, mask_id=9"),
    ],
)
def test_a_prompt_that_does_not_fit_is_told(prompts, message):
    with pytest.raises(InputError, match=message):
        after(prompts, 3, 9)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(2, 4), (0, 3)], r"spans \(0, 3\) and \(2, 4\) overlap; make them one span"),
        ([(1, 3), (1, 2)], "overlap"),
        ([(1, 1)], r"span \(1, 1\) must hold a token or more of the text's 4"),
        ([(2, 5)], r"span \(2, 5\) must hold a token or more of the text's 4"),
        ([(-1, 2)], r"span \(-1, 2\) must hold"),
        ([], "there is no span to fill in"),
    ],
)
def test_spans_that_do_not_fit_are_told(spans, message):
    with pytest.raises(InputError, match=message):
        hide([5, 6, 7, 8], spans, 9)
