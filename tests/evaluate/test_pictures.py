"""Pictures are drawn, and show what they are given."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evaluate import pictures
from evaluate.generate import Records
from evaluate.pictures import (
    Attention,
    Reconstruction,
    attention_picture,
    reconstruction_picture,
)
from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.experiment import Picture
from jaxformer.models.vit import ViT, attention_map
from jaxformer.objectives.reconstruct import Reconstruct
from jaxformer.ops.patches import patchify
from jaxformer.sharding import FSDP_TENSOR, make_mesh


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
    drawn = {}
    for place in (2, 7):  # the first and last patch, behind two other keys.
        path = attention_picture(
            images(channels), looking_at(place, 8), tmp_path / "a", grid=(3, 2)
        )
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


ORDER = np.random.default_rng(0).permutation(10)
RECORDS = Pipeline(Records([{"image": x} for x in images(1, 10)]))


def trained(model, params, objective=None, devices=3):
    mesh = make_mesh(f"data={devices}", jax.devices()[:devices])
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    return Trained(model.apply, params, mesh, FSDP_TENSOR, 8, model, objective)


def test_a_run_draws_where_its_model_looks(tmp_path, monkeypatch, key):
    model = ViT(8, 2, 8, 2, patch=4, num_classes=3, positions="sincos", registers=1)
    given = jnp.asarray(images(1, 10)[ORDER[:3]])
    params = nn.unbox(jax.jit(model.init)(key, given))["params"]
    seen = {}
    monkeypatch.setattr(
        pictures, "attention_picture", lambda *a, **b: seen.update(b, arrays=a[:2]) or a[2]
    )
    picture = Attention(RECORDS, count=3, layer=0)
    assert isinstance(picture, Picture)
    expected = attention_map(model, {"params": params}, given, layer=0)
    for one in (model, model.parts()):
        assert picture.picture(trained(one, params), tmp_path / "a") == tmp_path / "a"
        shown, maps = seen["arrays"]
        np.testing.assert_array_equal(shown, given)
        np.testing.assert_allclose(maps, expected, atol=1e-6)
        assert seen["grid"] == (3, 2) and seen["query"] is None


class Memory(nn.Module):
    """Hides the patches of most noise, and says of each twice what it is, or its pixels."""

    normalize: bool

    @nn.compact
    def __call__(self, images, noise):
        x = patchify(images, 2)
        if self.normalize:
            x = (x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True)
        mask = (noise.argsort(-1).argsort(-1) >= 6).astype(jnp.float32)
        return 2 * x, mask


@pytest.mark.parametrize("normalize", [True, False])
def test_a_run_draws_what_its_model_fills_in(normalize, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "reconstruction_picture", lambda *a: seen.append(a[:3]))
    picture, given = Reconstruction(RECORDS, count=5), images(1, 10)[ORDER[:5]]
    for devices in (1, 4):
        objective = Reconstruct(2, normalize=normalize)
        picture.picture(trained(Memory(normalize), {}, objective, devices), tmp_path / "a")
    (shown, hidden, filled), other = seen
    for a, b in zip(seen[0], other, strict=True):
        np.testing.assert_array_equal(a, b)  # On any mesh.
    np.testing.assert_array_equal(shown, given)
    assert hidden.shape == (5, 6, 4) and (hidden.sum((1, 2)) == 18).all()
    assert len({h.tobytes() for h in hidden}) == 5, "each image has noise of its own"
    patches = given.reshape(5, 6, 2, 4, 2, 1)
    mean = patches.mean((2, 4), keepdims=True) if normalize else 0
    expected = (2 * patches - mean).reshape(given.shape)
    np.testing.assert_allclose(filled, expected, atol=1e-4)
