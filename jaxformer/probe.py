"""What frozen features are worth: linear probe, nearest neighbours, zero-shot, retrieval.

Pure functions of arrays. Features are `[N, D]`, one row an example; `weight` is 1 for an
example and 0 for padding. Products run in float32 to the last bit on every device, and
over keys or rows in chunks, so that no table of all against all exists.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jaxformer import metrics

AT = (1, 5, 10)  # where recall is counted.


class Linear(struct.PyTreeNode):
    """A linear classifier of features, and how its fit ended.

    Features are centred on `mean` `[D]` and divided by `std` `[D]` before `kernel`
    `[D, V]` and `bias` `[V]`. `steps` were taken, and the greatest entry of the gradient
    that was left is `gradient`.
    """

    mean: Any
    std: Any
    kernel: Any
    bias: Any
    steps: Any
    gradient: Any

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """The scores of the classes, float32."""
        x = (features.astype(jnp.float32) - self.mean[None]) / self.std[None]
        return _product("BD,DV->BV", x, self.kernel) + self.bias[None]


def fit(
    features: Float[Array, "N D"],
    labels: Int[Array, " N"],
    weight: Float[Array, " N"] | None = None,
    *,
    num_classes: int,
    l2: float = 1e-3,
    steps: int = 200,
    tolerance: float = 1e-5,
    chunk: int = 8192,
) -> Linear:
    """Multinomial logistic regression by L-BFGS over all rows at once.

    Minimises the mean cross-entropy in nats plus `l2 / 2` times the squared norm of the
    kernel, on features scaled to mean 0 and variance 1 (a constant one is left at 0); the
    bias is free. There is one minimum, and no draw: equal features give an equal answer.
    scikit-learn's `LogisticRegression(C=1 / (l2 * N))` is the same. Nocedal and Wright,
    "Numerical optimization", 2006, chapter 7.

    Args:
      features: of the examples to learn from.
      labels: their classes, below `num_classes`.
      weight: 1 for an example, 0 for padding; all 1 if not given.
      num_classes: how many classes there are.
      l2: strength of the penalty.
      steps: L-BFGS ends after so many,
      tolerance: or where no entry of the gradient is greater than this.
      chunk: rows taken at a time; memory holds `[chunk, V]` logits.
    """
    N, D = features.shape
    weight = jnp.ones(N) if weight is None else (weight > 0).astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1)
    x = jnp.where(weight[:, None] > 0, features.astype(jnp.float32), 0)
    mean = x.sum(0) / total
    spread = jnp.where(weight[:, None] > 0, x - mean[None], 0)
    std = jnp.sqrt((spread**2).sum(0) / total)
    std = jnp.where(std > 1e-6 * jnp.abs(mean), std, jnp.inf)  # constant: divides to 0.
    zeros = Linear(mean, std, jnp.zeros((D, num_classes)), jnp.zeros(num_classes), 0, 0.0)
    rows = jax.tree.map(lambda a: _chunks(a, chunk), (x, labels, weight))

    def value(theta):
        model = zeros.replace(kernel=theta[0], bias=theta[1])

        @jax.checkpoint
        def add(loss, part):
            x, labels, weight = part
            targets = jax.nn.one_hot(labels, num_classes)
            nll = metrics.cross_entropy(model.logits(x), targets)
            return loss + jnp.where(weight > 0, nll, 0).sum(), None

        loss, _ = jax.lax.scan(add, jnp.zeros(()), rows)
        return loss / total + l2 / 2 * (theta[0] ** 2).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(value)

    def unfinished(carry):
        _, _, step, gradient = carry
        return (step < steps) & (gradient > tolerance)

    def improve(carry):
        theta, state, step, _ = carry
        loss, grad = value_and_grad(theta, state=state)
        updates, state = solver.update(
            grad, state, theta, value=loss, grad=grad, value_fn=value
        )
        theta = optax.apply_updates(theta, updates)
        left = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return theta, state, step + 1, left

    theta = (zeros.kernel, zeros.bias)
    begin = (theta, solver.init(theta), 0, jnp.array(jnp.inf))
    (kernel, bias), _, step, gradient = jax.lax.while_loop(unfinished, improve, begin)
    return Linear(mean, std, kernel, bias, step, gradient)


def unit(features: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Features of length 1 in float32, so that a product is a cosine; 0 stays 0."""
    x = features.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1, norm)


