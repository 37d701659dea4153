"""Multi-head attention: project, normalise, rotate, attend, project back."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum
from jaxformer.ops.attention import attend, max_logit, weights
from jaxformer.ops.mask import Mask


class Attention(nn.Module):
    """Grouped-query attention of `x` to itself, or to a `context`.

    Parameters are float32 and named after what they make: query, key, value, out.
    Projections run in `dtype`; norms, angles and the softmax run in float32. Where the
    collection "stats" is mutable, it receives `max_logit` `[N]` for QK-clip, without `bias`;
    where "maps" is, it receives `weights` `[B, N, T, S]`, by which values are weighed.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None  # None: as many as query heads.
    qk_norm: Callable[..., nn.Module] | None = None  # RMSNorm or LayerNorm.
    use_bias: bool = False
    key_bias: bool | None = None  # None: as use_bias.
    out_bias: bool | None = None  # None: as use_bias.
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
            q_norm = self.qk_norm(letters="H", name="query_norm").weights(H)
            k_norm = self.qk_norm(letters="H", name="key_norm").weights(H)
            norm = (q_norm, k_norm)
        # Both are attention's to apply: a kernel does so on the way.
        before = {"norm": norm, "angles": angles}
        if self.is_mutable_collection("stats") and not self.is_initializing():
            self.sow("stats", "max_logit", max_logit(q, k, mask=mask, **before))
        if self.is_mutable_collection("maps") and not self.is_initializing():
            self.sow("maps", "weights", weights(q, k, mask=mask, bias=bias, **before))

        y = attend(q, k, v, mask=mask, bias=bias, **before)
        return project("out", "BTNH,NHD->BTD", D=D)(y)
