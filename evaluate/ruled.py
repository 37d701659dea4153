"""Questions about scenes answered without a model that sees: what one lies between.

The floor is the commonest answer to the words of a question; the ceiling are classifiers of
each digit, cut out where it stands, with the rule of the question written by hand.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from jaxformer.data.scenes import KINDS, READING, Scenes, question
from jaxformer.data.sources import Digits, Record

Answer = Callable[[str, Record], str]
_OF_16 = {"gamma": 1e-3 * 16**2}  # What is usual for these digits, whose pixels count to 16.


def baselines(train: Scenes, test: Scenes) -> Iterator[dict]:
    """Fits each in turn; yields its name and, by kind, how many answers are right of how many.

    The words' answers are counted in the training scenes; the classifiers see scikit-learn's
    training digits, one by one.
    """
    for name, answer in (
        ("commonest answer to the words", _commonest(train)),
        ("nearest neighbour, digit by digit", _ruled(KNeighborsClassifier(1), train, test)),
        ("support vectors, digit by digit", _ruled(_vectors(), train, test)),
    ):
        right: collections.Counter[str] = collections.Counter()
        for i in range(len(test)):
            for kind in KINDS:
                right[kind] += answer(kind, test[i]) == question(kind, test[i])[1]
        counts = {kind: (right[kind], len(test)) for kind in KINDS}
        reading = [counts[kind] for kind in READING]
        every = list(counts.values())
        for total, some in (("reading", reading), ("all", every)):
            first, second = zip(*some, strict=True)
            counts[total] = (sum(first), sum(second))
        yield {"baseline": name, "kinds": counts}


def _vectors() -> SVC:
    options: Any = _OF_16  # scikit-learn's types know its names alone.
    return SVC(**options)


def _commonest(train: Scenes) -> Answer:
    said = collections.defaultdict(collections.Counter)
    for i in range(len(train)):
        record = train[i]
        for kind in KINDS:
            text, answer = question(kind, record)
            said[text][answer] += 1
    return lambda kind, record: said[question(kind, record)[0]].most_common(1)[0][0]


def _ruled(model, train: Scenes, test: Scenes) -> Answer:
    digits = Digits(train.split)
    records = [digits[i] for i in range(len(digits))]
    model.fit(
        np.stack([record["image"].reshape(-1) for record in records]),
        [record["label"] for record in records],
    )
    crops, owners = [], []
    for i in range(len(test)):
        record = test[i]
        for digit, (y, x) in zip(record["digits"], record["places"], strict=True):
            if digit >= 0:
                crops.append(record["image"][y : y + 8, x : x + 8].reshape(-1))
                owners.append(record["source"])
    found = collections.defaultdict(list)
    for owner, label in zip(owners, model.predict(np.stack(crops)), strict=True):
        found[owner].append(int(label))

    def answer(kind: str, record: Record) -> str:
        guessed = record | {"digits": np.array(found[record["source"]])}
        return question(kind, guessed)[1]

    return answer
