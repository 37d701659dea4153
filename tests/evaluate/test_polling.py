import collections

import pytest

from evaluate.polling import polls, yes_no
from evaluate.report import table
from jaxformer import metrics

# Cats stand in most, forks beside knives alone.
IMAGES = [{"cat"}, {"cat", "dog"}, {"cat", "dog"}, {"fork", "knife"}, {"cat", "knife"}, {"sea"}]


@pytest.mark.parametrize("absent", ["random", "popular", "adversarial"])
def test_half_of_the_polls_are_of_what_is_not_there(absent):
    found = polls(IMAGES, absent, each=2)
    assert found == polls(IMAGES, absent, each=2)
    assert len(set(found)) == len(found)
    for number, image in enumerate(IMAGES):
        own = [p for p in found if p.image == number]
        assert all(p.truth == (p.thing in image) for p in own)
        assert collections.Counter(p.truth for p in own) == {
            True: min(2, len(image)),
            False: min(2, len(image)),
        }


def test_what_is_not_there_is_what_is_often_or_beside():
    def asked(absent, image):
        found = polls(IMAGES, absent, each=1)
        return next(p.thing for p in found if p.image == image and not p.truth)

    assert {asked("popular", image) for image in (3, 5)} == {"cat"}
    assert asked("adversarial", 0) == "dog" and asked("adversarial", 1) == "knife"


def test_answers_are_worth_what_they_say():
    said, truth = [True, True, True, False, False], [True, True, False, True, False]
    whole = yes_no(said, truth)
    assert {name: (m.sum, m.count) for name, m in whole.items()} == {
        "accuracy": (3, 5),
        "precision": (2, 3),
        "recall": (2, 3),
        "f1": (4, 6),
        "yes": (3, 5),
    }
    parts = [yes_no(said[:2], truth[:2]), yes_no(said[2:], truth[2:])]
    assert metrics.merge(*parts) == whole
    assert table(3, {"all": whole})  # As `python -m evaluate` prints it.
