"""What text costs without a network: xz, and an n-gram of bytes by Kneser and Ney.

Both count what `rows.Windows` counts: all bytes of each document, and its end.
"""

import lzma
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def baselines(train: Any, test: Any, order: int = 10) -> Iterator[dict]:
    """Each in turn: its name, bits, bytes, bits_per_byte and seconds.

    Args:
      train: a source of documents to learn from.
      test: a source of documents to predict.
      order: how many bytes the longest context of the n-gram has.
    """
    texts = [
        [source[i]["text"].encode() for i in range(len(source))] for source in (train, test)
    ]
    size = sum(map(len, texts[1]))

    def row(name: str, bits: float, begin: float) -> dict:
        seconds = time.monotonic() - begin
        found = {"baseline": name, "bits": bits, "bytes": size, "bits_per_byte": bits / size}
        return found | {"seconds": seconds}

    begin = time.monotonic()
    seen, new = (b"".join(some) for some in texts)
    alone = 8 * len(lzma.compress(new, preset=9))
    yield row("xz -9", alone, begin)
    begin = time.monotonic()
    after = 8 * (len(lzma.compress(seen + new, preset=9)) - len(lzma.compress(seen, preset=9)))
    yield row("xz -9, train before it", after, begin)
    begin = time.monotonic()
    nats = ngram(texts[0], texts[1], order).sum()
    yield row(f"{order + 1}-gram of bytes", float(nats) / math.log(2), begin)


def ngram(train: list[bytes], test: list[bytes], order: int) -> Float[np.ndarray, " n"]:
    """Nats of every byte of `test`, and of the end of each text, after `train`.

    Interpolated Kneser-Ney (Chen and Goodman 1999) with one discount a length, from how
    many grams occur once and twice. Contexts are told apart by hashes of 64 bits.
    """
    seen, new = _joined(train, order), _joined(test, order)
    counted, wanted = (np.flatnonzero(real) for _, real in (seen, new))
    nats = np.full(len(wanted), 1 / 257)  # A probability, until the end.
    for length in range(order + 1):
        highest = length == order
        contexts, grams, counts = _counts(seen[0], counted, length, continued=not highest)
        once, twice = ((counts == n).sum() for n in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        keys, place, kinds = np.unique(contexts, return_inverse=True, return_counts=True)
        totals = np.bincount(place, counts)
        context = _hashes(new[0], wanted, length)
        gram = _with(context, new[0][wanted])
        at, known = _find(keys, context)
        own, there = _find(grams, gram)
        count = np.where(there, np.maximum(counts[own] - discount, 0), 0)
        share = discount * kinds[at] / totals[at]
        nats = np.where(known, count / totals[at] + share * nats, nats)
    return -np.log(nats)


def _joined(texts: list[bytes], order: int) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
    """Symbols of all texts, each after `order` + 1 marks, and which of them are predicted.

    A byte is 1 to 256, its text's end 257 and a mark before it 0.
    """
    symbols, real = [], []
    for text in texts:
        own = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
        symbols += [np.zeros(order + 1, np.uint64), own, np.full(1, 257, np.uint64)]
        real += [np.zeros(order + 1, bool), np.ones(len(own) + 1, bool)]
    return np.concatenate(symbols), np.concatenate(real)


def _counts(symbols, places, length: int, *, continued: bool):
    """Contexts, grams and counts of each gram, in the order of the grams.

    `continued` counts in how many different contexts of one symbol more it stands.
    """
    context = _hashes(symbols, places, length)
    gram = _with(context, symbols[places])
    if continued:
        longer = _with(_hashes(symbols, places, length + 1), symbols[places])
        _, first = np.unique(longer, return_index=True)
        context, gram = context[first], gram[first]
    grams, first, counts = np.unique(gram, return_index=True, return_counts=True)
    return context[first], grams, counts


def _hashes(symbols, places, length: int):
    """One number for the `length` symbols before each place."""
    found = np.full(len(places), length + 1, np.uint64)
    for back in range(length, 0, -1):
        found = _with(found, symbols[places - back])
    return found


def _with(hashes, symbols):
    mixed = (hashes ^ (symbols + np.uint64(1))) * _FACTOR
    return mixed ^ (mixed >> np.uint64(29))


def _find(keys, wanted):
    """Where each is among sorted keys, and whether it is."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
