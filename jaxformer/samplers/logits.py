"""Laws of the next token: what is made of a model's logits before one draws.

Each function takes logits `[*B, V]` to logits `[*B, V]`, -inf where a token is ruled out.
`Law` applies them one after the other.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.errors import InputError
from jaxformer.ops.draw import draw

Logits = Float[Array, "*B V"]


def top_k(logits: Logits, k: int) -> Logits:
    """Leaves the `k` greatest, and what ties with the last of them.

    Source: Fan et al. 2018, arXiv 1805.04833.
    """
    if k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Leaves the fewest tokens whose probabilities sum to `p`, and ties with the last.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    falling = -jnp.sort(-logits, -1)
    mass = jax.nn.softmax(falling, -1)
    before = jnp.cumsum(mass, -1) - mass
    least = jnp.where(before < p, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def min_p(logits: Logits, p: float) -> Logits:
    """Leaves tokens at least `p` times as probable as the most probable one.

    Source: Nguyen et al. 2024, arXiv 2407.01082.
    """
    least = logits.max(-1, keepdims=True) + math.log(p)
    return jnp.where(logits >= least, logits, -jnp.inf)


def penalize(logits: Logits, seen: Bool[Array, "*B V"], penalty: float) -> Logits:
    """Positive logits of tokens already seen divided by `penalty`, negative ones times it.

    Source: Keskar et al. 2019 (CTRL), arXiv 1909.05858.
    """
    less = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, less, logits)


def greedy(logits: Logits) -> Logits:
    """0 for the greatest, the first of those that tie, and -inf for all others."""
    first = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    return jnp.where(first, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Law:
    """What the next token is drawn from: the parts in the order in which they stand.

    Raises:
      InputError: a number outside of what it may be.

    Example:
      >>> law = Law(temperature=0.7, top_p=0.9)
      >>> law.logits(jnp.array([0.0, 5.0])).tolist()[0]
      -inf
    """

    repetition: float = 1.0  # The penalty; 1 is none. It looks at the prompt too.
    temperature: float = 1.0  # What logits are divided by; 0 is greedy.
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        rules = {
            "repetition": ("above 0; 1 is no penalty", self.repetition > 0),
            "temperature": ("0 (greedy) or above", self.temperature >= 0),
            "top_k": ("at least 1, or None", self.top_k is None or self.top_k >= 1),
            "top_p": ("above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
            "min_p": ("above 0 and at most 1", self.min_p is None or 0 < self.min_p <= 1),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise InputError(f"{name}={getattr(self, name)} must be {rule}")

    @property
    def looks_back(self) -> bool:
        """True where it needs to know which tokens were seen."""
        return self.repetition != 1

    def logits(self, logits: Logits, seen: Bool[Array, "*B V"] | None = None) -> Logits:
        """Logits of the law, float32; `seen` says which tokens stand in the text so far."""
        x = logits.astype(jnp.float32)
        if self.looks_back and seen is not None:
            x = penalize(x, seen, self.repetition)
        if self.temperature == 0:
            return greedy(x)
        x = x if self.temperature == 1 else x / self.temperature
        x = x if self.top_k is None else top_k(x, self.top_k)
        x = x if self.top_p is None else top_p(x, self.top_p)
        return x if self.min_p is None else min_p(x, self.min_p)

    def draw(self, keys: Array, logits: Float[Array, "B V"], seen=None) -> Int[Array, " B"]:
        """A token of each row, by a key for each row `[B]`; greedy needs no luck."""
        found = self.logits(logits, seen)
        if self.temperature == 0:
            return found.argmax(-1).astype(jnp.int32)
        return jax.vmap(draw)(keys, found)


PLAIN = Law()  # The model's own.
GREEDY = Law(temperature=0.0)
