"""A trained model that unmasks, as lm-evaluation-harness asks for one: `harness.Harness`.

What is answered as a likelihood is its bound, drawn by count (LLaDA, arXiv 2502.09992):
below the truth, so that choices are compared by their bounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from evaluate.generate import Records
from evaluate.harness import Harness
from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError
from jaxformer.models.mdlm import is_timed, shifted
from jaxformer.objectives.unmask import by_count, nats, special
from jaxformer.samplers.logits import Law
from jaxformer.samplers.unmask import Above, Count, Show, sample

ONE = Above(2.0)  # No chance is: the most probable token, one a step.


class UnmaskHarness(Harness):
    """Bounds and fillings, of a model that sees both ways.

    Args:
      trained: of `decoder.LanguageModel` with `causal=False`, or of a `TimedDecoder`.
      tokenizer: of the model.
      length: the most tokens that the model is given.
      mask_id: the token that says "masked".
      shift: as of `models.mdlm.denoiser`.
      samples: draws of a bound; 128 are LLaDA's.
      show: which tokens are shown in a step, where texts are asked for.
      seed: of all draws.

    Raises:
      InputError: a model of block diffusion; a mask that is no id of the model, or one that
        a text may have; no samples.
    """

    def __init__(
        self,
        trained: Trained,
        tokenizer: Tokenizer,
        length: int,
        *,
        mask_id: int,
        shift: bool = False,
        samples: int = 32,
        show: Show | None = None,
        seed: int = 0,
    ):
        super().__init__(trained, tokenizer, length)
        objective = getattr(trained.objective, "last", trained.objective)
        if getattr(objective, "block", None) is not None:
            raise InputError(
                "a model of block diffusion does not see what this asks of it, all at once; "
                "ask one that learned without a block"
            )
        model: Any = trained.model
        vocab = model.vocab
        free = mask_id >= tokenizer.vocab or special(tokenizer, mask_id)
        if not 0 <= mask_id < vocab or not free:
            raise InputError(
                f"mask_id={mask_id} must be an id of the model, below {vocab}, that no text "
                f"has: a special one of the tokenizer's {tokenizer.vocab}, or beyond them"
            )
        if samples < 1:
            raise InputError(f"samples={samples} must be 1 draw or more")
        self.mask_id, self.shift, self.samples = mask_id, shift, samples
        self.show, self.seed = show, seed

    def _says(self, apply, params, segments) -> Callable[[Array, Array], Array]:
        """The denoiser of rows whose texts are `segments`."""

        # Padding is no part of a text, nor of its share.
        real = jnp.maximum((segments > 0).sum(1), 1) / segments.shape[1]

        def denoise(tokens, share):
            given = {"share": share / real} if is_timed(self.trained.model) else {}
            logits = apply({"params": params}, tokens, segments=segments, **given)
            return shifted(logits) if self.shift else logits

        return denoise

    def _scored(self, records: Sequence[Record]) -> list[tuple[float, bool]]:
        """The bound of what counts in each, and whether it is what is filled in greedily."""
        if not records:
            return []
        numbered = [r | {"number": np.int32(i)} for i, r in enumerate(records)]

        def run(apply, params, batch):
            tokens, hidden = batch["tokens"], batch["answer"] > 0
            denoise = self._says(apply, params, batch["segments"])
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.key(self.seed), batch["number"]
            )

            def draws(row, hidden, key):
                every = (self.samples, len(row))
                rows, hides = (jnp.broadcast_to(x, every) for x in (row, hidden))
                noisy = by_count(rows, key, mask_id=self.mask_id, hidden=hides)
                return noisy.tokens, noisy.weight

            def bound(draw):
                noisy, weight = draw
                share = (weight > 0).mean(1)
                each = nats(denoise(noisy, share), tokens, self.mask_id)
                return jnp.where(weight > 0, each * weight, 0).sum(1)

            # One draw of each record after the other: [samples, B, T].
            noisy = [x.swapaxes(0, 1) for x in jax.vmap(draws)(tokens, hidden, keys)]
            total = jax.lax.map(bound, noisy).mean(0)
            made = sample(
                denoise,
                jnp.where(hidden, self.mask_id, tokens),
                keys,
                mask_id=self.mask_id,
                show=ONE,
                law=Law(temperature=0.0),
            )
            return total, ((made.tokens == tokens) | ~hidden).all(1)

        nats_of, right = self.trained.collect(run, Pipeline(Records(numbered)))
        return list(zip(nats_of.tolist(), right.tolist(), strict=True))

    def _go_on(self, prompts: list[list[int]], steps: int, heat: float) -> list[list[int]]:
        """`steps` ids after each prompt, all masked at first; up to the tokenizer's end."""
        room, end, records = self.length - steps, self.tokenizer.end, []
        for number, prompt in enumerate(prompts):
            ids = [*prompt[-room:], *[self.mask_id] * steps]
            record = self._record(np.asarray(ids), len(ids) - steps)
            records.append(record | {"number": np.int32(number)})
        show = Count(steps) if self.show is None else self.show

        def run(apply, params, batch):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.key(self.seed), batch["number"]
            )
            return sample(
                self._says(apply, params, batch["segments"]),
                batch["tokens"],
                keys,
                mask_id=self.mask_id,
                show=show,
                law=Law(temperature=heat),
                end=end,
            ).tokens

        rows: Any = self.trained.collect(run, Pipeline(Records(records)))
        found = []
        for row, record in zip(rows, records, strict=True):
            ids = row[record["answer"] > 0].tolist()
            found.append(ids[: ids.index(end)] if end in ids else ids)
        return found
