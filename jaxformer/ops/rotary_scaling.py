"""Rotary angles of long texts: the laws by which frequencies are slowed down.

`Rotary(theta=5e5, scaling=Llama3(8.0, 8192)).angles(positions, head_dim)`. A law takes the
frequencies of the pairs, in radians a token, to other ones. All but `DynamicNTK`'s are
numbers, computed in float64 and rounded once.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.ops.rotary import axes_of_sections


@runtime_checkable
class Scaling(Protocol):
    """A law: the frequencies `[H / 2]` of a head, and by what its logits' root grows."""

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token, float64."""
        ...

    @property
    def factor_of_logits(self) -> float:
        """By what queries and keys are both multiplied."""
        ...


def plain(theta: float, head_dim: int) -> np.ndarray:
    """`theta ** (-2 i / H)` for pair `i`. Source: Su et al. 2021, arXiv 2104.09864."""
    return float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`. Source: Chen et al. 2023, arXiv 2306.15595."""

    factor: float
    factor_of_logits: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token."""
        return plain(theta, head_dim) / self.factor


@dataclasses.dataclass(frozen=True)
class NTK:
    """`theta` times `factor ** (H / (H - 2))`: the slowest pair slows by `factor`.

    The fastest stays as it is. Source: bloc97 2023, "NTK-aware scaled RoPE".
    """

    factor: float
    factor_of_logits: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token."""
        return plain(theta * self.factor ** (head_dim / (head_dim - 2)), head_dim)


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """`NTK` by as much as the text at hand is longer than `length`; none where it is not.

    Its factor is `factor * n / length - (factor - 1)` for `n` tokens: the greatest position
    of the call and one. Keys in a cache keep the angles that they were written with, as
    transformers has it, so that decoding beyond `length` is not the same as one pass.
    Source: emozilla 2023, "Dynamically scaled RoPE"; transformers' code.
    """

    factor: float
    length: int
    factor_of_logits: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token, in a text of `length` tokens or fewer."""
        return plain(theta, head_dim)

    def stretched(
        self, theta: float, head_dim: int, positions: Int[Array, "*B T"]
    ) -> Float[Array, " h"]:
        """Radians a token, in a text that ends at the greatest of `positions`."""
        tokens = jnp.maximum(positions.max() + 1, self.length).astype(jnp.float32)
        longer = self.factor * tokens / self.length - (self.factor - 1)
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2)
        return jnp.asarray(plain(theta, head_dim), jnp.float32) * longer**-exponent


@dataclasses.dataclass(frozen=True)
class YaRN:
    """Fast pairs stay, slow ones are divided by `factor`, those between are blended.

    A pair is fast that turns more than `fast` times within `length`, the length trained
    on, and slow that turns less than `slow` times. Where `attention` is None, logits grow
    by the square of `0.1 log(factor) + 1`. `whole` rounds the bounds to whole pairs.
    Source: Peng et al. 2023, arXiv 2309.00071.
    """

    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    whole: bool = True

    @property
    def factor_of_logits(self) -> float:
        """By what queries and keys are both multiplied."""
        if self.attention is not None:
            return self.attention
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token."""

        def pair(turns: float) -> float:  # that turns so often within the length.
            return (
                head_dim * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            )

        low, high = pair(self.fast), pair(self.slow)
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        slow = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        found = plain(theta, head_dim)
        return found / self.factor * slow + found * (1 - slow)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Pairs of waves longer than `length / low` are divided by `factor`.

    Those shorter than `length / high` stay, and those between are blended. `length` is the
    one trained on. Source: Llama 3.1's code; Llama team 2024, arXiv 2407.21783.
    """

    factor: float
    length: int
    low: float = 1.0
    high: float = 4.0
    factor_of_logits: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Radians a token."""
        found = plain(theta, head_dim)
        waves = self.length * found / (2 * math.pi)  # in `length`.
        keep = np.clip((waves - self.low) / (self.high - self.low), 0, 1)
        return (1 - keep) * found / self.factor + keep * found


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of a text: the base of the frequencies, and a law for long texts."""

    theta: float = 1e4
    scaling: Scaling | None = None

    @property
    def factor_of_logits(self) -> float:
        """By what queries and keys are both multiplied."""
        return 1.0 if self.scaling is None else self.scaling.factor_of_logits

    def angles(self, positions: Int[Array, "*B T"], head_dim: int) -> Float[Array, "*B T h"]:
        """Angles in radians, one for each of the `head_dim / 2` pairs, float32."""
        if isinstance(self.scaling, DynamicNTK):
            found = self.scaling.stretched(self.theta, head_dim, positions)
        elif self.scaling is None:
            found = plain(self.theta, head_dim)
        else:
            found = self.scaling.frequencies(self.theta, head_dim)
        frequency = jnp.asarray(found, jnp.float32)[(None,) * positions.ndim]
        return positions[..., None].astype(jnp.float32) * frequency

    def angles_at(self, places: Int[Array, "*B T 3"], head_dim: int) -> Float[Array, "*B T h"]:
        """Angles of tokens that stand on several axes, see `MRotary`."""
        raise ValueError(
            "places on several axes need rotary positions with sections; use MRotary(theta, "
            "sections=...)"
        )


@dataclasses.dataclass(frozen=True)
class MRotary(Rotary):
    """Rotary positions of text among images and videos: each pair turns by one of 3 axes.

    Frames, rows and columns are those of `ops.mrope.multimodal_places`; text alone, which
    stands at the same place on all of them, turns as by `Rotary`. `sections` are how many
    pairs turn by each axis, see `ops.rotary.axes_of_sections`.
    """

    sections: tuple[int, int, int] = (16, 24, 24)
    interleaved: bool = False

    def angles_at(self, places: Int[Array, "*B T 3"], head_dim: int) -> Float[Array, "*B T h"]:
        """Angles in radians, one for each of the `head_dim / 2` pairs, float32.

        Raises:
          ValueError: sections that are not of as many pairs, or a law that asks how long
            the text is.
        """
        if 2 * sum(self.sections) != head_dim or isinstance(self.scaling, DynamicNTK):
            raise ValueError(
                f"sections={self.sections} must sum to half of head_dim={head_dim}, and the "
                "law must not be DynamicNTK"
            )
        axes = axes_of_sections(self.sections, interleaved=self.interleaved)
        law = self.scaling
        found = (law.frequencies if law else plain)(self.theta, head_dim)
        frequency = jnp.asarray(found, jnp.float32)[(None,) * (places.ndim - 1)]
        return places[..., axes].astype(jnp.float32) * frequency
