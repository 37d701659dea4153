"""Diffusion by a chain of Gaussian steps: DDPM, and what DiT made of it.

Sources: Ho et al. 2020 (arXiv 2006.11239); Nichol and Dhariwal 2021 (2102.09672) for learned
variances; Salimans and Ho 2022 (2202.00512) for v; Hang et al. 2023 (2303.09556) for min-SNR;
the code of facebookresearch/DiT, whose numbers these are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.errors import InputError
from jaxformer.metrics import Mean, Metrics
from jaxformer.objectives.chain import Betas, Chain, LinearBetas, Rows, Steps, chain, take
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.times import times

Kind = Literal["noise", "data", "v"]
Denoise = Callable[[Rows, Float[Array, " B"]], Rows]
LINEAR = LinearBetas()
PIXEL = 1 / 127.5  # between two values of a byte, in [-1, 1].


class Guess(NamedTuple):
    """What a model says of a noisy row: its data, and the log variance of a step if learned."""

    data: Array
    log_variance: Array | None


def weights(table: Chain, kind: Kind, most: float | None) -> np.ndarray:
    """Min-SNR: what the squared error of each step weighs, `[n]`; all 1 if `most` is None.

    `min(SNR, most)` of the error in the data, whatever the model says; 5 in the paper.
    """
    if most is None:
        return np.ones(len(table))
    snr = table.kept / (1 - table.kept)
    return np.minimum(snr, most) / {"noise": snr, "data": 1.0, "v": snr + 1}[kind]


def truth(table: Chain, kind: Kind, x: Rows, noise: Rows, i: Steps) -> Rows:
    """What a model of this kind is to say; v is `sqrt(kept) noise - sqrt(1 - kept) data`."""
    if kind == "v":
        v = take(np.sqrt(table.kept), i, x) * noise
        return v - take(np.sqrt(1 - table.kept), i, x) * x
    return noise if kind == "noise" else x


def guess(table: Chain, kind: Kind, said: Rows, x: Rows, i: Steps) -> Guess:
    """The data by what a model said of `x`; by channels beyond those of `x`, the variance.

    A learned variance lies between that of the posterior, at -1, and beta, at 1, and
    may go beyond; in logarithms.
    """
    C = x.shape[-1]
    mean, more = said[..., :C], said[..., C:]
    if kind == "noise":
        data = table.data_of(mean, x, i)
    elif kind == "v":
        kept, lost = take(np.sqrt(table.kept), i, x), take(np.sqrt(1 - table.kept), i, x)
        data = kept * x - lost * mean
    else:
        data = mean
    if not more.shape[-1]:
        return Guess(data, None)
    share = (more + 1) / 2
    most, least = take(np.log(table.betas), i, x), take(table.log_variance, i, x)
    return Guess(data, share * most + (1 - share) * least)


def bound(table: Chain, guess: Guess, data: Rows, x: Rows, i: Steps) -> Float[Array, " B"]:
    """A step's term of the bound of the likelihood, bits a number, of each row.

    The divergence from the posterior to the model's step, and at step 0 what the data costs
    as bytes in [-1, 1]. The model's variance must be learned.
    """
    assert guess.log_variance is not None
    mean, log_variance = table.posterior(guess.data, x, i), guess.log_variance
    wanted, log_wanted = table.posterior(data, x, i), take(table.log_variance, i, x)
    apart = (wanted - mean) ** 2 * jnp.exp(-log_variance)
    nats = 0.5 * (log_variance - log_wanted - 1 + jnp.exp(log_wanted - log_variance) + apart)
    bytes_ = -_log_likelihood(data, mean, 0.5 * log_variance)
    each = jnp.where(i.reshape(_like(i, x)) == 0, bytes_, nats)
    return each.reshape(len(x), -1).mean(-1) / math.log(2)


def prior(table: Chain, data: Rows) -> Float[Array, " B"]:
    """What the bound costs because the last step is not all noise, bits a number."""
    kept = table.kept[-1]
    nats = 0.5 * (kept * data**2 + (1 - kept) - 1 - math.log(1 - kept))
    return nats.reshape(len(data), -1).mean(-1) / math.log(2)


def _log_likelihood(x: Rows, mean: Rows, log_deviation: Rows) -> Rows:
    """Of the byte that x in [-1, 1] stands for, under a normal law; ends take the tails."""
    inverse, half = jnp.exp(-log_deviation), PIXEL / 2
    logcdf = jax.scipy.stats.norm.logcdf
    low = -jnp.abs(x - mean)  # On the side where differences are exact.
    above, below = logcdf((low + half) * inverse), logcdf((low - half) * inverse)
    between = above + jnp.log(jnp.maximum(-jnp.expm1(below - above), 1e-12))
    first, last = logcdf((x - mean + half) * inverse), logcdf((mean - x + half) * inverse)
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, between))


def _like(i: Steps, x: Rows) -> tuple[int, ...]:
    return (len(i),) + (1,) * (x.ndim - 1)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Denoising of `batch["image"]`, given `batch["label"]` where there are classes.

    The model is called `(x, i / T, label)`, without classes `(x, i / T)`, and says noise,
    data or v. If it says twice as many channels the others are its variance, learned by the
    bound with the mean held; as in DiT the bound's term is added as it is, in bits.
    """

    classes: Classes | None = None
    betas: Betas = LINEAR
    kind: Kind = "noise"
    min_snr: float | None = None

    def __post_init__(self):
        if self.kind not in ("noise", "data", "v"):
            raise InputError(f"kind={self.kind!r} must be one of noise, data, v")
        if self.min_snr is not None and self.min_snr <= 0:
            raise InputError(f"min_snr={self.min_snr} must be above 0; 5 is usual")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that it reads."""
        return ("image",) if self.classes is None else ("image", "label")

    @functools.cached_property
    def chain(self) -> Chain:
        """The tables."""
        return chain(self.betas)

    def arguments(self, image: Array, *label: Array) -> tuple[Array, ...]:
        """What the model is called with, of such a batch."""
        return (image, jnp.zeros(image.shape[0]), *label)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where model, data and objective do not fit."""
        if self.classes is not None:
            self.classes.check(model, pipeline)

    def errors(self, says: Denoise, x: Rows, key: Array) -> dict[str, Float[Array, " B"]]:
        """Of each row, at a step of its own: the squared `error`, and the `bound` in bits.

        Steps are drawn one in each of B parts of the chain.
        """
        table = self.chain
        when, which = jax.random.split(key)
        i = (times(when, x.shape[0]) * len(table)).astype(jnp.int32)
        i = jnp.minimum(i, len(table) - 1)
        x = x.astype(jnp.float32)
        noise = jax.random.normal(which, x.shape)
        at = table.forward(x, i, noise)
        said = says(at, jnp.asarray(table.times, jnp.float32)[i]).astype(jnp.float32)
        C = x.shape[-1]
        error = (said[..., :C] - truth(table, self.kind, x, noise, i)) ** 2
        error = error.reshape(len(x), -1).mean(-1)
        weight = jnp.asarray(weights(table, self.kind, self.min_snr), jnp.float32)[i]
        found = {"error": weight * error}
        if said.shape[-1] > C:
            held = jax.lax.stop_gradient(said[..., :C])
            learned = jnp.concatenate([held, said[..., C:]], -1)
            found["bound"] = bound(table, guess(table, self.kind, learned, at, i), x, at, i)
        return found

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error, and the bound beside it where a variance is learned.

        Args are those of `flow.Flow.loss`.
        """
        key, more = jax.random.split(key)
        image, *label = (batch[name] for name in self.inputs)

        def says(x, t):
            options = {"train": True, "rngs": {"dropout": more}}
            return apply({"params": params}, x, t, *label, **options)

        each = self.errors(says, image, key)
        real = batch.get("weight", jnp.ones(len(image))) > 0
        total = jnp.maximum(real.sum(), 1)
        found = {name: jnp.where(real, e, 0).sum() / total for name, e in each.items()}
        more = found if len(found) > 1 else {}
        return sum(found.values(), jnp.zeros(())), dict(more)

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The same, with all labels given; steps and noise are those of the key."""
        image, *label = (batch[name] for name in self.inputs)
        each = self.errors(lambda x, t: apply({"params": params}, x, t, *label), image, key)
        real = batch.get("weight", jnp.ones(len(image))) > 0
        count = real.sum(dtype=jnp.int32)
        found = {n: Mean(jnp.where(real, e, 0).sum(), count) for n, e in each.items()}
        loss = sum((m.sum for m in found.values()), jnp.zeros(()))
        return {"loss": Mean(loss, count), **(found if len(found) > 1 else {})}

    def guess(self, says: Denoise, table: Chain) -> Callable[[Rows, Int[Array, ""]], Guess]:
        """The data at step i of `table`, see `chain.respaced`: what a sampler follows."""

        def guessed(x, i):
            i = jnp.full(len(x), i)
            said = says(x, jnp.asarray(table.times, jnp.float32)[i])
            return guess(table, self.kind, said, x, i)

        return guessed
