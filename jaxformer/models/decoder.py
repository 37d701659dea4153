"""The decoder: tokens to logits of the next one, by parts that can be swapped.

Sources: GPT-2 (Radford et al. 2019), Llama (arXiv 2302.13971), Mistral (2310.06825), Mixtral
(2401.04088), Qwen 2.5 (2412.15115) and 3 (2505.09388), Gemma 2 (2408.00118) and 3
(2503.19786). `models.decoder_sizes` has them by name.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Chain, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.moe import Experts, Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.text import LearnedPositions, Sinusoids, TokenTable
from jaxformer.ops import intervals
from jaxformer.ops.activation import silu
from jaxformer.ops.mask import Causal, Mask, Segments
from jaxformer.ops.rotary_scaling import Rotary
from jaxformer.sharding import constrain


class LanguageModel(nn.Module):
    """Tokens `[B, T]` to logits `[B, T, V]`, float32, by parts.

    `model.apply({"params": params}, tokens)`. Without a `head` the table of tokens makes
    the logits too. With `segments` `[B, T]` several texts stand in a row, see
    `ops.mask.Segments`; positions then count from 0 in each. `positions` may be given, and
    -1 is no token; with `mutable=["cache"]` they must be, see `layers.cache`. With `causal`
    a token sees those before it and itself, else all of its text.

    Raises:
      ValueError: more tokens than `length`, where it is given.
    """

    table: TokenTable
    stack: nn.Module
    norm: nn.Module | None
    head: nn.Module | None = None
    position: nn.Module | None = None  # (positions) -> [B, T, D], added to the tokens'.
    length: int | None = None
    softcap: float | None = None  # of the logits.
    causal: bool = True
    dropout: float = 0.0

    def setup(self):
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(tokens, **inputs))

    def hidden(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "B T D"]:
        """What the logits are made of: after the last norm. Inputs as of `run`."""
        return self.run(self.table(tokens), **inputs)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of tokens, without their positions: what `run` takes."""
        return self.table(tokens)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        mask: Mask | None = None,
        fresh: bool = False,
        train: bool = False,
        **inputs,
    ) -> Float[Array, "B T D"]:
        """Vectors of tokens, or of what stands in their place, through all layers.

        Args:
          x: as `embed` gives them.
          segments: which text a token is of, 0 for padding; all of one if not given.
          positions: counted from 0 in each text if not given.
          mask: what a token sees in the place of what `causal` says.
          fresh: a cache holds nothing yet: what is in it is not looked at.
          train: draws for dropout, by the random stream "dropout".
          **inputs: of the stack, such as `context` of its `CrossBlock`.
        """
        T = x.shape[1]
        longest = T // 2 if mask is not None and mask.doubled else T
        if self.length is not None and self.length < longest:
            raise ValueError(
                f"{longest} tokens are more than the model's length={self.length}; cut the "
                "text, or scale its rotary positions (ops.rotary_scaling) and set length"
            )
        if positions is None:
            positions = places(segments) if segments is not None else jnp.arange(T)[None]
        if mask is None:
            mask = Causal() if self.causal else None
        if segments is not None:
            own = Segments(segments)
            mask = own if mask is None else mask & own
        if self.position is not None:
            x += self.position(positions).astype(x.dtype)
        x = self.drop(constrain(x, "BTD"), deterministic=not train)
        inputs |= {"mask": mask, "positions": positions, "fresh": fresh, "train": train}
        x = self.stack(x, **inputs)
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of what `hidden` gives, or of any part of it."""
        y = self.table.logits(x) if self.head is None else self.head(x)
        y = constrain(y.astype(jnp.float32), "BTV")
        return y if self.softcap is None else self.softcap * jnp.tanh(y / self.softcap)


def places(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count from 0 in each segment."""
    start, _ = intervals.runs(segments)
    return jnp.arange(segments.shape[1])[None] - start


