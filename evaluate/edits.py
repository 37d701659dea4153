"""How far what was read is from what was written: edits of letters and of words."""

from collections.abc import Sequence

import numpy as np

from jaxformer import metrics


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The Levenshtein distance: the fewest parts to change, add or take away.

    >>> edits("kitten", "sitting"), edits("a b c".split(), "a c".split())
    (3, 1)
    """
    parts = {part: number for number, part in enumerate({*a, *b})}
    other = np.array([parts[part] for part in b], int)
    steps = np.arange(len(b) + 1)
    row = steps
    for i, part in enumerate(a, 1):
        # To change or leave a part, or to take one away; then to add, all at once.
        best = np.minimum(row[:-1] + (other != parts[part]), row[1:] + 1)
        best = np.concatenate([[i], best])
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def error_rates(read: Sequence[str], truth: Sequence[str]) -> metrics.Metrics:
    """The edits of all texts by the letters (`cer`) and words (`wer`) of the true ones.

    Words stand between white space. A rate may be above 1. `exact` is the texts without an
    edit. Sums are integers, which add up over any parts of the texts.
    """
    pairs = list(zip(read, truth, strict=True))
    letters = [edits(a, b) for a, b in pairs]
    words = [edits(a.split(), b.split()) for a, b in pairs]
    found = {
        "cer": metrics.Mean(sum(letters), sum(len(b) for _, b in pairs)),
        "wer": metrics.Mean(sum(words), sum(len(b.split()) for _, b in pairs)),
        "exact": metrics.Mean(letters.count(0), len(pairs)),
    }
    return metrics.to_host(found)
