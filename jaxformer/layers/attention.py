"""Multi-head attention: project, normalise, rotate, attend, project back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.cache import KV, join
from jaxformer.layers.einsum import Einsum
from jaxformer.ops.alibi import Alibi, alibi_slopes
from jaxformer.ops.attention import attend, attend_lse, max_logit, weights
from jaxformer.ops.mask import Mask, Window
from jaxformer.ops.rotary import rotate
from jaxformer.ops.rotary_scaling import Rotary
from jaxformer.sharding import partitioned


@dataclasses.dataclass(frozen=True)
class Scores:
    """How the tokens of a text look at each other: by position, how far, how sharply.

    `rotary` turns queries and keys by their positions; `window` is how many tokens a
    query sees, itself and those before it (and as many after it, where the mask lets it);
    `alibi` makes logits lose with distance, by the slopes of its paper. `scale` is the
    factor of the products (None: `H ** -0.5`) and `softcap` their bound. With `sinks` each
    head learns the logit of a key that is nothing (gpt-oss, arXiv 2508.10925).
    """

    rotary: Rotary | None = None
    window: int | None = None
    alibi: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False


class Sink(nn.Module):
    """Takes of each head's attention what a key of the learned logit takes, a zero value."""

    @nn.compact
    def __call__(
        self, y: Float[Array, "B T N H"], lse: Float[Array, "B N T"]
    ) -> Float[Array, "B T N H"]:
        init = partitioned(nn.initializers.zeros, "N")
        logits = self.param("bias", init, (y.shape[2],))
        left = nn.sigmoid(lse - logits[None, :, None]).swapaxes(1, 2)[..., None]
        return y * left.astype(y.dtype)


