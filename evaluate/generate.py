"""Texts that go on from prompts, by a trained language model on its mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record
from jaxformer.errors import InputError
from jaxformer.layers.cache import Stepper, empty
from jaxformer.samplers.autoregressive import sample
from jaxformer.samplers.logits import PLAIN, Law


@dataclass(frozen=True)
class Records:
    """Records at hand as a source."""

    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def generate(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    steps: int,
    law: Law = PLAIN,
    end: int | None = None,
    seed: int = 0,
    beside: Sequence[Record] | None = None,
) -> list[list[int]]:
    """Up to `steps` ids after each prompt, without the `end` that closes them.

    `beside` are arrays that the model is given with each prompt, such as `{"images": ...}`;
    then no prompt is cut.

    A prompt is cut at its start to the last `length - steps` ids, so that all of it and what
    follows go into a cache of `length`. The draw for prompt i depends on `seed` and i alone.

    Raises:
      InputError: no room for a prompt, an empty one, or an id that the model has no row for.
    """
    room = length - steps
    if room < 1:
        raise InputError(f"steps={steps} leave no room for a prompt in length={length}")
    if not prompts:
        return []
    records = []
    vocab = getattr(trained.model, "vocab", None)
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int32)[-room:]
        if vocab is not None and (ids >= vocab).any():
            raise InputError(
                f"prompt {number} has id {ids.max()}, beyond model.vocab={vocab}; take the "
                "tokenizer that the model was made for"
            )
        if not len(ids):
            raise InputError(
                f"prompt {number} has no token; begin it with the tokenizer's begin"
            )
        if beside is not None and len(ids) < len(prompt):
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and length={length} leaves {room}; "
                "make the length greater"
            )
        record = {"tokens": np.pad(ids, (0, room - len(ids))), "lengths": np.int32(len(ids))}
        more = {} if beside is None else beside[number]
        records.append(record | {"number": np.int32(number)} | more)
    model: Any = trained.model
    given = () if beside is None else tuple(beside[0])

    def run(apply, params, batch):
        variables = {"params": params}
        # What fills up the last batch is a prompt of one token.
        lengths = batch["lengths"].clip(1)
        beside = {name: batch[name] for name in given}
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch["number"])
        made = sample(
            Stepper.prompted(model, variables, batch["tokens"], lengths, beside),
            empty(model, variables, len(batch["tokens"]), length),
            batch["tokens"],
            lengths,
            keys,
            steps=steps,
            room=length,
            law=law,
            stop=() if end is None else ((end,),),
        )
        return made.tokens, made.lengths - made.ended

    tokens, lengths = trained.collect(run, Pipeline(Records(records)))
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [ids[:count] for ids, count in pairs]
