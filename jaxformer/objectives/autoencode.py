"""Autoencoding: images again, from latents of a law that stays normal, or from codes.

Sources: van den Oord et al. 2017 (arXiv 1711.00937, VQ-VAE), Esser et al. 2021 (2012.09841,
VQ-GAN), Rombach et al. 2022 (2112.10752, the KL autoencoder).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.errors import InputError
from jaxformer.metrics import Mean, Metrics, Use

Images = Float[Array, "B Y X C"]


def difference(a: Float[Array, "B ..."], b: Float[Array, "B ..."], power: int):
    """The mean of `|a - b| ** power` of each row, `[B]`, float32."""
    error = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)) ** power
    return error.reshape(len(error), -1).mean(-1)


def divergence(
    mean: Float[Array, "B ..."], log_variance: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """How far normal laws are from the standard one: nats, a sum over each row's numbers."""
    each = (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance) / 2
    return each.reshape(len(each), -1).sum(-1)


def commitment(
    given: Float[Array, "B y x C"], chosen: Float[Array, "B y x C"], beta: float
) -> Float[Array, " B"]:
    """Moves codes to what they stand for, and that, `beta` times as strongly, to its codes.

    diffusers' `VQModel` and taming-transformers by default have the two the other way
    round, a slip that they keep; this is the paper's.
    """
    stop = jax.lax.stop_gradient
    return difference(chosen, stop(given), 2) + beta * difference(given, stop(chosen), 2)


def uses(ids: Int[Array, "B y x"], size: int, weight: Float[Array, " B"] | None = None) -> Use:
    """How often each code of a table of `size` is used."""
    rows = jnp.ones(len(ids), jnp.int32) if weight is None else (weight > 0).astype(jnp.int32)
    each = jnp.broadcast_to(rows[:, None, None], ids.shape)
    counts = jnp.zeros(size, jnp.int32).at[ids].add(each)
    return Use(counts, counts.sum())


def likeness(
    features: Callable[[Images], Float[Array, "B ..."]], a: Images, b: Images
) -> Float[Array, " B"]:
    """How unlike an encoder finds two images: of features of length 1, the squared distance.

    LPIPS (Zhang et al. 2018, arXiv 1801.03924) without learned weights; the encoder may be
    any: `lambda x: vit.apply({"params": params}, x, method="encode")`.
    """

    def unit(x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-10)

    return _mean_sum((unit(features(a)) - unit(features(b))) ** 2)


def _mean_sum(each: Float[Array, "B ... C"]) -> Float[Array, " B"]:
    """The sum over the last axis, and the mean over all others but the first."""
    return each.sum(-1).reshape(len(each), -1).mean(-1)


def hinge(real: Float[Array, "B ..."], made: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """What a critic loses: real images should be over 1, and made ones under -1."""
    found = (jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + made)) / 2
    return found.reshape(len(found), -1).mean(-1)


