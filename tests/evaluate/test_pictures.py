"""Pictures are drawn, and show what they are given."""

import numpy as np
import pytest
from PIL import Image

from evaluate.pictures import attention_picture, reconstruction_picture
from jaxformer.errors import InputError


def images(channels, count=2):
    return np.random.default_rng(0).normal(size=(count, 12, 8, channels)).astype(np.float32)


def looking_at(place, keys):
    """All weight of 2 heads and 3 queries on one key."""
    weights = np.zeros((2, 2, 3, keys), np.float32)
    weights[..., place] = 1
    return weights


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_is_drawn_over_the_image(tmp_path, channels):
    grid = {"grid": (3, 2)}
    drawn = {}
    for place in (2, 7):  # the first and last patch, behind two other keys.
        path = attention_picture(images(channels), looking_at(place, 8), tmp_path / "a", **grid)
        assert path == tmp_path / "a.png"
        drawn[place] = pixels(path)
        assert drawn[place].std() > 20, "blank"
    Y, X, _ = drawn[2].shape
    assert X / Y > 1.2, "two rows of image, mean and two heads"
    apart = np.abs(drawn[2] - drawn[7]).sum(-1)
    assert not apart[:, : X // 4].any(), "the image itself stays"
    assert apart[:, X // 4 :].any()


def test_the_patch_that_is_looked_at_is_bright(tmp_path):
    flat = np.zeros((1, 12, 12, 1), np.float32)
    sums = []
    for place in (0, 8):
        path = attention_picture(flat, looking_at(place, 9)[:1], tmp_path / "b", query=None)
        picture = pixels(path)
        mean = picture[40:, picture.shape[1] // 4 : picture.shape[1] // 2].sum(-1)
        Y, X = mean.shape
        sums.append([mean[: Y // 2, : X // 2].mean(), mean[Y // 2 :, X // 2 :].mean()])
    (first, other), (dark, last) = sums
    assert first > dark and last > other


def test_a_reconstruction_shows_only_what_was_hidden(tmp_path):
    given = images(3)
    hidden = np.zeros((2, 6, 4), bool)
    hidden[:, :3] = True
    drawn = [
        pixels(reconstruction_picture(given, hidden, given + add, tmp_path / "c"))
        for add in (0, 2)
    ]
    assert drawn[0].std() > 20, "blank"
    X = drawn[0].shape[1]
    apart = np.abs(drawn[0] - drawn[1]).sum(-1)
    assert not apart[:, : 2 * X // 3].any() and apart[:, 2 * X // 3 :].any()
    nothing = np.zeros((2, 6, 4), bool)
    same = pixels(reconstruction_picture(given, nothing, given + 2, tmp_path / "d"))
    assert np.abs(same - drawn[0]).sum(-1)[:, X // 3 : 2 * X // 3].any(), "grey where hidden"
    assert not np.abs(same - drawn[0]).sum(-1)[:, 2 * X // 3 :].any()


def test_bad_input_is_told_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"grid=\(3, 4\) has 12 patches, more than the 9 keys"):
        attention_picture(images(1), looking_at(0, 9), tmp_path / "a", grid=(3, 4))
    with pytest.raises(InputError, match="query=3 is not one of the 3 queries"):
        attention_picture(images(1), looking_at(0, 9), tmp_path / "a", query=3)
    with pytest.raises(InputError, match="5 x 4 patches, which do not divide 12 x 8 pixels"):
        hidden = np.zeros((2, 5, 4), bool)
        reconstruction_picture(images(1), hidden, images(1), tmp_path / "a")
    assert not list(tmp_path.iterdir())
