"""Residual blocks, built from parts, and a scanned stack of them."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum
from jaxformer.layers.norm import LayerNorm
from jaxformer.ops.activation import gelu
from jaxformer.ops.mask import Mask
from jaxformer.ops.primitive import NAMES
from jaxformer.sharding import constrain, partitioned

# What a block keeps for its gradient: everything, nothing, or the products of matrices and
# what attention's gradient needs of its result.
Remat = Literal["none", "full", "dots"]
POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*NAMES),
    ),
}

# What layers may hold or leave behind, each layer its own.
COLLECTIONS = ("params", "stats", "maps", "cache", "prefix", "losses")


class Mlp(nn.Module):
    """Widen, activate, narrow; `gated` multiplies by a second widening (SwiGLU with silu).

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    width: int
    activation: Callable[[Array], Array] = gelu
    gated: bool = False
    use_bias: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool = False):
        def widen(name: str) -> Array:
            sizes = {"F": self.width}
            return Einsum("BTD,DF->BTF", sizes, self.use_bias, self.dtype, name=name)(x)

        h = self.activation(widen("gate")) * widen("up") if self.gated else None
        h = self.activation(widen("up")) if h is None else h
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        sizes = {"D": x.shape[-1]}
        return Einsum("BTF,FD->BTD", sizes, self.use_bias, self.dtype, name="down")(h)


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch. Source: Touvron et al. 2021."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = partitioned(nn.initializers.constant(self.initial), "D")
        scale = self.param("scale", init, x.shape[-1:])
        return x * scale.astype(x.dtype)[None, None]


def drop_path(x: Float[Array, "B T D"], rate, key: Array) -> Float[Array, "B T D"]:
    """Drops whole examples of a branch at `rate`. Source: Huang et al. 2016."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


class Block(nn.Module):
    """Pre-norm residual block: takes its parts, not its parts' options."""

    attention: nn.Module
    mlp: nn.Module
    norm: Callable[..., nn.Module] = LayerNorm
    epsilon: float = 1e-6  # of the norms.
    layer_scale: float | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        train: bool = False,
        drop_path_rate: float | Float[Array, ""] | None = None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        y = self.attention(self.normed(x, "attention_norm"), **inputs)
        x += self.branch(y, "attention", **options)
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        return constrain(x + self.branch(y, "mlp", **options), "BTD")

    def normed(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        """A norm of the block's own kind."""
        return self.norm(epsilon=self.epsilon, name=name)(x)

    def branch(self, y, name: str, *, train: bool, drop_path_rate) -> Float[Array, "B T D"]:
        """What a branch gives, as it is added: scaled, or dropped in training."""
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name=f"{name}_scale")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        if train and drop_path_rate is not None:
            y = drop_path(y, drop_path_rate, self.make_rng("dropout"))
        return y


class PostBlock(Block):
    """Post-norm: the sum is normalised. Source: Vaswani et al. 2017, arXiv 1706.03762."""

    @nn.compact
    def __call__(self, x, *, train=False, drop_path_rate=None, **inputs):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        y = self.branch(self.attention(x, **inputs), "attention", **options)
        x = self.normed(x + y, "attention_norm")
        y = self.branch(self.mlp(x, train=train), "mlp", **options)
        return constrain(self.normed(x + y, "mlp_norm"), "BTD")


class SandwichBlock(Block):
    """Norms before and after each branch. Source: Gemma 2, arXiv 2408.00118."""

    @nn.compact
    def __call__(self, x, *, train=False, drop_path_rate=None, **inputs):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        y = self.attention(self.normed(x, "attention_norm"), **inputs)
        x += self.branch(self.normed(y, "attention_post_norm"), "attention", **options)
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        y = self.branch(self.normed(y, "mlp_post_norm"), "mlp", **options)
        return constrain(x + y, "BTD")


class CrossBlock(Block):
    """A block that looks at a `context` `[B, S, C]` too, between attention and MLP: the
    decoder of an encoder-decoder. `context_mask` says which of it a token sees.

    Source: Vaswani et al. 2017, arXiv 1706.03762; pre-norm as in T5 and Whisper.
    """

    cross: nn.Module | None = None  # Attention; required.

    @nn.compact
    def __call__(
        self,
        x,
        *,
        context: Float[Array, "B S C"],
        context_mask: Mask | None = None,
        train=False,
        drop_path_rate=None,
        **inputs,
    ):
        if self.cross is None:
            raise ValueError(
                "CrossBlock needs cross=Attention(...), which looks at the context"
            )
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        y = self.attention(self.normed(x, "attention_norm"), **inputs)
        x += self.branch(y, "attention", **options)
        y = self.cross(self.normed(x, "cross_norm"), context, mask=context_mask)
        x += self.branch(y, "cross", **options)
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        return constrain(x + self.branch(y, "mlp", **options), "BTD")


class Chain(nn.Module):
    """Blocks, or stacks of them, one after the other.

    `Stack(Chain((local, local, everywhere)), 4)` are twelve layers of which each third is
    `everywhere`; `Chain((Stack(dense, 1), Stack(sparse, 27)))` begins with a dense one.
    """

    parts: tuple[nn.Module, ...]

    def __call__(self, x: Float[Array, "B T D"], **inputs) -> Float[Array, "B S C"]:
        for part in self.parts:
            x = part(x, **inputs)
        return x


class Stack(nn.Module):
    """`depth` copies of one block, compiled once; parameters gain a "layers" axis.

    `remat` trades time for memory. `unroll` lays so many layers in a row in the program;
    the parameters stay as they are. `drop_path` is the last layer's rate, the first's
    is 0; or what each layer is given, one after the other.
    """

    block: nn.Module
    depth: int
    remat: Remat = "none"
    unroll: int = 1
    drop_path: float | tuple[Any, ...] = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, train: bool = False, **inputs
    ) -> Float[Array, "B T D"]:
        rates = self.drop_path
        if isinstance(rates, int | float):
            rates = np.linspace(0, rates, self.depth)
        drops = train and bool(np.any(rates))

        def body(block: nn.Module, x: Array, rate: Array | None) -> tuple[Array, None]:
            rate = rate if drops else None
            return block(x, train=train, drop_path_rate=rate, **inputs), None

        if self.remat not in ("none", *POLICIES):
            raise ValueError(f"remat={self.remat!r} must be one of none, full, dots")
        if self.remat != "none":
            body = nn.remat(body, prevent_cse=False, policy=POLICIES[self.remat])
        layers = nn.scan(
            body,
            variable_axes=dict.fromkeys(COLLECTIONS, 0),
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.block, x, jnp.asarray(rates, jnp.float32))[0]
