"""Image transforms: frozen dataclasses of numbers, called on a record.

A deterministic one is called `(record)`, a random one `(record, rng)` with a
`np.random.Generator`; both return a new record and leave the old one alone. Images are
`[Y, X, C]`, uint8 from `Decode` on, float32 from `Normalize` on.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jaxformer.data.sources import Record
from jaxformer.errors import InputError

Number = int | float  # what a person may write; tests check types to the letter.

# Nothing else is opened: fewer decoders, less that a file from a stranger can reach.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class Decode:
    """Encoded `bytes` -> uint8 `[Y, X, channels]`; PNG, JPEG, WebP or BMP.

    The size is read from the header, and refused above `max_pixels`, before any pixel
    is decoded. `channels` is 3 (RGB) or 1 (grey); transparency is dropped, 16-bit grey
    keeps its upper byte, and a camera's orientation tag is not applied.

    Raises:
      InputError: not such an image, damaged, cut short or too large.
    """

    max_pixels: int = 64 * 2**20
    channels: int = 3

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise InputError(
                f"Decode cannot make channels={self.channels}; use 1 (grey) or 3 (RGB)"
            )

    def __call__(self, record: Record) -> Record:
        name = record.get("source", "image")
        try:
            with Image.open(io.BytesIO(record["image"]), formats=FORMATS) as image:
                x, y = image.size
                if x * y > self.max_pixels:
                    raise InputError(
                        f"{name}: has {x} x {y} pixels, above max_pixels="
                        f"{self.max_pixels}; make it smaller or raise max_pixels"
                    )
                pixels = _pixels(image, self.channels)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(
                f"{name}: has more pixels than max_pixels={self.max_pixels}; make it smaller"
            ) from error
        except InputError:
            raise
        except Exception as error:  # A decoder fed garbage raises what it likes.
            raise InputError(
                f"{name}: is not a whole PNG, JPEG, WebP or BMP image "
                f"({type(error).__name__}); replace or remove it"
            ) from error
        return record | {"image": pixels}


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255.
        grey = (np.asarray(image) >> 8).astype(np.uint8)[..., None]
        return np.repeat(grey, channels, axis=-1)
    if "transparency" in image.info:  # Else Pillow warns about palettes.
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


@dataclass(frozen=True)
class Resize:
    """Makes the short side `size` pixels and keeps the aspect, with antialiasing.

    `method` is "bilinear" or "bicubic", as in Pillow; the long side is rounded down.
    """

    size: int
    method: str = "bilinear"

    def __call__(self, record: Record) -> Record:
        image = pixels_of(record)
        Y, X, _ = image.shape
        shape = (Y * self.size // min(Y, X), X * self.size // min(Y, X))
        return record | {"image": resized(image, shape, self.method)}


@dataclass(frozen=True)
class CenterCrop:
    """Cuts the middle `size` x `size` pixels.

    Raises:
      InputError: the image is smaller than that.
    """

    size: int

    def __call__(self, record: Record) -> Record:
        image = pixels_of(record)
        Y, X, _ = image.shape
        if min(Y, X) < self.size:
            raise InputError(
                f"{record.get('source', 'image')}: {Y} x {X} pixels are too few for "
                f"CenterCrop({self.size}); put Resize({self.size}) before it"
            )
        y, x = (Y - self.size) // 2, (X - self.size) // 2
        return record | {"image": image[y : y + self.size, x : x + self.size]}


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts a random rectangle and resizes it to `size` x `size`, bilinear, antialiased.

    `area` bounds its share of the image, `aspect` its width over its height (drawn
    uniformly in the logarithm). After ten misses it is the largest middle rectangle.
    Szegedy et al., "Going deeper with convolutions", 2014 (arXiv:1409.4842).
    """

    size: int
    area: tuple[Number, Number] = (0.08, 1.0)
    aspect: tuple[Number, Number] = (3 / 4, 4 / 3)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = pixels_of(record)
        Y, X, _ = image.shape
        y, x, h, w = self._rectangle(Y, X, rng)
        image = image[y : y + h, x : x + w]  # Pillow's own `box` would look past its edge.
        return record | {"image": resized(image, (self.size, self.size))}

    def _rectangle(self, Y: int, X: int, rng) -> tuple[int, int, int, int]:
        low, high = self.aspect
        for _ in range(10):
            area = Y * X * rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= Y and 0 < w <= X:
                y, x = rng.integers(Y - h + 1), rng.integers(X - w + 1)
                return int(y), int(x), h, w
        h, w = min(Y, max(1, round(X / low))), min(X, max(1, round(Y * high)))
        return (Y - h) // 2, (X - w) // 2, h, w


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right in half of the draws."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = pixels_of(record)
        return record | {"image": image[:, ::-1] if rng.random() < 0.5 else image}


@dataclass(frozen=True)
class Normalize:
    """`(image - mean) / std` as float32, where uint8 counts in units of 255.

    `mean` and `std` are one number or one a channel; the defaults only scale to [0, 1].
    """

    mean: Number | tuple[Number, ...] = 0.0
    std: Number | tuple[Number, ...] = 1.0

    def __call__(self, record: Record) -> Record:
        image = pixels_of(record)
        unit = np.float32(255 if image.dtype == np.uint8 else 1)
        image = image.astype(np.float32) / unit
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return record | {"image": (image - mean) / std}


def pixels_of(record: Record) -> np.ndarray:
    """The image as an array `[Y, X, C]`.

    Raises:
      InputError: it is still encoded.
    """
    image = record["image"]
    if isinstance(image, bytes):
        raise InputError(
            f"{record.get('source', 'image')}: is still encoded; put Decode() first"
        )
    return image


def resized(image: np.ndarray, shape: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """Pillow's resize to `shape` = (rows, columns), antialiased."""
    try:
        resample = Image.Resampling[method.upper()]
    except KeyError:
        raise InputError(
            f"there is no resize method {method!r}; use bilinear or bicubic"
        ) from None

    rows, columns = shape

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((columns, rows), resample))

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return resize(image)
    planes = [resize(image[..., c]) for c in range(image.shape[-1])]
    return np.stack(planes, axis=-1)
