import numpy as np
import pytest

from jaxformer.data.images import Normalize
from jaxformer.data.scenes import (
    END,
    IMAGE,
    KINDS,
    PAD,
    Ask,
    Scenes,
    decode,
    encode,
    question,
)
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError


def test_a_scene_holds_the_scans_that_it_names():
    scenes, digits = Scenes("test", 40), Digits("test")
    scans = {}
    for i in range(len(digits)):
        scans.setdefault(digits[i]["image"].tobytes(), digits[i]["label"])
    for i in range(len(scenes)):
        scene = scenes[i]
        assert scene["image"].shape == (16, 32, 1)
        labels = [int(d) for d in scene["digits"] if d >= 0]
        total = 0.0
        for label, (y, x) in zip(labels, scene["places"], strict=False):
            cut = scene["image"][y : y + 8, x : x + 8]
            assert scans[np.ascontiguousarray(cut).tobytes()] == label
            total += cut.sum()
        assert total == pytest.approx(scene["image"].sum())  # And nothing beside them.
        assert list(scene["places"][: len(labels), 1]) == sorted(
            scene["places"][: len(labels), 1]
        )


def test_a_scene_is_always_the_same_and_splits_have_others():
    a, b = Scenes("train", 5)[3], Scenes("train", 9)[3]
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["image"], Scenes("test", 5)[3]["image"])
    assert not np.array_equal(a["image"], Scenes("train", 5, seed=1)[3]["image"])


SCENE = {"digits": np.array([7, 2, 7]), "asked": 7}
ANSWERS = {
    "left": "7",
    "right": "7",
    "read": "7 2 7",
    "largest": "7",
    "count": "2",
    "sum": "16",
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_exact(kind):
    text, answer = question(kind, SCENE)
    assert answer == ANSWERS[kind] and text.endswith("?")
    assert decode([*encode(text), *encode(answer), END, PAD]) == f"{text} {answer}"


def test_two_digits_have_no_third():
    record = {"digits": np.array([3, 5, -1]), "asked": 0}
    assert question("read", record)[1] == "3 5" and question("right", record)[1] == "5"
    assert question("count", record) == ("how many zeros are there ?", "0")


def test_a_row_asks_every_kind_after_the_image():
    scene = Normalize()(Scenes("train", 3)[0])
    row = Ask(places=8, length=57)(scene)
    assert (row["tokens"][:8] == IMAGE).all() and row["images"].shape == (1, 16, 32, 1)
    for number, kind in enumerate(KINDS, 2):
        own = row["segments"] == number
        asked, said = question(kind, scene)
        assert decode(row["tokens"][own & (row["answer"] == 0)]) == asked
        ids = row["tokens"][own & (row["answer"] == 1)]
        assert decode(ids) == said and ids[-1] == END
    assert (row["tokens"][row["segments"] == 0] == PAD).all()
    assert not row["answer"][:8].any()
    blind = Ask(places=8, length=57, blind=True)(scene)
    assert not blind["images"].any() and np.array_equal(blind["tokens"], row["tokens"])


def test_every_scene_goes_into_the_row_of_the_config():
    scenes, ask = Scenes("train", 200), Ask(places=8, length=57)
    assert max(ask(scenes[i])["segments"].astype(bool).sum() for i in range(200)) == 57


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ask(8, 20)(Scenes("train", 1)[0]), "length=20 is too short for"),
        (lambda: Ask(8, 20, ("colour",)), "kinds: 'colour' is none of left, right"),
        (lambda: Scenes("train", 1, (16, 20)), r"size=\(16, 20\) must be multiples of 8"),
        (lambda: Scenes("train", least=4), "least=4 must be from 1 to 3 digits"),
        (lambda: Scenes("dev"), "Digits has no split 'dev'"),
        (lambda: encode("what is love ?"), "'love' is no word of the scenes"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(make, said):
    with pytest.raises(InputError, match=said):
        make()
