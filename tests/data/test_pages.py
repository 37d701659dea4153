import hashlib

import numpy as np
import pytest

from jaxformer.data.images import Normalize
from jaxformer.data.pages import CELL, IMAGE, LETTERS, VOCAB, Pages, Read, decode, draw, encode
from jaxformer.errors import InputError
from tests.data.texts import Texts

TEXTS = Texts(("abcdefghij\tk\u00e9l", "x = 1\n", "print(1)\nprint(2)\n"))


def test_a_page_is_what_it_says_and_no_text_is_of_two_documents():
    pages = Pages(TEXTS, rows=2, columns=4)
    assert [pages[i]["text"] for i in range(len(pages))] == [
        "abcdefgh",
        "ij      ",
        "print(1)",
        "\nprint(2",
    ]
    for i in range(len(pages)):
        image, text = pages[i]["image"], pages[i]["text"]
        assert image.shape == (*pages.size, 1) == (24, 24, 1) and image.dtype == np.uint8
        for place, letter in enumerate(text):
            y, x = place // 4 * CELL[0], place % 4 * CELL[1]
            cell = image[y : y + CELL[0], x : x + CELL[1]]
            np.testing.assert_array_equal(cell, draw(letter, 1))
    assert pages[3]["source"].endswith("from letter 8")


def test_pages_are_taken_evenly():
    pages = Pages(Texts(("".join(LETTERS[1:81]),)), 1, 8)
    some = Pages(pages.documents, 1, 8, most=5)
    assert len(pages) == 10 and len(some) == 5
    assert [some[i]["text"] for i in range(5)] == [pages[i]["text"] for i in range(0, 10, 2)]
    with pytest.raises(IndexError):
        some[5]


def test_letters_look_different_and_the_same_everywhere():
    pictures = {draw(letter, 1).tobytes() for letter in LETTERS}
    assert len(pictures) == len(LETTERS) == VOCAB - 2
    whole = draw(LETTERS, len(LETTERS))
    assert set(np.unique(whole)) == {0, 255}
    assert hashlib.sha256(whole.tobytes()).hexdigest()[:16] == "1deb791550205068"
    assert decode([0, IMAGE, *encode(LETTERS)]) == LETTERS


def test_a_row_is_the_image_and_then_its_text():
    record = Normalize()(Pages(TEXTS, 2, 4)[2])
    row = Read(places=2)(record)
    assert decode(row["tokens"][2:]) == "print(1)" and (row["tokens"][:2] == IMAGE).all()
    assert row["answer"].tolist() == [0] * 2 + [1] * 8
    assert row["images"].shape == (1, 24, 24, 1) and row["images"].max() == 1
    blind = Read(places=2, blind=True)(record)
    assert not blind["images"].any() and np.array_equal(blind["tokens"], row["tokens"])


def test_what_cannot_be_drawn_is_told_in_a_sentence():
    with pytest.raises(InputError, match="'é' is not drawn"):
        encode("caf\u00e9")
    with pytest.raises(InputError, match="rows=0 and columns=32 must be 1 or more"):
        Pages(TEXTS, rows=0)
