"""Random transforms that invent new images of a class: Affine and RandAugment."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxformer.data.images import Number, pixels_of
from jaxformer.data.sources import Record
from jaxformer.errors import InputError

_GREY = 128


@dataclass(frozen=True)
class Affine:
    """Randomly shifts, turns and scales an image; outside it is 0.

    Each is drawn uniformly: the shift of each axis within `shift` pixels, the angle
    within `degrees`, the scale within 1 - `scale` and 1 + `scale`.
    """

    shift: Number = 1.0
    degrees: Number = 10.0
    scale: Number = 0.1

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        y, x, turn, zoom = (2 * rng.random(4) - 1).tolist()
        image = warp(
            pixels_of(record),
            shift=(self.shift * y, self.shift * x),
            degrees=self.degrees * turn,
            scale=1 + self.scale * zoom,
        )
        return record | {"image": image}


def warp(
    image: np.ndarray,
    *,
    shift: tuple[Number, Number] = (0.0, 0.0),
    degrees: Number = 0.0,
    scale: Number = 1.0,
) -> np.ndarray:
    """Scales and turns `image` `[Y, X, C]` about its middle, then moves it by `shift`.

    `shift` is (down, right) in pixels, `degrees` clockwise as displayed. The sampling is
    bilinear, exact for whole pixels, and everything outside the image is 0.
    """
    Y, X, C = image.shape
    from_middle, middle, limit, last = _grid(Y, X)
    cos = math.cos(math.radians(degrees)) / scale
    sin = math.sin(math.radians(degrees)) / scale
    turn = np.array([[cos, -sin], [sin, cos]], np.float32)
    move = np.array(shift, np.float32)[:, None]
    source = turn @ (from_middle - move) + middle  # where each pixel comes from.
    source = np.minimum(np.maximum(source, 0), limit)
    low = np.minimum(source.astype(np.int64), last)
    y, x = (source - low)[..., None].astype(np.float32)

    padded = np.zeros((Y + 2, X + 2, C), np.float32)
    padded[1:-1, 1:-1] = image
    pixels, at = padded.reshape(-1, C), low[0] * (X + 2) + low[1]
    top = pixels.take(at, axis=0)
    top += x * (pixels.take(at + 1, axis=0) - top)
    at += X + 2
    bottom = pixels.take(at, axis=0)
    bottom += x * (pixels.take(at + 1, axis=0) - bottom)
    out = (top + y * (bottom - top)).reshape(Y, X, C)
    return np.rint(out).astype(np.uint8) if image.dtype == np.uint8 else out


@functools.lru_cache(16)
def _grid(Y: int, X: int) -> tuple[np.ndarray, ...]:
    """Rows and columns `[2, Y * X]` about the middle, and where a border of 1 ends."""
    middle = np.array([[(Y - 1) / 2], [(X - 1) / 2]], np.float32)
    from_middle = np.indices((Y, X), np.float32).reshape(2, -1) - middle
    size = np.array([[Y], [X]])
    return from_middle, middle + 1, size.astype(np.float32) + 1, size


@dataclass(frozen=True)
class RandAugment:
    """Applies `layers` operations, each drawn uniformly from sixteen, to a uint8 image.

    Cubuk et al., "RandAugment", 2019 (arXiv:1909.13719). The operations and what
    `magnitude` m means are big_vision's, so that `RandAugment(2, 10)` is its
    `randaug(2,10)`: turn by m * 3 degrees, shear by m * 0.03, move by m * 10 pixels (of
    224, here in proportion), each with a random sign; colour, contrast, brightness and
    sharpness by the factor 0.1 + m * 0.18; posterize to m * 0.4 bits; solarize from
    m * 25.6; add m * 11 to what is below 128; cut out a square of m * 8 pixels (of
    224); autocontrast, equalize, invert. So posterize and solarize weaken as m grows.
    Empty pixels are grey 128, sampling is nearest.
    The operations themselves are Pillow's, and differ from big_vision's in one point:
    contrast blends with the image's mean grey, where big_vision's blends with grey 196
    (at 224 pixels: its mean divides the pixel count by 256).

    Raises:
      InputError: an image that is not uint8 RGB; or a negative number.
    """

    layers: int = 2
    magnitude: Number = 10.0

    def __post_init__(self):
        if self.layers < 0 or self.magnitude < 0:
            raise InputError(
                f"RandAugment({self.layers}, {self.magnitude}) must not be negative; "
                "usual values are (2, 10)"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        pixels = pixels_of(record)
        if pixels.dtype != np.uint8 or pixels.shape[-1] != 3:
            raise InputError(
                f"{record.get('source', 'image')}: RandAugment needs uint8 RGB, not "
                f"{pixels.dtype} with {pixels.shape[-1]} channels; put it between "
                "Decode() and Normalize()"
            )
        image = Image.fromarray(pixels)
        for _ in range(self.layers):
            operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
            image = operation(image, self.magnitude / 10, rng)
        return record | {"image": np.asarray(image)}


def _sign(rng) -> int:
    return 1 if rng.random() < 0.5 else -1


def _transform(image: Image.Image, *matrix: Number) -> Image.Image:
    fill = (_GREY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


def _rotate(image, level, rng):
    return image.rotate(30 * level * _sign(rng), fillcolor=(_GREY,) * 3)


def _shear_x(image, level, rng):
    return _transform(image, 1, 0.3 * level * _sign(rng), 0, 0, 1, 0)


def _shear_y(image, level, rng):
    return _transform(image, 1, 0, 0, 0.3 * level * _sign(rng), 1, 0)


def _translate_x(image, level, rng):
    return _transform(image, 1, 0, 100 / 224 * image.width * level * _sign(rng), 0, 1, 0)


def _translate_y(image, level, rng):
    return _transform(image, 1, 0, 0, 0, 1, 100 / 224 * image.height * level * _sign(rng))


def _enhance(kind):
    return lambda image, level, rng: kind(image).enhance(0.1 + 1.8 * level)


def _posterize(image, level, rng):
    return ImageOps.posterize(image, min(8, max(1, int(4 * level))))


def _solarize(image, level, rng):
    return ImageOps.solarize(image, int(256 * level))


def _solarize_add(image, level, rng):
    added = int(110 * level)
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


def _cutout(image, level, rng):
    half = int(40 / 224 * min(image.size) * level)
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste((_GREY,) * 3, (x - half, y - half, x + half, y + half))
    return image


_OPERATIONS = (
    lambda image, level, rng: ImageOps.autocontrast(image),
    lambda image, level, rng: ImageOps.equalize(image),
    lambda image, level, rng: ImageOps.invert(image),
    *(_rotate, _shear_x, _shear_y, _translate_x, _translate_y),
    *(_posterize, _solarize, _solarize_add, _cutout),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
)
