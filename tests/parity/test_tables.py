"""Facts that stand in a family's table, made wrong: each must be noticed, as a model's are.

How heads lie in a tensor, which part of a fused one is which, how a patch is read, whose
position is the first.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxformer.convert import engine, files
from jaxformer.convert.families import FAMILIES
from tests.parity.case import TOLERANCE, distance
from tests.parity.cases import CASES
from tests.parity.test_parity import jit


def laid(*changes):
    """Layouts with each of some texts replaced by another."""

    def change(entry):
        layout = functools.reduce(lambda text, c: text.replace(*c), changes, entry.layout)
        return dataclasses.replace(entry, layout=layout)

    return lambda entries: [change(e) for e in entries]


def side_by_side(entries):
    """The pairs that rotary positions turn: neighbours in each head, and not its halves."""
    wrong = laid(("(N H)", "(N h t)"), (" N H", " N (t h)"))
    found = []
    for entry in entries:
        if "/query/" in entry.ours or "/key/" in entry.ours:
            (entry,) = wrong([dataclasses.replace(entry, sizes={**entry.sizes, "t": 2})])
        found.append(entry)
    return found


def exchanged(a, b):
    """Two of our parameters that lie alike are read from each other's place."""

    def change(entries):
        by_path = {(e.ours, e.at): e for e in entries}
        found = []
        for entry in entries:
            other = entry.ours.replace(a, b) if a in entry.ours else entry.ours.replace(b, a)
            other = by_path.get((other, entry.at), entry)
            place = {"theirs": other.theirs, "part": other.part}
            found.append(dataclasses.replace(entry, **place))
        return found

    return change


def other_token_first(entries):
    """The class token and the one after it stand in each other's place."""
    return [e if e.at is None else dataclasses.replace(e, at=1 - e.at) for e in entries]


FACTS = {
    "heads are slowest": laid(("(N H)", "(H N)")),
    "value before key": exchanged("/key/", "/value/"),
    "query after key": exchanged("/query/", "/key/"),
    "patches column by column": laid(("p q C) D", "q p C) D")),
    "channels before pixels": laid(("p q C) D", "C p q) D")),
    "pairs side by side": side_by_side,
    "the other token first": other_token_first,
}
PLAIN = ("heads are slowest", "value before key", "query after key")
PATCHES = ("patches column by column", "channels before pixels")
KNOWN = {
    "vit_classify": PLAIN + PATCHES,
    "deit_teacher": ("the other token first",),
    "clip": PLAIN + PATCHES,
    "siglip": PLAIN + PATCHES,
    "siglip2": PLAIN,
    "dinov3": ("pairs side by side", "heads are slowest", *PATCHES),
    "mae_encoder": PLAIN + PATCHES,
    "swin_classify": PLAIN + PATCHES,
    "vivit_classify": PLAIN + PATCHES,
    "videomae_classify": ("heads are slowest", *PATCHES),
    "timm_token": PLAIN + PATCHES,
    "timm_map": PLAIN,
}
# Whose learned positions begin with those of tokens before the patches.
PREFIXED = ("vit_classify", "clip", "vivit_classify", "timm_token")


def last_is_first(path, x):
    """The position of the class token behind those of the patches, which is wrong."""
    names = [k.key for k in path]
    own = names[-3:] == ["embed", "position", "embedding"] and "text" not in names
    return np.roll(x, -1, 0) if own else x


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_wrong_table_is_noticed(name):
    case = CASES[name]
    family, config = FAMILIES[case.kind], files.read_config(case.directory)
    tensors = family.tensors(config, files.open_tensors(case.directory))
    model = family.model(config, set(tensors), np.float32)
    inputs, theirs = case.answers()
    options = {"mesh": None, "rules": (), "dtype": np.float32, "where": name}
    answer = jit(lambda p, x: case.ours(model, {"params": p}, x))

    def apart(params):
        return distance(answer(params, inputs), theirs)

    right = engine.read(family, model, tensors, **options)
    assert apart(right) <= TOLERANCE
    found = {}
    for fact in KNOWN[name]:
        entries = functools.partial(_wrong, family.entries, FACTS[fact])
        wrong = dataclasses.replace(family, entries=entries)
        found[fact] = apart(engine.read(wrong, model, tensors, **options))
    if name in PREFIXED:
        found["class token last"] = apart(jax.tree.map_with_path(last_is_first, right))
    print(name, {fact: f"{d:.1e}" for fact, d in found.items()})
    assert min(found.values()) > 2 * TOLERANCE, found


def _wrong(entries, change, model):
    return change(list(entries(model)))
