"""From an image's tokens to those that a language model reads: connectors, and the splice.

A connector is called with tokens `[B, t, C]` of one image a row and gives `[B, s, D]`.
`block.Chain((Merge(2), Project(D, D)))` makes one of several.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxformer.layers.block import Block
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm
from jaxformer.ops.activation import gelu
from jaxformer.ops.attention import attend
from jaxformer.ops.patches import sincos_2d
from jaxformer.ops.resize import resize


class Project(nn.Module):
    """To vectors of `width`: one linear layer, or with `hidden` an MLP of one hidden layer.

    Source: Liu et al. 2023 (LLaVA, arXiv 2304.08485; the MLP 2310.03744).
    """

    width: int
    hidden: int | None = None
    activation: Callable[[Array], Array] = gelu
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B t C"]) -> Float[Array, "B t D"]:
        bias = self.use_bias
        if self.hidden is not None:
            sizes = {"F": self.hidden}
            x = Einsum("BTC,CF->BTF", sizes, bias, self.dtype, name="up")(x)
            x = self.activation(x)
            return Einsum("BTF,FD->BTD", {"D": self.width}, bias, self.dtype, name="down")(x)
        return Einsum("BTC,CD->BTD", {"D": self.width}, bias, self.dtype, name="out")(x)


class Merge(nn.Module):
    """Each `side` by `side` neighbours as one token of `side * side` times the channels.

    Pixel shuffle (InternVL, Idefics 3) and 2 x 2 merging (Qwen2-VL): of a group, the
    channels of its first row come first. Tokens are those of a grid of `shape`, (rows,
    columns), row by row; of a square where it is not given. `side` may be (rows, columns).
    """

    side: int | tuple[int, int] = 2
    shape: tuple[int, int] | None = None

    def __call__(self, x: Float[Array, "B t C"]) -> Float[Array, "B s E"]:
        groups = _groups(x, self.side, self.shape)
        return groups.swapaxes(2, 3).reshape(len(x), groups.shape[1] * groups.shape[3], -1)


class Pool(nn.Module):
    """The mean of each `side` by `side` neighbours (Gemma 3); `shape` as of `Merge`."""

    side: int | tuple[int, int] = 2
    shape: tuple[int, int] | None = None

    def __call__(self, x: Float[Array, "B t C"]) -> Float[Array, "B s C"]:
        return _groups(x, self.side, self.shape).mean((2, 4)).reshape(len(x), -1, x.shape[-1])


def _groups(x, side, shape: tuple[int, int] | None) -> Float[Array, "B y p x q C"]:
    B, t, C = x.shape
    p, q = side if isinstance(side, tuple) else (side, side)
    rows, columns = shape or (round(t**0.5),) * 2
    if rows * columns != t:
        raise ValueError(
            f"{t} tokens are no grid of {rows} x {columns}; give shape=(rows, columns), and "
            "leave out tokens that are not patches"
        )
    if rows % p or columns % q:
        raise ValueError(f"side={side} must divide the grid's {rows} x {columns} patches")
    return x.reshape(B, rows // p, p, columns // q, q, C)


class ResamplerBlock(Block):
    """Latents that look at an image's tokens and at themselves, then an MLP.

    Source: Alayrac et al. 2022 (Flamingo, arXiv 2204.14198). `attention` is the attention
    of the latents to both, `mlp` the MLP.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B s C"],
        *,
        context: Float[Array, "B t C"],
        train: bool = False,
        drop_path_rate=None,
        **inputs,
    ):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        latents = self.normed(x, "attention_norm")
        seen = [self.normed(context, "context_norm"), latents]
        y = self.attention(latents, jnp.concatenate(seen, 1), **inputs)
        x += self.branch(y, "attention", **options)
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        return x + self.branch(y, "mlp", **options)


class Resampler(nn.Module):
    """`count` learned latents that gather what an image's tokens say, by a `stack`.

    The stack is of `ResamplerBlock`s; then a norm, and `out` takes the latents to the
    width of the language model, where that is another.
    """

    count: int
    stack: nn.Module
    out: nn.Module | None = None
    epsilon: float = 1e-5  # of the norm.

    @nn.compact
    def __call__(
        self, x: Float[Array, "B t C"], *, train: bool = False
    ) -> Float[Array, "B s D"]:
        B, _, C = x.shape
        latents = Embedding(C, name="latents")(self.count).astype(x.dtype)
        latents = jnp.broadcast_to(latents, (B, *latents.shape))
        y = self.stack(latents, context=x, train=train)
        y = LayerNorm(self.epsilon, name="norm")(y)
        return y if self.out is None else self.out(y)


class Gather(nn.Module):
    """Learned queries of a square grid look at an image's tokens once: Qwen-VL's connector.

    Sines tell queries and keys, and no values, where they stand: those of the grid of `side`
    by `side` queries, enlarged to that of the tokens, which is square too. Then a norm, and
    `out`, such as `Project(width, use_bias=False)`.

    Source: Bai et al. 2023, arXiv 2308.12966, and its code, the `Resampler` of `visual.py`.
    """

    side: int
    width: int
    num_heads: int
    out: nn.Module | None = None
    epsilon: float = 1e-6  # of the norms.
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B t C"]) -> Float[Array, "B s D"]:
        B, t, _ = x.shape
        D, N, rows = self.width, self.num_heads, round(t**0.5)
        if rows * rows != t:
            raise ValueError(f"{t} tokens are no square; leave out those that are not patches")

        def project(name: str, equation: str, use_bias: bool = True) -> Einsum:
            sizes = {"N": N, "H": D // N} if equation.endswith("NH") else {"D": D}
            return Einsum(equation, sizes, use_bias, self.dtype, name=name)

        x = project("input", "BTC,CD->BTD", use_bias=False)(x)
        x = LayerNorm(self.epsilon, name="context_norm")(x)
        queries = Embedding(D, name="queries")(self.side**2)[None]
        queries = LayerNorm(self.epsilon, name="query_norm")(queries)
        grid = sincos_2d(self.side, self.side, D, endpoint=False)
        places = resize(jnp.asarray(grid).reshape(self.side, self.side, D), (rows, rows))
        q = project("query", "BTD,DNH->BTNH")(queries + grid[None])
        k = project("key", "BTD,DNH->BTNH")(x + places.reshape(1, t, D))
        v = project("value", "BTD,DNH->BTNH")(x)
        y = attend(jnp.broadcast_to(q, (B, *q.shape[1:])), k, v)
        y = LayerNorm(self.epsilon, name="norm")(project("gather", "BTNH,NHD->BTD")(y))
        return y if self.out is None else self.out(y)


def splice(
    x: Float[Array, "B T D"], features: Float[Array, "B s D"], here: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """`x` with the row's features, in order, where `here` says so.

    A place for which there is no feature left becomes NaN, and so does its row: a count
    that does not fit is not trained on in silence.
    """
    count = features.shape[1]
    index = jnp.cumsum(here, 1) - 1
    found = jnp.take_along_axis(features, jnp.clip(index, 0, count - 1)[..., None], 1)
    found = jnp.where((index < count)[..., None], found, jnp.nan)
    return jnp.where(here[..., None], found.astype(x.dtype), x)
