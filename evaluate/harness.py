"""A trained language model as lm-evaluation-harness asks for one.

The harness wants its own class among the bases, and this project does not depend on it:

    class Model(evaluate.harness.Harness, lm_eval.api.model.LM):
        "Ours first."

    lm_eval.simple_evaluate(Model(trained, tokenizer, length), tasks=["arc_easy"])

What is asked and answered is EleutherAI's lm-evaluation-harness, `lm_eval/api/model.py`;
Biderman et al. 2024, arXiv 2405.14782.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluate.generate import Records, generate
from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import windows
from jaxformer.data.sources import Record
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError
from jaxformer.objectives.next_token import following, scores
from jaxformer.samplers.logits import Law


class Harness:
    """Likelihoods and completions of texts. Requests have `args`, as the harness's have.

    Args:
      trained: a model with methods `hidden` and `logits`, see `decoder.LanguageModel`.
      tokenizer: of the model; its begin, or else its end, stands before what has no context.
      length: the most tokens that the model is given.
      chunk: of `NextToken`.
    """

    rank, world_size = 0, 1  # All hosts of a mesh are one model.

    def __init__(
        self, trained: Trained, tokenizer: Tokenizer, length: int, chunk: int | None = 128
    ):
        super().__init__()
        self.trained, self.tokenizer = trained, tokenizer
        self.length, self.chunk = length, chunk
        vocab = getattr(trained.model, "vocab", tokenizer.vocab)
        if tokenizer.vocab > vocab:
            raise InputError(
                f"the tokenizer has ids up to {tokenizer.vocab - 1}, but model.vocab={vocab}; "
                "take the tokenizer that the model was made for"
            )
        marks = [i for i in (tokenizer.begin, tokenizer.end) if i is not None]
        if not marks:
            raise InputError("the tokenizer has neither begin nor end to stand before a text")
        self.prefix = marks[0]

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): nats of the latter, and whether it is greedy.

        Texts are encoded whole, so that a token may not span the two; what is too long
        loses its start.
        """
        records = []
        for context, continuation in (_args(r) for r in requests):
            before, whole = self.tokenizer.encode([context, context + continuation])
            ids = np.concatenate([[self.prefix], whole])[-self.length :]
            count = min(len(whole) - len(before), len(ids) - 1)
            if count < 1:
                raise InputError(f"{continuation!r} adds no token to its context; give more")
            records.append(self._record(ids, len(ids) - count))
        return [(-nats, right) for nats, right in self._scored(records)]

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """Log-likelihood in nats of each whole text, by windows that overlap by half."""
        records, owner = [], []
        asked = [_args(r)[0] for r in requests]
        for number, ids in enumerate(self.tokenizer.encode(asked)):
            ids = np.concatenate([[self.prefix], ids])
            for start, stop, first in windows(0, len(ids), self.length, self.length // 2):
                records.append(self._record(ids[start:stop], first - start))
                owner.append(number)
        nats = np.zeros(len(asked))
        np.add.at(nats, owner, [found for found, _ in self._scored(records)])
        return (-nats).tolist()

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """What follows each (context, options), up to the first text of `until`.

        Options are `until`, `max_gen_toks` (256), `do_sample` and `temperature`.
        """
        asked = [_args(r) for r in requests]
        answers = [""] * len(asked)
        kinds: dict[tuple[int, float], list[int]] = {}
        for number, (_, options) in enumerate(asked):
            steps = min(int(options.get("max_gen_toks", 256)), self.length - 1)
            sampled = options.get("do_sample", False)
            heat = float(options.get("temperature", 1.0)) if sampled else 0.0
            kinds.setdefault((steps, heat), []).append(number)
        for (steps, heat), numbers in kinds.items():
            texts = self.tokenizer.encode([asked[n][0] for n in numbers])
            prompts = [[self.prefix, *ids.tolist()] for ids in texts]
            made = self._go_on(prompts, steps, heat)
            for number, ids in zip(numbers, made, strict=True):
                until = asked[number][1].get("until") or []
                until = [until] if isinstance(until, str) else until
                answers[number] = _cut(self.tokenizer.decode(ids), until)
        return answers

    def _go_on(self, prompts: list[list[int]], steps: int, heat: float) -> list[list[int]]:
        """Up to `steps` ids after each prompt, without the end that closes them."""
        return generate(
            self.trained,
            prompts,
            length=self.length,
            steps=steps,
            law=Law(temperature=heat),
            end=self.tokenizer.end,
        )

    def _record(self, ids: np.ndarray, first: int) -> Record:
        """Ids of which those from `first` on count, padded."""
        at = np.arange(self.length)
        padded = np.zeros(self.length, np.int32)
        padded[: len(ids)] = ids
        real = at < len(ids)
        record = {"tokens": padded, "segments": real, "answer": real & (at >= first)}
        return {name: x.astype(np.int32) for name, x in record.items()}

    def _scored(self, records: Sequence[Record]) -> list[tuple[float, bool]]:
        """Nats of what counts in each, and whether all of it is the first choice."""
        if not records:
            return []

        def run(apply, params, batch):
            x = apply(
                {"params": params},
                batch["tokens"],
                segments=batch["segments"],
                method="hidden",
            )
            targets, weight = following(batch)
            nats, _, right = scores(apply, params, x, targets, self.chunk)
            return (nats * weight).sum(1), (right | (weight == 0)).all(1)

        nats, right = self.trained.collect(run, Pipeline(Records(records)))
        return list(zip(nats.tolist(), right.tolist(), strict=True))


def _args(request: Any) -> tuple:
    return request if isinstance(request, tuple) else request.args


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of several that it holds."""
    found = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(found)] if found else text
