"""`python -m evaluate.speculate CONFIG.py --checkpoint DIR`: tokens a second by guessing ahead.

Goes on from the prompts of the config's task `Completions`, one at a time, without a draft,
with one by look-up, and, with `--draft DIR`, with one by a smaller model: the run of the same
config with the overrides `--small`. All in turns on one machine; text is greedy, so that all
say the same but for rounding.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evaluate.completions import Completions
from evaluate.run import restored
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.program import entry, write_json
from jaxformer.samplers import autoregressive, draft, speculative
from jaxformer.samplers.logits import GREEDY


class Says(NamedTuple):
    """A model with its parameters."""

    model: Any
    params: Any

    def step(self, params: Any) -> Stepper:
        """Its step, with parameters that are an argument of the program."""
        return Stepper(self.model, {"params": params})


def programs(
    large: Says, small: Says | None, length: int, steps: int, ahead: int
) -> dict[str, Callable[..., tuple]]:
    """Name -> `(tokens [1, T], lengths [1]) -> (ids, looks, guesses taken)`, compiled."""
    given = {"steps": steps, "law": GREEDY}

    def plain(own, other, tokens, lengths):
        cache = empty(large.model, {"params": own}, 1, length)
        made = autoregressive.sample(
            large.step(own), cache, tokens, lengths, jax.random.key(0),
            room=slots(cache), **given,
        )  # fmt: skip
        return made.tokens, jnp.full(1, steps), jnp.zeros(1, jnp.int32)

    def guessed(by, own, other, tokens, lengths):
        # What guesses, and what is guessed past the end, is written too.
        cache = empty(large.model, {"params": own}, 1, length + ahead + 1)
        made = speculative.sample(
            large.step(own), cache, by(other), tokens, lengths, jax.random.key(0),
            room=slots(cache), **given,
        )  # fmt: skip
        return made.tokens, made.rounds, made.accepted

    def by_model(other):
        assert small is not None
        cache = empty(small.model, {"params": other}, 1, length + ahead + 1)
        return draft.by_model(small.step(other), cache, ahead=ahead, law=GREEDY)

    found = {
        "no draft": plain,
        "look-up": functools.partial(guessed, lambda _: draft.by_lookup(ahead=ahead)),
    }
    if small is not None:
        found["small model"] = functools.partial(guessed, by_model)
    other = None if small is None else small.params
    return {
        name: functools.partial(jax.jit(run), large.params, other)
        for name, run in found.items()
    }


def measure(
    found: dict[str, Callable[..., tuple]], prompts: Sequence[np.ndarray], steps: int, room: int
) -> list[dict[str, Any]]:
    """A row a program: tokens a look of the model, acceptance, tokens a second."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    cpu = dict.fromkeys(found, 0.0)
    rounds, accepted, alike = (dict.fromkeys(found, 0) for _ in range(3))
    for number in range(-1, len(prompts)):  # The first time is for the compiler.
        ids = prompts[max(number, 0)][-room:]
        asked = jnp.asarray(np.pad(ids, (0, room - len(ids))))[None], jnp.array([len(ids)])
        texts = {}
        for name, run in found.items():
            wall, used = time.perf_counter(), time.process_time()
            texts[name], looks, taken = jax.block_until_ready(run(*asked))
            if number < 0:
                continue
            seconds[name].append(time.perf_counter() - wall)
            cpu[name] += time.process_time() - used
            rounds[name] += int(looks[0])
            accepted[name] += int(taken[0])
            alike[name] += int((texts[name] == texts["no draft"]).all())
    count = len(prompts) * steps
    return [
        {
            "draft": name,
            "tokens_a_look": count / rounds[name],
            "accepted": accepted[name],
            "looks": rounds[name],
            "tokens_per_second": steps / statistics.median(seconds[name]),
            "tokens_per_cpu_second": count / cpu[name],
            "same_text": alike[name],
            "prompts": len(prompts),
        }
        for name in found
    ]


@entry
def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.speculate")
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.depth=8")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    parser.add_argument("--draft", help="the directory of a smaller model's run")
    parser.add_argument("--small", nargs="*", default=[], help="the smaller run's overrides")
    parser.add_argument("--ahead", type=int, default=4, help="tokens to guess a look")
    parser.add_argument("--steps", type=int, default=64, help="tokens to draw")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--json", help="a file for the numbers")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    task: Any = next((t for t in experiment.tasks.values() if isinstance(t, Completions)), None)
    if task is None:
        raise InputError(f"{args.config}: has no task that is Completions; add one")
    _, _, params = restored(experiment, args.checkpoint, None)
    small = None
    if args.draft:
        tiny = load(args.config, args.small)
        small = Says(tiny.model, restored(tiny, args.draft, None)[2])
    openings = task.openings()[: args.prompts]
    ids = task.tokenizer.encode([o.before + o.start for o in openings])
    begin = [] if task.tokenizer.begin is None else [task.tokenizer.begin]
    prompts = [np.concatenate([begin, i]).astype(np.int32) for i in ids]
    found = programs(Says(experiment.model, params), small, task.length, args.steps, args.ahead)
    rows = measure(found, prompts, args.steps, task.length - args.steps)
    for row in rows:
        print(
            f"{row['draft']:<12} {row['tokens_a_look']:.2f} tokens a look  "
            f"{row['tokens_per_second']:.0f} tokens/s (median)  "
            f"{row['tokens_per_cpu_second']:.0f} tokens/CPU s  "
            f"{row['same_text']} of {row['prompts']} texts as without"
        )
    if args.json:
        write_json(args.json, {"ahead": args.ahead, "rows": rows}, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
