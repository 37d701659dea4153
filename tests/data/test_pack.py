"""Images into rows of patches on the host."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.pack import pack
from jaxformer.errors import InputError
from jaxformer.ops.pack import places
from jaxformer.ops.patches import patchify

SHAPES = [(8, 12), (4, 4), (16, 8), (8, 8), (4, 20), (4, 4)]


def images(shapes=tuple(SHAPES), channels=3, dtype="float32"):
    draw = np.random.default_rng(0)
    return [draw.normal(size=(*shape, channels)).astype(dtype) for shape in shapes]


def test_each_image_is_in_the_first_row_with_room():
    made = pack(images(), patch=4, length=8, count=3)
    assert made["index"].tolist() == [[0, 1, 5], [2, -1, -1], [3, -1, -1], [4, -1, -1]]
    none = [[0, 0], [0, 0]]
    rest = [[grid, *none] for grid in ([4, 2], [2, 2], [1, 5])]
    assert made["grids"].tolist() == [[[2, 3], [1, 1], [1, 1]], *rest]
    few = pack(images(), patch=4, length=8, count=2, rows=6)["index"]
    assert few[:, 0].tolist() == [0, 2, 3, 4, -1, -1]
    assert few[:, 1].tolist() == [1, -1, 5, -1, -1, -1]


def test_the_patches_are_those_of_each_image():
    given = images(dtype="float16")
    made = pack(given, patch=4, length=9, count=4)
    ids = np.asarray(places(jnp.asarray(made["grids"]), 9).ids)
    assert made["patches"].dtype == np.float16
    for row in range(len(ids)):
        for place, i in enumerate(made["index"][row]):
            own = made["patches"][row][ids[row] == place + 1]
            expected = (
                patchify(jnp.asarray(given[i][None]), 4)[0] if i >= 0 else np.zeros((0, 48))
            )
            np.testing.assert_array_equal(own, expected)
    assert not made["patches"][ids == 0].any()


def test_what_cannot_be_packed_is_told():
    options = {"patch": 4, "length": 8, "count": 3}
    for given, change, words in (
        ([], {}, "there are no images to pack"),
        (images([(4, 4), (8, 10)]), {}, "image 1 has 8 x 10 pixels, .* resize it to 8 x 12"),
        (images([(12, 12)]), {}, "image 0 has 3 x 3 = 9 patches of 4 pixels .* holds 8"),
        (images([(8, 8)] * 5), {"rows": 2}, "5 images take 3 rows .* there are 2: 1 are left"),
        ([*images([(4, 4)]), *images([(4, 4)], 1)], {}, "image 1 has 1 channels and image 0"),
        ([np.zeros((4, 4))], {}, r"image 0 has shape \(4, 4\); an image is"),
    ):
        with pytest.raises(InputError, match=words):
            pack(given, **options | change)