def neighbours(
    queries: Float[Array, "B D"],
    keys: Float[Array, "N D"],
    *,
    k: int,
    chunk: int = 8192,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The `k` keys of the greatest cosine with each query, greatest first, and their rows.

    Of equal ones the first comes first, for any `chunk`. `k` is at most `N`.
    """
    if k > len(keys):
        raise ValueError(f"k={k} neighbours are more than the {len(keys)} keys; lower k")
    queries, B = unit(queries), len(queries)
    parts = _chunks(unit(keys), chunk)
    rows = _chunks(jnp.arange(len(keys)), chunk, fill=-1)

    def merge(best, part):
        keys, rows = part
        cosine = _product("BD,ND->BN", queries, keys)
        cosine = jnp.where(rows[None] < 0, -jnp.inf, cosine)
        cosines = jnp.concatenate([best[0], cosine], axis=1)
        rows = jnp.concatenate([best[1], jnp.broadcast_to(rows, cosine.shape)], axis=1)
        cosine, place = jax.lax.top_k(cosines, k)
        return (cosine, jnp.take_along_axis(rows, place, axis=1)), None

    none = jnp.full((B, k), -jnp.inf), jnp.full((B, k), -1)
    return jax.lax.scan(merge, none, (parts, rows))[0]


def vote(
    queries: Float[Array, "B D"],
    keys: Float[Array, "N D"],
    labels: Int[Array, " N"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 8192,
) -> Float[Array, "B V"]:
    """k-nearest-neighbour scores of the classes, as Caron et al. 2021 (DINO) count them.

    Each of the `k` nearest keys by cosine votes for its label with weight
    `exp(cosine / temperature)` (Wu et al. 2018, arXiv:1805.01978).
    """
    cosine, rows = neighbours(queries, keys, k=k, chunk=chunk)
    ballots = jax.nn.one_hot(labels[rows], num_classes)
    return (jnp.exp(cosine / temperature)[..., None] * ballots).sum(1)


def zero_shot(images: Float[Array, "B E"], texts: Float[Array, "V E"]) -> Float[Array, "B V"]:
    """Cosine of each image with each class's text: Radford et al. 2021 (CLIP)."""
    return _product("BE,VE->BV", unit(images), unit(texts))


def ensemble(texts: Float[Array, "V P E"]) -> Float[Array, "V E"]:
    """One feature for the `P` prompts of a class: the mean of their directions."""
    return unit(unit(texts).mean(1))


def ranks(
    queries: Float[Array, "B E"],
    query_ids: Int[Array, " B"],
    keys: Float[Array, "N E"],
    key_ids: Int[Array, " N"],
    *,
    chunk: int = 8192,
) -> Int[Array, " B"]:
    """How many keys come before the best right one, by cosine; 0 is a hit at the first.

    A key is right where its id is the query's. Wrong keys that tie, or are NaN, come
    before; a query without a right key has rank `N`.
    """
    queries = unit(queries)
    real = _chunks(jnp.ones(len(keys), bool), chunk, fill=False)
    parts = (_chunks(unit(keys), chunk), _chunks(key_ids, chunk), real)

    def cosines(part):
        keys, ids, real = part
        right = query_ids[:, None] == ids[None]
        return _product("BE,NE->BN", queries, keys), right, real[None]

    def find(best, part):
        cosine, right, real = cosines(part)
        return jnp.maximum(best, jnp.where(right & real, cosine, -jnp.inf).max(1)), None

    def count(before, part):
        cosine, right, real = cosines(part)
        return before + (real & ~right & ~(cosine < best[:, None])).sum(1), None

    B, N = len(queries), len(keys)
    best, _ = jax.lax.scan(find, jnp.full(B, -jnp.inf), parts)
    before, _ = jax.lax.scan(count, jnp.zeros(B, jnp.int32), parts)
    return jnp.where(best == -jnp.inf, N, before).astype(jnp.int32)


def recall(rank: Int[Array, " B"], weight: Float[Array, " B"] | None = None) -> metrics.Metrics:
    """`@1`, `@5` and `@10`: how many queries found a right key among so many."""
    return {f"@{k}": metrics.within(rank, k, weight) for k in AT}


def _product(equation: str, a: Array, b: Array) -> Array:
    """A product of matrices whose float32 is float32, on a TPU too."""
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _chunks(x: Array, chunk: int, fill: Any = 0) -> Array:
    """`[N, ...]` as `[N / chunk, chunk, ...]`, filled up at the end."""
    chunk = min(chunk, len(x))
    short = -len(x) % chunk
    x = jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
    return x.reshape(-1, chunk, *x.shape[1:])
