"""A mixture has each record as often as is asked, on any number of hosts."""

import pickle
from collections import Counter

import pytest

from jaxformer.data.loader import Pipeline, fingerprint
from jaxformer.data.mixture import Mixture
from jaxformer.data.rows import Rows
from jaxformer.data.sources import Digits
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.tokens import Tokenized
from jaxformer.errors import InputError
from tests.data.texts import Texts
from train.faults.elastic import records_once


def rows(*texts, length=16):
    return Rows(Tokenized(Texts(texts), Bytes()), length)


def test_every_part_comes_as_often_as_it_is_told():
    a, b = rows("first text", "of two"), rows("and the other")
    made = Mixture((a, b), times=(1, 3))
    seen = Counter(made[i]["tokens"].tobytes() for i in range(len(made)))
    expected = Counter()
    for part, times in ((a, 1), (b, 3)):
        expected.update({part[i]["tokens"].tobytes(): times for i in range(len(part))})
    assert seen == expected and len(made) == len(a) + 3 * len(b)
    assert made.vocab == a.vocab and Mixture((Digits(), Digits("test"))).num_classes == 10
    again = pickle.loads(pickle.dumps(made))
    assert again[1]["tokens"].tolist() == made[1]["tokens"].tolist()
    other = fingerprint(Pipeline(Mixture((a, b), times=(1, 2))), 4, 0)
    assert fingerprint(Pipeline(made), 4, 0) != other


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mixture(()), "parts of a mixture are empty"),
        (lambda: Mixture((Digits(),), (1, 2)), r"are 2 for 1 sources; give one for each"),
        (lambda: Mixture((Digits(),), (0,)), "must be 1 or more"),
        (lambda: Mixture((rows("a"), Digits()))[1], "source 1 of a mixture has records of"),
    ],
)
def test_what_cannot_be_mixed(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_each_record_once_on_4_then_2_then_8_hosts():
    found = records_once()
    assert not found.wrong, found.shown
