"""Drawn characters: the counts that are promised, honest splits, and pictures of them."""

import pickle
import sys
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxformer.data.glyphs import (
    FAMILIES,
    Glyphs,
    NamedGlyphs,
    StyledGlyphs,
    _face,
    _pairs,
    _pillow,
    draw,
)
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline, eval_batches
from jaxformer.data.text import ALPHABET, Spell
from jaxformer.errors import InputError

SPLITS = ("train", "fonts", "characters", "both")


def of(record) -> tuple[str, str]:
    """The font and character that a record's name tells."""
    font, code = record["source"].removeprefix("glyphs[").removesuffix("]").split(" U+")
    return font, chr(int(code, 16))


@pytest.fixture(scope="module")
def named():
    return {split: [of(r) for r in NamedGlyphs(split, 8)] for split in SPLITS}


def test_the_counts_are_those_of_the_docstrings(named):
    assert (len(Glyphs("train")), len(Glyphs("test")), Glyphs().num_classes) == (
        7800,
        2600,
        650,
    )
    assert [len(named[split]) for split in SPLITS] == [38362, 1587, 548, 250]
    assert NamedGlyphs().num_classes == 6181
    names = NamedGlyphs().classes
    assert max(map(len, names)) == 73 and set("".join(names)) == set(ALPHABET)


def test_a_font_that_is_held_out_is_not_trained_on():
    train, test = ([of(Glyphs(s, 8)[i])[0] for i in range(0, n, 130)]
                   for s, n in (("train", 7800), ("test", 2600)))  # fmt: skip
    assert set(test) == set(FAMILIES["STIX"]) and len(set(train)) == 12
    assert not set(train) & set(test)
    assert of(Glyphs("test", held="Mono")[0])[0] == "DejaVuSansMono"


def test_every_class_is_drawn_once_in_every_font():
    source = Glyphs("test", 8)
    labels = [source[i]["label"] for i in range(len(source))]
    assert (np.bincount(labels) == 4).all() and len(set(labels)) == 650
    record = source[650 + 33]
    assert unicodedata.name(of(record)[1]) == source.classes[record["label"]]
    assert source[-1]["source"] == source[2599]["source"]
    with pytest.raises(IndexError):
        source[2600]


def test_what_is_held_out_is_unseen_and_has_one_answer(named):
    fonts = {split: {font for font, _ in pairs} for split, pairs in named.items()}
    characters = {split: {c for _, c in pairs} for split, pairs in named.items()}
    assert not (fonts["train"] | fonts["characters"]) & (fonts["fonts"] | fonts["both"])
    assert not characters["train"] & (characters["characters"] | characters["both"])
    assert characters["fonts"] < characters["train"]
    for split in SPLITS[1:]:
        assert len(characters[split]) == len(named[split])


def test_no_two_classes_look_alike_in_any_font():
    for held in FAMILIES:
        source = Glyphs("test", 48, held)
        images = np.stack([r["image"] for r in source]).reshape(4, 650, -1)
        for font, pictures in zip(FAMILIES[held], images, strict=True):
            assert pictures.any(-1).all(), f"{font} draws nothing"
            # Outlines that differ by less than a pixel's 256th can still meet.
            assert len({p.tobytes() for p in pictures}) >= 648, font


def ink(image):
    """What is not black, cut out."""
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_nothing_of_a_glyph_is_cut_off():
    _, ImageDraw, _ = _pillow()
    shrunk = 0
    font = "DejaVuSans-Bold"
    for character in "AgÅ|.—ǅ⟺⨌" + "".join(map(chr, range(0x4E0, 0x530))):
        picture = Image.new("L", (300, 300))
        ImageDraw.Draw(picture).text((99, 99), character, fill=255, font=_face(font, 72))
        whole, small = ink(np.asarray(picture)), ink(draw(font, character, 96)[..., 0])
        left, top, right, bottom = _face(font, 72).getbbox(character)  # with its margins.
        if max(right - left, bottom - top) <= 96:
            np.testing.assert_array_equal(small, whole)
        else:
            shrunk += 1
            assert 80 <= max(small.shape) <= 96
            aspects = [y / x for y, x in (small.shape, whole.shape)]
            assert abs(aspects[0] / aspects[1] - 1) < 0.05, character
    assert shrunk >= 3


