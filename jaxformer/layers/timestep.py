"""What a model is told beside its tokens, a time above all, and how its blocks heed it.

The parts of adaLN-zero: a condition gives each block shifts, scales and gates, all of them
nothing at first, so that a new block is the identity. Source: Peebles and Xie 2022, arXiv
2212.09748 (DiT).
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.block import Block
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.norm import BareLayerNorm
from jaxformer.ops.activation import silu
from jaxformer.ops.mask import Mask
from jaxformer.ops.timestep import cosines_first, steps
from jaxformer.sharding import constrain

NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros


class TimestepEmbed(nn.Module):
    """Times as vectors: their features, widened, through SiLU, and once more.

    `t` `[B]` or `[B, S]` are between 0 and 1, and multiplied by `scale` first; a model that
    counts steps itself has scale=1. `features` is one of `ops.timestep`. Of `dtype` is what
    comes out, and all that a block makes of it.
    """

    width: int
    size: int = 256  # of the features.
    scale: float = 1e3
    features: Callable[..., Array] = cosines_first
    hidden: int | None = None  # between the two linear layers; None: the width.
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "*B"] | Int[Array, "*B"]) -> Float[Array, "*B C"]:
        letters = "BS"[: t.ndim]

        def linear(name: str, size: int) -> Einsum:
            equation = f"{letters}C,CD->{letters}D"
            return Einsum(equation, {"D": size}, True, self.dtype, NORMAL, name=name)

        x = self.features(steps(t, self.scale), self.size)
        x = silu(linear("up", self.hidden or self.width)(x))
        return linear("down", self.width)(x)


class Modulation(nn.Module):
    """`count` vectors of `width` from a condition: SiLU, then a linear map of zeros at first.

    In the kernel `[C, count, D]` they lie in the order in which they are given.
    """

    count: int
    width: int

    @nn.compact
    def __call__(self, condition: Float[Array, "B S C"]) -> tuple[Float[Array, "B S D"], ...]:
        sizes = {"P": self.count, "D": self.width}
        linear = Einsum("BSC,CPD->BSPD", sizes, True, condition.dtype, ZEROS, name="linear")
        y = linear(silu(condition))
        return tuple(y[:, :, i] for i in range(self.count))


def modulate(
    x: Float[Array, "B T D"], shift: Float[Array, "#B #T D"], scale: Float[Array, "#B #T D"]
) -> Float[Array, "B T D"]:
    """`x (1 + scale) + shift`, in the dtype of `x`."""
    return x * (1 + scale).astype(x.dtype) + shift.astype(x.dtype)


class AdaNorm(nn.Module):
    """A norm that a condition shifts and scales; the last one of DiT.

    The condition is `[B, 1, C]`, one for all tokens of a row, or `[B, T, C]`.
    """

    norm: nn.Module

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], condition: Float[Array, "#B #T C"]
    ) -> Float[Array, "B T D"]:
        shift, scale = Modulation(2, x.shape[-1], name="modulation")(condition)
        return modulate(self.norm(x), shift, scale)


class AdaBlock(Block):
    """A pre-norm block that heeds a condition, and is the identity at first (adaLN-zero).

    The condition `[B, 1, C]` or `[B, T, C]` makes, in this order, shift, scale and gate of
    attention and the same of the MLP; both branches are multiplied by their gates.
    """

    norm: Callable[..., nn.Module] = BareLayerNorm
    mlp_epsilon: float | None = None  # of the MLP's norm; None: that of both.

    @nn.compact
    def __call__(
        self,
        x,
        *,
        condition: Float[Array, "#B #T C"],
        train=False,
        drop_path_rate=None,
        **inputs,
    ):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        made = Modulation(6, x.shape[-1], name="modulation")(condition)
        shift, scale, gate = made[:3]
        y = modulate(self.normed(x, "attention_norm"), shift, scale)
        y = self.branch(self.attention(y, **inputs), "attention", **options)
        x += gate.astype(x.dtype) * y
        shift, scale, gate = made[3:]
        y = modulate(self.normed(x, "mlp_norm"), shift, scale)
        y = self.branch(self.mlp(y, train=train), "mlp", **options)
        return constrain(x + gate.astype(x.dtype) * y, "BTD")

    def normed(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        """A norm of the block's own kind."""
        own = self.mlp_epsilon if name == "mlp_norm" else None
        return self.norm(epsilon=self.epsilon if own is None else own, name=name)(x)


class AdaCrossBlock(AdaBlock):
    """An `AdaBlock` that looks at a `context` `[B, S, Z]` too, between attention and MLP.

    The condition makes shift, scale and gate of that as well, in the middle, so that this
    block is the identity at first too. `context_mask` says which of it a token sees. Latent
    diffusion's cross-attention (Rombach et al. 2022, arXiv 2112.10752) in a transformer, as
    in PixArt (2310.00426), where it has no norm and no gate.
    """

    cross: nn.Module | None = None  # Attention; required.

    @nn.compact
    def __call__(
        self,
        x,
        *,
        condition: Float[Array, "#B #T C"],
        context: Float[Array, "B S Z"],
        context_mask: Mask | None = None,
        train=False,
        drop_path_rate=None,
        **inputs,
    ):
        if self.cross is None:
            raise ValueError(
                "AdaCrossBlock needs cross=Attention(...), which looks at the context"
            )
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        made = Modulation(9, x.shape[-1], name="modulation")(condition)
        for i, name in enumerate(("attention", "cross", "mlp")):
            shift, scale, gate = made[3 * i : 3 * i + 3]
            y = modulate(self.normed(x, f"{name}_norm"), shift, scale)
            if name == "attention":
                y = self.attention(y, **inputs)
            elif name == "cross":
                y = self.cross(y, context, mask=context_mask)
            else:
                y = self.mlp(y, train=train)
            x += gate.astype(x.dtype) * self.branch(y, name, **options)
        return constrain(x, "BTD")
