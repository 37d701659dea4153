"""Two streams, an image's tokens and a text's: each by its own weights, in one attention."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.attention import Attention, ready
from jaxformer.layers.block import drop_path as drop_rows
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.norm import BareLayerNorm
from jaxformer.layers.timestep import AdaNorm, Modulation, modulate
from jaxformer.ops.attention import attend
from jaxformer.ops.mask import Mask
from jaxformer.sharding import constrain


class Stream(nn.Module):
    """What one stream brings to the attention, and takes from it: `project`, then `give`."""

    num_heads: int
    head_dim: int
    width: int
    qk_norm: Callable[..., nn.Module] | None = None
    epsilon: float = 1e-6
    gives: bool = True  # Without: nobody reads what it would take.
    dtype: DTypeLike = jnp.bfloat16

    def setup(self):
        def project(equation: str, **sizes: int) -> Einsum:
            return Einsum(equation, sizes, True, self.dtype)

        sizes = {"N": self.num_heads, "H": self.head_dim}
        self.query = project("BTD,DNH->BTNH", **sizes)
        self.key = project("BTD,DNH->BTNH", **sizes)
        self.value = project("BTD,DNH->BTNH", **sizes)
        if self.qk_norm is not None:
            alike: dict[str, Any] = {"epsilon": self.epsilon, "letters": "H"}
            self.query_norm, self.key_norm = self.qk_norm(**alike), self.qk_norm(**alike)
        if self.gives:
            self.out = project("BTNH,NHD->BTD", D=self.width)

    def project(
        self, x: Float[Array, "B T D"], angles: Float[Array, "#B T h"] | None
    ) -> tuple[Float[Array, "B T N H"], ...]:
        """Queries, keys and values, normed and turned."""
        normed = self.qk_norm is not None
        q = ready(self.query(x), self.query_norm if normed else None, angles)
        k = ready(self.key(x), self.key_norm if normed else None, angles)
        return q, k, self.value(x)

    def give(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """What comes out of the attention, as it is added."""
        return self.out(y)


class ScaleNorm(AdaNorm):
    """`AdaNorm` whose condition makes the scale first, and then the shift.

    Source: diffusers, `AdaLayerNormContinuous`.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], condition: Float[Array, "B 1 C"]
    ) -> Float[Array, "B T D"]:
        scale, shift = Modulation(2, x.shape[-1], name="modulation")(condition)
        return modulate(self.norm(x), shift, scale)


class JointBlock(nn.Module):
    """A block of two streams that see each other; both heed a condition (adaLN-zero).

    `x` `[B, T + S, D]` are an image's `image` = T tokens, and after them a text's. The
    condition `[B, 1, C]` makes shift, scale and gate of attention and the same of the MLP
    for each stream. With `own` the image looks at itself a second time, from the same
    normed tokens, by three vectors more (Stable Diffusion 3.5). A `last` block only looks
    at its text: nothing of it is read any more, and its text comes out as it was.

    Source: Esser et al. 2024, arXiv 2403.03206 (Stable Diffusion 3).
    """

    num_heads: int
    head_dim: int
    mlp: nn.Module
    text_mlp: nn.Module | None  # None: the last block.
    own: Attention | None = None
    qk_norm: Callable[..., nn.Module] | None = None
    norm: Callable[..., nn.Module] = BareLayerNorm
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        image: int,
        condition: Float[Array, "B 1 C"],
        angles: Float[Array, "#B T h"] | None = None,
        mask: Mask | None = None,
        train: bool = False,
        drop_path_rate: float | Float[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        D, T = x.shape[-1], image
        x = constrain(x, "BTD")
        x, text = x[:, :T], x[:, T:]
        last = self.text_mlp is None

        def normed(x: Array) -> Array:
            return self.norm(epsilon=self.epsilon, parent=None)(x)

        def stream(name: str, gives: bool = True) -> Stream:
            heads = (self.num_heads, self.head_dim, D, self.qk_norm, self.epsilon)
            return Stream(*heads, gives, self.dtype, name=name)

        def add(x: Array, gate: Array, y: Array) -> Array:
            y = gate.astype(x.dtype) * y
            if train and drop_path_rate is not None:
                y = drop_rows(y, drop_path_rate, self.make_rng("dropout"))
            return x + y

        count = 6 if self.own is None else 9
        made = Modulation(count, D, name="image_modulation")(condition)
        told = Modulation(2 if last else 6, D, name="text_modulation")(condition)
        shift, scale = told[1::-1] if last else told[:2]  # Scale first, as `ScaleNorm` has it.
        both = stream("image_attention"), stream("text_attention", not last)
        turns = (None, None) if angles is None else (angles[:, :T], angles[:, T:])
        before = normed(x)
        parts = [
            both[0].project(modulate(before, *made[:2]), turns[0]),
            both[1].project(modulate(normed(text), shift, scale), turns[1]),
        ]
        q, k, v = (jnp.concatenate(some, 1) for some in zip(*parts, strict=True))
        y = attend(q.astype(self.dtype), k.astype(self.dtype), v, mask=mask)
        x = add(x, made[2], both[0].give(y[:, :T]))
        if self.own is not None:
            x = add(x, made[8], self.own(modulate(before, *made[6:8])))
        x = add(x, made[5], self.mlp(modulate(normed(x), *made[3:5]), train=train))
        if self.text_mlp is not None:
            text = add(text, told[2], both[1].give(y[:, T:]))
            y = self.text_mlp(modulate(normed(text), *told[3:5]), train=train)
            text = add(text, told[5], y)
        return constrain(jnp.concatenate([x, text], 1), "BTD")