def test_glyphs_stand_on_one_line_in_the_middle():
    for character, low in (("A", 17), ("b", 17), ("g", 21)):
        rows = np.flatnonzero(draw("DejaVuSans", character, 24).any((1, 2)))
        assert rows[-1] == low, character
    columns = np.flatnonzero(draw("DejaVuSans", ".", 24).any((0, 2)))
    assert columns[0] >= 9 and columns[-1] <= 14


def test_records_are_lazy_pickled_and_the_same_every_time():
    for source in (Glyphs("test", 16, "Serif"), NamedGlyphs("both", 16)):
        again = pickle.loads(pickle.dumps(source))
        assert again == source and len(pickle.dumps(source)) < 300
        for index in (0, 7, len(source) - 1):
            np.testing.assert_array_equal(again[index]["image"], source[index]["image"])
            assert again[index].keys() == source[index].keys()
        image = source[0]["image"]
        assert image.shape == (16, 16, 1) and image.dtype == np.uint8


def test_drawing_is_quick():
    source = Glyphs("train")
    source[0]
    begin = time.process_time()
    for i in range(1000):
        source[i]
    assert time.process_time() - begin < 0.2 * 3, "0.2 ms each, on a busy machine"


def test_names_become_batches_of_tokens():
    pipeline = Pipeline(NamedGlyphs("both", 8), (Spell(74), Normalize()))
    first = next(iter(eval_batches(pipeline, batch_size=3)))
    assert first["tokens"].shape == (3, 74) and first["tokens"].dtype == np.int32
    assert first["image"].shape == (3, 8, 8, 1)
    with pytest.raises(InputError, match=r"glyphs\[.*: 'text' is text; put a transform that"):
        list(eval_batches(Pipeline(NamedGlyphs("both", 8), (Normalize(),)), batch_size=3))


def test_bad_input_is_told_in_one_sentence(monkeypatch):
    with pytest.raises(
        InputError, match="Glyphs has no split 'val'; choose one of train, test"
    ):
        Glyphs("val")
    with pytest.raises(
        InputError, match="NamedGlyphs has no split 'test'; choose one of train, f"
    ):
        NamedGlyphs("test")
    with pytest.raises(InputError, match="no held 'Times'; choose one of Sans, Mono, Serif"):
        Glyphs(held="Times")
    with pytest.raises(InputError, match="cannot draw size=4; give 8 pixels or more"):
        NamedGlyphs(size=4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="needs matplotlib; run pip install"):
        from jaxformer.data import glyphs

        glyphs._named_characters.__wrapped__()


def test_pairs_that_are_held_out_are_of_seen_characters_and_fonts():
    seen, held = StyledGlyphs("train"), StyledGlyphs("pairs", size=16)
    assert len(seen) + len(held) == seen.num_classes == 10_400
    record = held[3]
    font = record["label"] // 650
    name, code = record["source"].removeprefix("glyphs[").removesuffix("]").split(" U+")
    assert name == seen.fonts[font]
    assert seen.label(chr(int(code, 16)), name) == record["label"]
    np.testing.assert_array_equal(record["image"], draw(name, chr(int(code, 16)), 16))
    assert seen[0]["image"].shape == (64, 64, 1)
    labels = [_pairs(split) for split in ("train", "pairs")]
    assert not set(labels[0]) & set(labels[1])
    for part in (lambda label: label % 650, lambda label: label // 650):
        assert set(map(part, labels[1])) <= set(map(part, labels[0]))
    with pytest.raises(InputError, match="in Arial is no pair that is drawn"):
        seen.label("A", "Arial")