@dataclasses.dataclass(frozen=True)
class Autoencode:
    """Images of `batch["image"]` again: an autoencoder of latents or of codes, by its kind.

    `kl` is what a nat of the latents' law counts, `codes` what the distance of codes does,
    `beta` see `commitment`. With `perceptual`, `features` (images) -> `[B, ..., C]` says
    what is alike, see `likeness`. With `adversarial` the model is a `models.vae.Judged`,
    whose critic learns in the same step: it from images made, which it cannot change, and
    the autoencoder from its judgement, without changing it. With `adaptive`, VQ-GAN's way,
    its weight is multiplied by how much longer, in the decoder's last kernel, the gradient of
    pixels and likeness is than that of the judgement: `balance`, at most 10,000.
    """

    power: Literal[1, 2] = 2
    kl: float = 1e-6
    codes: float = 1.0
    beta: float = 0.25
    perceptual: float = 0.0
    features: Callable[[Images], Any] | None = None
    adversarial: float = 0.0
    adaptive: bool = False
    inputs: tuple[str, ...] = ("image",)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where the model cannot be judged, or nobody says what is alike."""
        if self.adversarial and not hasattr(model, "judge"):
            raise InputError(
                f"objective.adversarial={self.adversarial} needs a critic; make the model a "
                "models.vae.Judged"
            )
        if self.perceptual and self.features is None:
            raise InputError(
                f"objective.perceptual={self.perceptual} needs features=, an encoder of images"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean of all terms over the batch, and each of them beside it.

        Args:
          apply: `model.apply`: `({"params": params}, image)` -> images and `Codes`, or
            `({"params": params}, image, key)` -> images and a `Gaussian`.
          params: the model's parameters.
          batch: `image` `[B, Y, X, C]`, optionally `weight` `[B]`.
          key: for the draw of latents.
        """
        image = batch["image"]
        made, _, terms = self._terms(apply, params, image, key)
        scales: dict[str, Any] = {"error": 1.0, "divergence": self.kl, "commitment": self.codes}
        if self.perceptual and self.features is not None:
            terms["likeness"] = likeness(self.features, made, image)
            scales["likeness"] = self.perceptual
        if self.adversarial:

            def judge(params, x):
                return apply({"params": params}, x, method="judge")

            stop = jax.lax.stop_gradient
            fooled = judge(stop(params), made)
            terms["fooled"] = -fooled.reshape(len(fooled), -1).mean(-1)
            terms["critic"] = hinge(judge(params, image), judge(params, stop(made)))
            scales |= {"fooled": self.adversarial, "critic": 1.0}
        weight = batch.get("weight", jnp.ones(len(image)))
        means = {
            name: jnp.where(weight > 0, each * weight, 0).sum() / jnp.maximum(weight.sum(), 1)
            for name, each in terms.items()
        }
        told = {}
        if self.adversarial and self.adaptive:
            told["balance"] = self._balance(apply, params, batch, key)
            scales["fooled"] *= told["balance"]
        total = jnp.sum(jnp.stack([scales[name] * mean for name, mean in means.items()]))
        return total, means | told

    def _balance(self, apply, params, batch, key) -> Float[Array, ""]:
        """The length of one gradient of the last kernel by that of the other."""
        image, own = batch["image"], params["autoencoder"]
        weight = batch.get("weight", jnp.ones(len(image)))

        def mean(each):
            return jnp.where(weight > 0, each * weight, 0).sum() / jnp.maximum(weight.sum(), 1)

        def both(kernel):
            end = own["decoder"]["end"] | {"kernel": kernel}
            changed = own | {"decoder": own["decoder"] | {"end": end}}
            made, _, terms = self._terms(apply, params | {"autoencoder": changed}, image, key)
            pixels = mean(terms["error"])
            if self.perceptual and self.features is not None:
                pixels += self.perceptual * mean(likeness(self.features, made, image))
            judged = apply({"params": params}, made, method="judge")
            return pixels, -mean(judged.reshape(len(judged), -1).mean(-1))

        _, back = jax.vjp(both, own["decoder"]["end"]["kernel"])
        lengths = [jnp.linalg.norm(back(one)[0].ravel()) for one in ((1.0, 0.0), (0.0, 1.0))]
        return jax.lax.stop_gradient(jnp.clip(lengths[0] / (lengths[1] + 1e-4), 0.0, 1e4))

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The squared error a pixel, and the divergence or the codes that are in use."""
        image = batch["image"]
        weight = batch.get("weight", jnp.ones(len(image)))
        made, kept, terms = self._terms(apply, params, image, None)
        terms["error"] = difference(made, image, 2)
        count = (weight > 0).sum(dtype=jnp.int32)
        found: Metrics = {
            name: Mean(jnp.where(weight > 0, each, 0).sum(), count)
            for name, each in terms.items()
        }
        size = _codes(params)
        if size is not None:
            found["codes"] = uses(kept.ids, size, weight)
        return found

    def _terms(self, apply, params, image, key) -> tuple[Array, Any, dict[str, Array]]:
        by_codes = _codes(params) is not None
        made, kept = apply({"params": params}, image, *(() if by_codes else (key,)))
        terms = {"error": difference(made, image, self.power)}
        if by_codes:
            terms["commitment"] = commitment(kept.given, kept.chosen, self.beta)
        else:
            terms["divergence"] = divergence(kept.mean, kept.log_variance)
        return made, kept, terms


def _codes(params: Any) -> int | None:
    """How many codes a model has; None without any."""
    own = params.get("autoencoder", params)
    return len(own["codebook"]["embedding"]) if "codebook" in own else None
