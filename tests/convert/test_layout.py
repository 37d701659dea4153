import numpy as np
import pytest

from jaxformer.convert.layout import parse


@pytest.mark.parametrize(
    ("text", "shape", "sizes", "move"),
    [
        ("O I -> I O", (5, 3), {}, lambda x: x.T),
        ("(N H) D -> D N H", (6, 4), {"N": 2}, lambda x: x.reshape(2, 3, 4).transpose(2, 0, 1)),
        ("D (N H) -> N H D", (4, 6), {"N": 3}, lambda x: x.T.reshape(3, 2, 4)),
        (
            "D C p q -> (p q C) D",
            (5, 3, 2, 2),
            {"p": 2, "q": 2},
            lambda x: x.transpose(2, 3, 1, 0).reshape(12, 5),
        ),
        ("() T D -> T D", (1, 3, 4), {}, lambda x: x[0]),
        ("-> ()", (), {}, lambda x: x.reshape(1)),
        ("(h two) D -> D (two h)", (6, 2), {"two": 2}, lambda x: x[[0, 2, 4, 1, 3, 5]].T),
    ],
)
def test_moves_are_their_numpy_and_go_back(text, shape, sizes, move):
    layout = parse(text)
    theirs = np.random.default_rng(0).normal(size=shape)
    expected = move(theirs)
    found = layout.sizes(expected.shape, sizes)
    assert layout.shape_of_theirs(found) == shape
    np.testing.assert_array_equal(layout.to_ours(theirs, found), expected)
    np.testing.assert_array_equal(layout.to_theirs(expected, found), theirs)


def test_letters_that_do_not_match_are_the_familys_fault():
    with pytest.raises(ValueError, match="same letters"):
        parse("O I -> I")
    with pytest.raises(ValueError, match="does not divide"):
        parse("(N H) D -> D (N H)").sizes((4, 7), {"N": 2})


def test_rows_that_can_be_read_apart():
    assert parse("(N H) D -> D N H").rows == "N"
    assert parse("D C p q -> (p q C) D").rows == "D"
    assert parse("(h two) D -> D (two h)").rows is None
