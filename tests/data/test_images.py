"""Transforms equal Pillow, are what they say at whole pixels, and refuse bad files."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxformer.data.augment import (
    _OPERATIONS,
    Affine,
    RandAugment,
    warp,
)
from jaxformer.data.images import (
    CenterCrop,
    Decode,
    Flip,
    Normalize,
    RandomResizedCrop,
    Resize,
)
from jaxformer.data.mix import Cutmix, Mixup
from jaxformer.errors import InputError


def photo(y: int, x: int, c: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(y, x, c), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return {"image": data.getvalue(), "label": 0, "source": f"a.{kind.lower()}"}


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_equals_pillow(mode, channels):
    record = encoded(Image.fromarray(photo(6, 9)).convert(mode))
    found = Decode(channels=channels)(record)
    wanted = Image.open(io.BytesIO(record["image"])).convert("RGB" if channels == 3 else "L")
    assert found["image"].shape == (6, 9, channels) and found["image"].dtype == np.uint8
    np.testing.assert_array_equal(found["image"].squeeze(), np.asarray(wanted))
    assert found["label"] == 0 and isinstance(record["image"], bytes)


def test_decode_keeps_the_upper_byte_of_16_bits_and_takes_transparent_palettes():
    deep = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    found = Decode(channels=1)(encoded(Image.fromarray(deep)))["image"]
    np.testing.assert_array_equal(found[..., 0], deep >> 8)
    palette = Image.fromarray(photo(4, 4)).convert("P")
    assert Decode()(encoded(palette, transparency=b"\x00\x80"))["image"].shape == (4, 4, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_decode_refuses_what_is_cut_short(kind):
    record = encoded(Image.fromarray(photo(64, 64)), kind)
    assert Decode()(record)["image"].shape == (64, 64, 3)
    record["image"] = record["image"][:-1000]
    with pytest.raises(InputError, match=rf"a.{kind.lower()}: is not a whole PNG, JPEG, "):
        Decode()(record)


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + b"\xff" * 99]
)
def test_decode_refuses_what_is_no_image(data):
    with pytest.raises(InputError, match=r"a.png: is not a whole .*; replace or remove it"):
        Decode()({"image": data, "label": 0, "source": "a.png"})


def test_decode_refuses_formats_it_has_no_need_of():
    with pytest.raises(InputError, match=r"a.gif: is not a whole PNG"):
        Decode()(encoded(Image.fromarray(photo(4, 4)), "GIF"))


def test_decode_reads_the_size_before_the_pixels():
    record = encoded(Image.fromarray(photo(10, 10)))
    assert Decode(max_pixels=100)(record)["image"].shape == (10, 10, 3)
    with pytest.raises(InputError, match=r"a.png: has 10 x 10 pixels, above max_pixels=99"):
        Decode(max_pixels=99)(record)
    for side in (11_000, 60_000):  # Pillow warns of the one, raises for the other.
        bomb = bytearray(record["image"])
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(InputError, match=r"a.png: has .* pixels.* max_pixels"):
            Decode()(record | {"image": bytes(bomb)})


def test_decode_makes_grey_or_rgb():
    with pytest.raises(InputError, match=r"cannot make channels=4; use 1 \(grey\) or 3"):
        Decode(channels=4)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("y", "x", "shape"), [(20, 31, (10, 15)), (31, 20, (15, 10))])
def test_resize_equals_pillow(method, y, x, shape):
    image = photo(y, x)
    pillow = Image.fromarray(image).resize(shape[::-1], Image.Resampling[method.upper()])
    found = Resize(10, method)({"image": image})["image"]
    np.testing.assert_array_equal(found, np.asarray(pillow))
    real = Resize(10, method)({"image": image.astype(np.float32)})["image"]
    assert real.dtype == np.float32
    np.testing.assert_allclose(real.clip(0, 255), found, atol=1.2)  # it rounds twice.


def test_resize_knows_its_methods():
    with pytest.raises(InputError, match="no resize method 'area9'; use bilinear or bicubic"):
        Resize(4, "area9")({"image": photo(5, 5)})


def test_center_crop_is_the_middle():
    image = photo(9, 12, 1)
    found = CenterCrop(5)({"image": image})["image"]
    np.testing.assert_array_equal(found, image[2:7, 3:8])
    with pytest.raises(
        InputError, match=r"a.png: 4 x 9 pixels are too few for CenterCrop\(5\)"
    ):
        CenterCrop(5)({"image": photo(4, 9), "source": "a.png"})


def test_random_resized_crop_stays_inside_and_in_bounds():
    rng = np.random.default_rng(0)
    crop = RandomResizedCrop(7, area=(0.1, 0.5))
    for y, x in ((40, 60), (60, 40)):
        boxes = np.array([crop._rectangle(y, x, rng) for _ in range(300)])
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (top + h <= y).all()
        assert (left >= 0).all() and (left + w <= x).all()
        share = h * w / (y * x)
        assert 0.09 < share.min() < 0.15 and 0.45 < share.max() < 0.52
        assert 0.7 < (w / h).min() < 0.8 and 1.25 < (w / h).max() < 1.4
    assert crop._rectangle(3, 300, rng) == (0, 148, 3, 4)  # no rectangle fits: the middle.
    assert crop({"image": photo(40, 60)}, rng)["image"].shape == (7, 7, 3)


def test_random_resized_crop_of_everything_is_a_resize():
    image = photo(12, 12)
    crop = RandomResizedCrop(6, area=(1, 1), aspect=(1, 1))
    found = crop({"image": image}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(found, Resize(6)({"image": image})["image"])


def test_random_resized_crop_is_pillows_crop_then_resize():
    image, crop = photo(40, 60), RandomResizedCrop(7, area=(0.1, 0.5))
    for seed in range(5):
        y, x, h, w = crop._rectangle(40, 60, np.random.default_rng(seed))
        cut = Image.fromarray(image).crop((x, y, x + w, y + h))
        wanted = np.asarray(cut.resize((7, 7), Image.Resampling.BILINEAR))
        found = crop({"image": image}, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(found, wanted)


def test_flip_mirrors_half():
    image, rng = photo(3, 4), np.random.default_rng(0)
    found = [Flip()({"image": image}, rng)["image"] for _ in range(200)]
    mirrored = sum(np.array_equal(f, image[:, ::-1]) for f in found)
    assert mirrored + sum(np.array_equal(f, image) for f in found) == 200
    assert 70 < mirrored < 130


def test_normalize_counts_bytes_in_255ths():
    image = photo(3, 4)
    found = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))({"image": image})["image"]
    wanted = (image / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    real = Normalize(0.5, 0.5)({"image": np.ones((1, 1, 1), np.float32)})["image"]
    np.testing.assert_array_equal(real, 1)


def test_a_transform_of_pixels_asks_for_decode():
    for transform in (Resize(4), CenterCrop(4), Normalize()):
        with pytest.raises(InputError, match=r"a.png: is still encoded; put Decode\(\) first"):
            transform({"image": b"...", "source": "a.png"})


def real(y: int, x: int, c: int = 2) -> np.ndarray:
    return np.random.default_rng(1).random((y, x, c), dtype=np.float32)


def test_affine_without_amplitude_is_the_identity():
    for image in (real(8, 8), real(5, 9), photo(6, 7)):
        found = Affine(0.0, 0.0, 0.0)({"image": image}, np.random.default_rng(0))["image"]
        assert found.dtype == image.dtype
        np.testing.assert_array_equal(found, image)


def test_warp_by_a_whole_pixel_is_a_roll_with_a_border_of_zeros():
    image = real(8, 6)
    wanted = np.zeros_like(image)
    wanted[1:, :-2] = image[:-1, 2:]
    np.testing.assert_array_equal(warp(image, shift=(1, -2)), wanted)
    np.testing.assert_array_equal(warp(image, shift=(0, 6)), np.zeros_like(image))
    half = (image[:, 1:] + image[:, :-1]) / 2
    np.testing.assert_allclose(warp(image, shift=(0, 0.5))[:, 1:], half, atol=1e-6)


def test_warp_turns_clockwise_and_scales_about_the_middle():
    image = real(7, 7)
    np.testing.assert_allclose(warp(image, degrees=90), np.rot90(image, -1), atol=1e-5)
    double = warp(image, scale=2.0)
    np.testing.assert_allclose(double[1::2, 1::2], image[2:5, 2:5], atol=1e-6)
    np.testing.assert_allclose(warp(real(1, 1), scale=3.0), real(1, 1), atol=1e-6)


def test_affine_stays_in_its_bounds():
    dot = np.zeros((21, 21, 1), np.float32)
    dot[10, 10] = 1
    rng, seen = np.random.default_rng(0), []
    for _ in range(200):
        image = Affine(shift=3.0, degrees=0.0, scale=0.0)({"image": dot}, rng)["image"]
        weight = image[..., 0] / image.sum()
        seen.append([(weight.sum(axis) * np.arange(21)).sum() - 10 for axis in (1, 0)])
    assert 2.8 < np.max(seen) <= 3.001 and -3.001 <= np.min(seen) < -2.8


@pytest.mark.parametrize("magnitude", [0, 5, 10, 30])
@pytest.mark.parametrize("operation", _OPERATIONS)
def test_rand_augment_operations_keep_size_and_mode(operation, magnitude):
    image = Image.fromarray(photo(24, 32))
    found = operation(image, magnitude / 10, np.random.default_rng(0))
    assert (found.size, found.mode) == (image.size, "RGB")


def test_rand_augment_is_a_function_of_its_generator():
    record = {"image": photo(24, 32)}
    found = [RandAugment(2, 10)(record, np.random.default_rng(s))["image"] for s in range(40)]
    again = [RandAugment(2, 10)(record, np.random.default_rng(s))["image"] for s in range(40)]
    np.testing.assert_array_equal(found, again)
    assert found[0].dtype == np.uint8 and found[0].shape == (24, 32, 3)
    assert len({f.tobytes() for f in found}) > 25
    np.testing.assert_array_equal(record["image"], photo(24, 32))
    nothing = RandAugment(0, 10)(record, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(nothing, record["image"])


def test_rand_augment_strengths_are_big_visions():
    image = photo(224, 224)
    named = {getattr(o, "__name__", ""): o for o in _OPERATIONS}

    def run(name, level):
        found = named[name](Image.fromarray(image), level, np.random.default_rng(0))
        return np.asarray(found)

    np.testing.assert_array_equal(run("_posterize", 1.0), image & 0xF0)
    np.testing.assert_array_equal(run("_solarize", 1.0), image)
    np.testing.assert_array_equal(
        run("_solarize", 0.5), np.where(image < 128, image, 255 - image)
    )
    added = np.where(image < 128, np.minimum(image.astype(int) + 110, 255), image)
    np.testing.assert_array_equal(run("_solarize_add", 1.0), added)
    moved = run("_translate_x", 1.0)  # by 100 pixels, one way or the other.
    right, left = image[:, :124], image[:, 100:]
    assert np.array_equal(moved[:, 100:], right) or np.array_equal(moved[:, :124], left)
    cut = (run("_cutout", 1.0) != image).any(-1)
    assert cut.any(0).sum() <= 80 and cut.any(1).sum() <= 80 and cut.sum() > 1500


def test_rand_augment_asks_for_bytes():
    for image in (real(4, 4, 3), photo(4, 4, 1)):
        with pytest.raises(InputError, match=r"RandAugment needs uint8 RGB, .* put it between"):
            RandAugment()({"image": image}, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"RandAugment\(-1, 10\) must not be negative"):
        RandAugment(-1, 10)


def batch(rows: int = 6) -> dict:
    images = np.random.default_rng(2).random((rows, 8, 8, 1), dtype=np.float32)
    return {"image": images, "label": np.arange(rows, dtype=np.int32) % 4}


@pytest.mark.parametrize("mix", [Mixup(0.8, 4), Cutmix(1.0, 4)])
def test_targets_are_the_shares_of_the_pixels(mix):
    before = batch()
    kept = before["image"].copy()
    for seed in range(20):
        after = mix(before, np.random.default_rng(seed))
        target = after["target"]
        assert target.dtype == np.float32 and after["image"].dtype == np.float32
        np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(after["label"], before["label"])
        keep = target[np.arange(6), before["label"]]
        assert np.ptp(keep[1:4]) < 1e-6  # rows 1 to 3 have partners of other classes.
        own, other = kept, np.roll(kept, 1, axis=0)
        if isinstance(mix, Mixup):
            wanted = keep[1] * own + (1 - keep[1]) * other
            np.testing.assert_allclose(after["image"], wanted, atol=1e-6)
        else:
            is_own = after["image"] == own
            assert (is_own | (after["image"] == other)).all()
            np.testing.assert_allclose(is_own.mean((1, 2, 3)), keep[1], atol=1e-6)
    np.testing.assert_array_equal(before["image"], kept)


def test_mixes_follow_one_another():
    rng = np.random.default_rng(0)
    after = Cutmix(1.0, 4)(Mixup(1.0, 4)(batch(), rng), rng)
    np.testing.assert_allclose(after["target"].sum(-1), 1, rtol=1e-6)
    assert ((after["target"] > 0).sum(-1) >= 3).any()


def test_mixes_say_what_is_wrong():
    with pytest.raises(InputError, match="Mixup needs alpha above 0, not 0"):
        Mixup(0, 4)
    with pytest.raises(InputError, match="label 3 is not below num_classes=3 of Mixup or"):
        Cutmix(1.0, 3)(batch(), np.random.default_rng(0))
