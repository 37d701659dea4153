"""Batch transforms that mix examples: Mixup and Cutmix, in NumPy alone.

Called `(batch, rng)`; they add soft targets `"target"` `[B, V]` float32, and the integer
`"label"` stays.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxformer.errors import InputError

Number = int | float


@dataclass(frozen=True)
class Mixup:
    """Blends every image and target of a batch with those of the row before it.

    One weight a batch, from Beta(alpha, alpha), of which a row keeps the greater share: its
    `"label"` is the heavier. Zhang et al., "mixup", 2017 (arXiv:1710.09412); one weight a
    batch, the greater share and the roll are big_vision's (its ViT-S/16: alpha 0.2).
    The rows are this process's: the weight is the same on all processes and the same
    for any number of them, but the first row's partner is the last of its own process.

    Raises:
      InputError: alpha is not positive, or a label is not below `num_classes`.
    """

    alpha: Number
    num_classes: int

    def __post_init__(self):
        _check_alpha(self)

    def __call__(self, batch: dict[str, Any], rng: np.random.Generator):
        keep = np.float32(rng.beta(self.alpha, self.alpha))
        keep = max(keep, 1 - keep)
        image, target = batch["image"], _targets(batch, self.num_classes)
        return batch | {
            "image": keep * image + (1 - keep) * np.roll(image, 1, axis=0),
            "target": keep * target + (1 - keep) * np.roll(target, 1, axis=0),
        }


@dataclass(frozen=True)
class Cutmix:
    """Pastes a rectangle of the row before it into every image; targets by its area.

    One rectangle a batch, of an area from Beta(alpha, alpha) before it is cut at the
    border. Yun et al., "CutMix", 2019 (arXiv:1905.04899). Rows as in `Mixup`.

    Raises:
      InputError: alpha is not positive, or a label is not below `num_classes`.
    """

    alpha: Number
    num_classes: int

    def __post_init__(self):
        _check_alpha(self)

    def __call__(self, batch: dict[str, Any], rng: np.random.Generator):
        image, target = batch["image"].copy(), _targets(batch, self.num_classes)
        _, Y, X, _ = image.shape
        side = math.sqrt(rng.beta(self.alpha, self.alpha))
        y, x = rng.random(2) * (Y, X)
        rows = slice(max(0, round(y - side * Y / 2)), min(Y, round(y + side * Y / 2)))
        columns = slice(max(0, round(x - side * X / 2)), min(X, round(x + side * X / 2)))
        image[:, rows, columns] = np.roll(batch["image"][:, rows, columns], 1, axis=0)
        area = (rows.stop - rows.start) * (columns.stop - columns.start) / (Y * X)
        paste = np.float32(area)
        target = (1 - paste) * target + paste * np.roll(target, 1, axis=0)
        return batch | {"image": image, "target": target}


def _check_alpha(mix: Mixup | Cutmix) -> None:
    if mix.alpha <= 0:
        raise InputError(
            f"{type(mix).__name__} needs alpha above 0, not {mix.alpha}; "
            "leave it out for no mixing"
        )


def _targets(batch: dict[str, Any], num_classes: int) -> np.ndarray:
    """The batch's soft targets `[B, V]`: an earlier transform's, or from its labels."""
    if "target" in batch:
        return batch["target"]
    if (highest := batch["label"].max()) >= num_classes:
        raise InputError(
            f"label {highest} is not below num_classes={num_classes} of Mixup or "
            "Cutmix; give them the source's num_classes"
        )
    return np.eye(num_classes, dtype=np.float32)[batch["label"]]