class Decoder(nn.Module):
    """A language model by its numbers; `parts()` is the same as a `LanguageModel`.

    `model.apply({"params": params}, tokens)` gives logits `[B, T, V]`; further inputs and
    methods are those of `LanguageModel`. `windows` are those of the layers in turn, None
    for all that came before: `(4096, None)` is Gemma 2's. A layer with a window turns by
    `local_rotary`, where it is given.
    """

    vocab: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int | None = None  # None: as many as heads; 1: multi-query.
    head_dim: int | None = None  # None: width / num_heads.
    length: int | None = None
    positions: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    rotary: Rotary = Rotary()
    local_rotary: Rotary | None = None
    windows: tuple[int | None, ...] = (None,)
    block: Callable[..., nn.Module] = Block  # or PostBlock, SandwichBlock.
    norm: Callable[..., nn.Module] = RMSNorm
    epsilon: float = 1e-6
    last_norm: bool = True  # after all layers; a PostBlock needs none.
    activation: Callable[[Array], Array] = silu
    gated: bool = True
    experts: Experts | None = None  # each an MLP of mlp_dim.
    qk_norm: bool = False
    qkv_bias: bool = False
    use_bias: bool = False  # of all other linear layers but the head.
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    final_softcap: float | None = None
    causal: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.model = self.parts()
        nn.share_scope(self, self.model)  # Its parameters are this module's.

    def __call__(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "B T V"]:
        return self.model(tokens, **inputs)

    def hidden(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "B T D"]:
        """See `LanguageModel.hidden`."""
        return self.model.hidden(tokens, **inputs)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """See `LanguageModel.embed`."""
        return self.model.embed(tokens)

    def run(self, x: Float[Array, "B T D"], **inputs) -> Float[Array, "B T D"]:
        """See `LanguageModel.run`."""
        return self.model.run(x, **inputs)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """See `LanguageModel.logits`."""
        return self.model.logits(x)

    def parts(self) -> LanguageModel:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; positions that are unknown, or
            learned without a length.
        """
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}, or give head_dim"
            )
        position = None
        if self.positions == "learned":
            if self.length is None:
                raise ValueError("learned positions are of some length; give length")
            position = LearnedPositions(self.length, self.width, parent=None)
        elif self.positions == "sinusoidal":
            position = Sinusoids(self.width, parent=None)
        elif self.positions not in ("rotary", "alibi", "none"):
            raise ValueError(
                f"positions={self.positions!r} must be one of rotary, learned, sinusoidal, "
                "alibi, none"
            )
        head = None
        if not self.tied:
            head = Einsum("BTD,DV->BTV", {"V": self.vocab}, dtype=self.dtype, parent=None)
        return LanguageModel(
            TokenTable(self.vocab, self.width, self.embed_scale, self.dtype, parent=None),
            self._stack(),
            self.norm(self.epsilon, parent=None) if self.last_norm else None,
            head,
            position,
            self.length,
            self.final_softcap,
            self.causal,
            self.dropout,
            parent=None,
        )

    def _stack(self) -> nn.Module:
        blocks = [self._block(window) for window in self.windows]
        running = (self.remat, self.unroll, self.drop_path)
        if len(blocks) == 1:
            return Stack(blocks[0], self.depth, *running, parent=None)
        rounds, rest = divmod(self.depth, len(blocks))
        stacks = []
        if rounds:
            stacks = [Stack(Chain(tuple(blocks), parent=None), rounds, *running, parent=None)]
        # What is left of a round, layers of one kind together.
        for window, count in _runs(self.windows[:rest]):
            stacks.append(Stack(self._block(window), count, *running, parent=None))
        return stacks[0] if len(stacks) == 1 else Chain(tuple(stacks), parent=None)

    def _block(self, window: int | None) -> nn.Module:
        rotary = self.rotary if window is None else self.local_rotary or self.rotary
        scores = Scores(
            rotary if self.positions == "rotary" else None,
            window,
            self.positions == "alibi",
            self.scale,
            self.softcap,
            self.sinks,
        )
        attention = Attention(
            self.num_heads,
            self.head_dim or self.width // self.num_heads,
            self.num_kv_heads,
            self.norm if self.qk_norm else None,
            self.qkv_bias or self.use_bias,
            out_bias=self.use_bias,
            scores=scores,
            epsilon=self.epsilon,
            dtype=self.dtype,
            parent=None,
        )
        mlp = Mlp(
            self.mlp_dim,
            self.activation,
            self.gated,
            self.use_bias,
            self.dropout,
            self.dtype,
            parent=None,
        )
        if self.experts is not None:
            mlp = Moe(
                self.mlp_dim, self.experts, self.activation, dtype=self.dtype, parent=None
            )
        return self.block(
            attention, mlp, self.norm, self.epsilon, dropout=self.dropout, parent=None
        )


def _runs(windows: tuple[int | None, ...]) -> list[tuple[int | None, int]]:
    """Windows that follow each other and are alike, and how many they are."""
    found: list[tuple[int | None, int]] = []
    for window in windows:
        if found and found[-1][0] == window:
            found[-1] = (window, found[-1][1] + 1)
        else:
            found.append((window, 1))
    return found


def flops(model: Decoder, shape: tuple[int, ...]) -> int:
    """Floating-point operations of one text forward: 2 for each multiply-add.

    `shape` is (T,), its tokens. Counts the products of matrices alone: of experts, those
    that a token is sent to; of attention, what the causal mask and the windows leave.
    """
    (T,) = shape
    D, N = model.width, model.num_heads
    H, K = model.head_dim or D // N, model.num_kv_heads or N
    mlp = D * model.mlp_dim * (3 if model.gated else 2)
    if model.experts is not None:
        mlp = mlp * model.experts.top_k + D * model.experts.count
    total = model.depth * T * (2 * D * H * (N + K) + mlp) + T * D * model.vocab
    for i in range(model.depth):
        window = min(model.windows[i % len(model.windows)] or T, T)
        seen = T * window - window * (window - 1) // 2 if model.causal else T * window
        total += 2 * N * H * seen
    return 2 * total
