"""Tiles of images of any resolution: transformers' choices and layouts."""

import json

import numpy as np
import pytest

from jaxformer.data.tiles import best, fitted, order, spread
from jaxformer.errors import InputError
from jaxformer.layers.tiles import RATIOS
from tests.data import record_cut
from tests.data.record_tiles import FILE, PINPOINTS, SIDE, SIZES, TILE

AMONG = [(y, x) for y, x in PINPOINTS]
LAW = {"among": AMONG, "tile": TILE, "side": SIDE}
PER = SIDE**2


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_tiles_lie_as_the_originals(number):
    size, theirs = tuple(SIZES[number]), json.loads(FILE.read_text())[number]
    assert list(best(size, AMONG)) == theirs["best"]
    found = order([size], **LAW, tiles=6, length=200)
    rows, columns = theirs["shape"]
    assert (found[:PER] == np.arange(PER)).all()
    lines = found[PER : PER + rows * (columns + 1)].reshape(rows, columns + 1)
    assert (lines[:, -1] == 6 * PER).all()
    first = np.array(theirs["first"])
    np.testing.assert_array_equal(lines[: len(first), :-1], first + PER)
    assert (found[PER + rows * (columns + 1) :] == -1).all()


def test_images_of_a_row_follow_each_other():
    sizes = [(300, 800), (500, 480)]
    both = order(sizes, **LAW, tiles=9, length=300)
    one, two = (order([size], **LAW, tiles=9, length=300) for size in sizes)
    one, two = one[one >= 0], two[two >= 0]
    line = 9 * PER
    moved = np.where(two == line, line, two + 4 * PER)  # Three tiles and the base one before.
    np.testing.assert_array_equal(both[both >= 0], np.concatenate([one, moved]))


def test_too_many_tiles_are_told():
    with pytest.raises(InputError, match=r"take 3 tiles and 52 features, and a row holds 2"):
        order([(336, 672)], **LAW, tiles=2, length=200)


@pytest.mark.parametrize("number", range(len(record_cut.SIZES)))
def test_images_are_cut_as_the_originals_cut_them(number):
    image, tile = record_cut.image(number), record_cut.TILE
    with np.load(record_cut.FILE) as theirs:
        found = spread(image, among=record_cut.AMONG, tile=tile, longest=10.0)
        np.testing.assert_array_equal(found, theirs[f"spread {number}"])
        tiles, ratio = fitted(image, ratios=RATIOS, tile=tile)
        np.testing.assert_array_equal(tiles, theirs[f"fitted {number}"])
        assert ratio == theirs[f"number {number}"]
    rows, columns = best(image.shape[:2], record_cut.AMONG)
    sizes = {"tiles": len(found), "length": 400, "tile": tile, "side": 2}
    own = order([image.shape[:2]], among=record_cut.AMONG, **sizes)
    assert len(found) == 1 + rows * columns // tile**2 and own.max() == len(found) * 4


@pytest.mark.parametrize("size", [(8, 33), (33, 8), (0, 8)])
def test_an_image_longer_than_the_table_is_refused(size):
    image, law = np.zeros((*size, 3), np.uint8), {"tile": 8, "longest": None}
    said = (
        f"an image of {size[0]} x {size[1]} pixels is longer than [34] to 1, the longest of its"
    )
    with pytest.raises(InputError, match=said):
        fitted(image, ratios=RATIOS, **law)
    with pytest.raises(InputError, match=said):
        spread(image, among=record_cut.AMONG, **law)