class Attention(nn.Module):
    """Grouped-query attention of `x` to itself, or to a `context`.

    Parameters are float32 and named after what they make: query, key, value, out.
    Projections run in `dtype`; norms, angles and the softmax run in float32. Where the
    collection "stats" is mutable, it receives `max_logit` `[N]` for QK-clip, without `bias`;
    where "maps" is, it receives `weights` `[B, N, T, S]`, by which values are weighed.

    Self-attention by `positions` keeps what it sees in the collection "cache" where that is
    mutable, and looks at what it finds there: see `layers.cache`. With `fresh` it finds
    nothing, whatever is there, and `mask` holds as without a cache. A collection "prefix"
    is looked at too, and not written. What is cached goes by position alone: each token
    sees those of its row before it. A rotary with sections turns by `places` where those
    are given: the frame, row and column of each token, see `ops.mrope`.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None  # None: as many as query heads.
    qk_norm: Callable[..., nn.Module] | None = None  # RMSNorm or LayerNorm.
    use_bias: bool = False
    key_bias: bool | None = None  # None: as use_bias.
    out_bias: bool | None = None  # None: as use_bias.
    scores: Scores = Scores()
    epsilon: float = 1e-6  # of the norms of queries and keys.
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S C"] | None = None,
        *,
        mask: Mask | None = None,
        bias: Float[Array, "#B #N T S"] | None = None,
        angles: Float[Array, "#B T h"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        places: Int[Array, "#B T 3"] | None = None,
        fresh: bool = False,
    ) -> Float[Array, "B T D"]:
        D, N, H = x.shape[-1], self.num_heads, self.head_dim
        K = self.num_kv_heads or N
        if N % K:
            raise ValueError(f"num_heads={N} must be a multiple of num_kv_heads={K}")
        if context is not None and angles is not None:
            raise ValueError("angles rotate self-attention only; context has none")
        context = x if context is None else context

        own = {"key": self.key_bias, "out": self.out_bias}

        def project(name: str, equation: str, **sizes: int) -> Einsum:
            bias = own.get(name)
            bias = self.use_bias if bias is None else bias
            return Einsum(equation, sizes, bias, self.dtype, name=name)

        q = project("query", "BTD,DNH->BTNH", N=N, H=H)(x)
        k = project("key", "BTD,DKH->BTKH", K=K, H=H)(context)
        v = project("value", "BTD,DKH->BTKH", K=K, H=H)(context)
        norm = None
        if self.qk_norm is not None:
            alike: dict[str, Any] = {"epsilon": self.epsilon, "letters": "H"}
            q_norm = self.qk_norm(**alike, name="query_norm").weights(H)
            k_norm = self.qk_norm(**alike, name="key_norm").weights(H)
            norm = (q_norm, k_norm)
        # Both are attention's to apply: a kernel does so on the way.
        how: dict[str, Any] = {"norm": norm, "angles": self._angles(angles, positions, places)}
        how["scale"], mask = self._scale(), self._masked(mask)
        if self.is_mutable_collection("stats") and not self.is_initializing():
            self.sow("stats", "max_logit", max_logit(q, k, mask=mask, **how))
        if self.is_mutable_collection("maps") and not self.is_initializing():
            self.sow("maps", "weights", weights(q, k, mask=mask, bias=bias, **how))

        how["softcap"] = self.scores.softcap
        if positions is None or not self._caches():
            y = self._plain(q, k, v, mask, bias, how)
        else:
            y = self._cached(q, k, v, mask, bias, how, positions, fresh)
        return project("out", "BTNH,NHD->BTD", D=D)(y)

    def _angles(self, angles, positions, places):
        rotary, found = self.scores.rotary, None
        if rotary is not None and places is not None:
            found = rotary.angles_at(places, self.head_dim)
        elif rotary is not None and positions is not None:
            found = rotary.angles(positions, self.head_dim)
        if found is not None and angles is not None:
            raise ValueError("angles are given, but the attention has a rotary of its own")
        return angles if found is None else found

    def _scale(self) -> float | None:
        rotary, scale = self.scores.rotary, self.scores.scale
        factor = 1.0 if rotary is None else rotary.factor_of_logits
        if factor == 1:
            return scale
        return (self.head_dim**-0.5 if scale is None else scale) * factor**2

    def _masked(self, mask: Mask | None) -> Mask | None:
        if self.scores.window is None:
            return mask
        near = Window(self.scores.window - 1, self.scores.window - 1)
        return near if mask is None else mask & near

    def _plain(self, q, k, v, mask, bias, how) -> Array:
        if self.scores.alibi and bias is None:
            bias = Alibi(jnp.asarray(alibi_slopes(self.num_heads)))
        how = {"mask": mask, "bias": bias, **how}
        if not self.scores.sinks:
            return attend(q, k, v, **how)
        return Sink(name="sink")(*attend_lse(q, k, v, **how))

    def _caches(self) -> bool:
        mutable = self.is_mutable_collection("cache") and not self.is_initializing()
        return mutable or self.has_variable("prefix", "kv")

    def _cached(self, q, k, v, mask, bias, how, positions, fresh) -> Array:
        """Attention of new tokens to those of the cache and to each other."""
        B, T = q.shape[:2]
        at = jnp.broadcast_to(positions, (B, T))
        k = ready(k, how["norm"] and how["norm"][1], how["angles"])
        q = ready(q, how["norm"] and how["norm"][0], how["angles"])
        how = {"scale": how["scale"], "softcap": how["softcap"]}
        if bias is not None:
            raise ValueError("a cache goes by positions; it takes no bias")
        slopes = alibi_slopes(self.num_heads) if self.scores.alibi else None

        def look(kv: KV) -> tuple[Array, Array]:
            return kv.look(q, at, slopes=slopes, **how)

        new, looks = KV.of(k, v, at, self.scores.window), []
        kept = self.has_variable("cache", "kv")
        if kept:
            stored = self.variable("cache", "kv")
            seen = written = stored.value.write(new)
            if T > 1 and new.window is not None:  # A ring forgets what the first ones see.
                seen = stored.value.beside(new)
            stored.value = written
            if not fresh:
                looks.append(look(seen))
        elif self.is_mutable_collection("cache"):
            self.put_variable("cache", "kv", new)
        if self.has_variable("prefix", "kv"):
            looks.append(look(self.get_variable("prefix", "kv")))
        if not looks or fresh:
            own = None if slopes is None else Alibi(jnp.asarray(slopes))
            looks.append(attend_lse(q, k, v, mask=mask, bias=own, **how))
        elif not kept:
            looks.append(look(new))
        y, lse = join(looks)
        return Sink(name="sink")(y, lse) if self.scores.sinks else y


def ready(x: Float[Array, "B T N H"], norm, angles) -> Float[Array, "B T N H"]:
    """Queries or keys after norm and rotation, as a cache keeps them."""
    x = x if norm is None else norm(x)
    return x if angles is None else rotate(x, angles)
