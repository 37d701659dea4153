"""Text by unmasking beside text by the token: how many tokens a second, and how good.

A decoder with its cache, masked diffusion and block diffusion, all of one size and in one
process, in turns, fill `--steps` tokens after prompts of held-out files. Their configs are
`configs/decoder_stdlib.py`, `mdlm_stdlib.py` and `bd3_stdlib.py`; without the checkpoints of
runs their parameters are random, and only steps of a fixed number of tokens mean something.
Each round has prompts of its own, the same for every side. Beside the times stand the shares
of completions that parse, cut to whole lines, and whose first line is the file's own.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evaluate.completions import function, opening, parses
from evaluate.infill import Infill
from evaluate.run import restored
from evaluate.speed.vit import CLOCKS
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.layers import cache as caches
from jaxformer.layers.cache import Stepper
from jaxformer.models.mdlm import Canvas, denoiser
from jaxformer.samplers import autoregressive, blocks, unmask
from jaxformer.samplers.logits import Law
from jaxformer.samplers.unmask import Above, Bound, Count

LAW = Law(temperature=0.5)
BLOCK = 16
CONFIGS = {"decoder": "decoder_stdlib", "masked": "mdlm_stdlib", "blocks": "bd3_stdlib"}


class Prompt(NamedTuple):
    """A function's beginning, what stands before it as tokens, and how the file goes on."""

    start: str
    ids: np.ndarray
    rest: str


class Side(NamedTuple):
    """A model of a config, and the texts that it was not shown."""

    model: Any
    params: Any
    infill: Infill
    tokenizer: Any
    documents: Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--batch", type=int, help="rows, default 4")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt, default 128")
    parser.add_argument("--steps", type=int, help="tokens filled, default 64")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")
    for name, config in CONFIGS.items():
        parser.add_argument(f"--{name}", help=f"the directory of a run of {config}")


def run(
    rounds: int = 8,
    batch: int = 4,
    prompt: int = 128,
    steps: int = 64,
    clock: str = "wall",
    **runs: str,
) -> dict:
    """Times everything; prints and returns a row a side."""
    models = {name: trained(config, runs.get(name)) for name, config in CONFIGS.items()}
    tokenizer = models["decoder"].tokenizer
    prompts = held_out(tokenizer, models["decoder"].documents, prompt)
    if len(prompts) < batch:
        raise InputError(
            f"--batch {batch}: {len(prompts)} held-out files have {prompt} tokens and more; "
            "give a smaller batch or --prompt"
        )
    rounds = min(rounds, len(prompts) // batch)
    sides = {
        name: functools.partial(make(models[kind], steps), models[kind].params)
        for name, (kind, make) in SIDES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    calls: dict[str, list[int]] = {name: [] for name in sides}
    right: dict[str, list[tuple[bool, bool]]] = {name: [] for name in sides}
    for number in range(-1, rounds):  # The first is compiled, and not counted.
        some = prompts[max(number, 0) * batch :][:batch]
        tokens = jnp.asarray([p.ids for p in some])
        keys = jax.random.split(jax.random.key(number + 1), batch)
        for name, once in sides.items():
            start = CLOCKS[clock]()
            found, count = jax.block_until_ready(once(tokens, keys))
            if number >= 0:
                seconds[name].append(CLOCKS[clock]() - start)
                calls[name].append(int(count))
                pairs = zip(some, np.asarray(found).tolist(), strict=True)
                right[name] += [judged(p, tokenizer.decode(ids)) for p, ids in pairs]
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        pairs = zip(times, seconds["decoder"], strict=True)
        row: dict[str, Any] = {
            "side": name,
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(times),
        }
        row["tokens_per_second"] = batch * steps / median
        row["ratio_to_decoder"] = statistics.median(a / b for a, b in pairs)
        row["calls"] = statistics.median(calls[name])
        if SIDES[name][0] in runs:
            row["parses"], row["first_line"] = np.mean(right[name], 0).tolist()
        rows.append(row)
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k != "side"]
        print(f"{name:<34}", "  ".join(shown))
    sizes = {"batch": batch, "prompt": prompt, "steps": steps, "snippets": rounds * batch}
    kinds = {name: repr(models[name].model) for name in CONFIGS}
    found = {"rounds": rounds, **sizes, "clock": clock, "trained": sorted(runs)}
    return found | {"models": kinds, "rows": rows}


def trained(config: str, directory: str | None) -> Side:
    """A config's model, with parameters of a run or random ones."""
    experiment = load(f"configs/{config}.py")
    if directory is None:
        tokens = jnp.zeros((1, 8), jnp.int32)
        params = nn.unbox(jax.jit(experiment.model.init)(jax.random.key(0), tokens))["params"]
    else:
        params = restored(experiment, directory)[2]
    source: Any = experiment.evals["test"].source
    task, tokens = experiment.tasks["infill"], source.tokens
    assert isinstance(task, Infill)
    return Side(experiment.model, params, task, tokens.tokenizer, tokens.source)


def held_out(tokenizer, documents, length: int) -> list[Prompt]:
    """The functions to complete, with so many tokens before them."""
    found = []
    for index in range(len(documents)):
        text = documents[index]["text"]
        made = opening(text, "")
        if made is None:
            continue
        ids = tokenizer.encode([made.before + made.start])[0]
        if len(ids) >= length:
            rest = text[len(made.before + made.start) :]
            found.append(Prompt(made.start, np.asarray(ids[-length:], np.int32), rest))
    return found


def judged(prompt: Prompt, text: str) -> tuple[bool, bool]:
    """Whether a completion parses, and whether its first line is the file's own."""
    line = text.split("\n")[0] == prompt.rest.split("\n")[0]
    return parses(function(prompt.start + text)[0]), line


Make = Callable[[Side, int], Callable[..., Any]]


def by_token(side: Side, steps: int) -> Callable[..., Any]:
    """The decoder, a token at a time."""
    model = side.model

    @jax.jit
    def go(params, tokens, keys):
        (B, T), variables = tokens.shape, {"params": params}
        cache = caches.empty(model, variables, B, T + steps)
        made = autoregressive.sample(
            Stepper(model, variables), cache, tokens, jnp.full(B, T), keys, steps=steps,
            room=T + steps, law=LAW,
        )  # fmt: skip
        return made.tokens, steps

    return go


def filled(show, sampler, block: int, size: int | None = None, **options) -> Make:
    """Unmasking: by no cache, or a sampler of `samplers.blocks`; `size` is the model's."""

    def make(side: Side, steps: int) -> Callable[..., Any]:
        model, shift = side.model, side.infill.shift
        mask_id = model.vocab - 1

        @jax.jit
        def go(params, tokens, keys):
            if sampler is unmask.sample:
                given: Any = denoiser(model, params, shift=shift, block=size)
            else:
                given = Canvas(model, {"params": params}, shift, size)
            T = tokens.shape[1]
            canvas = jnp.pad(tokens, ((0, 0), (0, steps)), constant_values=mask_id)
            how: Any = {"mask_id": mask_id, "show": show, "law": LAW, "block": block}
            made = sampler(given, canvas, keys, **how, **options)
            return made.tokens[:, T:], made.steps

        return go

    return make


def sides() -> dict[str, tuple[str, Make]]:
    """Every sampler by its name, and whose parameters it takes."""
    found: dict[str, tuple[str, Make]] = {"decoder": ("decoder", by_token)}
    shows = {f"{n} a step": Count(BLOCK // n) for n in (1, 2, 4, 8, 16)}
    shows |= {"above 0.9": Above(0.9), "above 0.5": Above(0.5), "entropy 1": Bound(1.0)}
    for name, show in shows.items():
        grown = filled(show, blocks.growing, BLOCK, BLOCK)
        found[f"blocks, {name}, cache"] = ("blocks", grown)
    for name in ("4 a step", "8 a step", "above 0.9"):
        plain, show = functools.partial(filled, shows[name], unmask.sample), shows[name]
        found[f"blocks, {name}, none"] = ("blocks", plain(BLOCK, BLOCK))
        found[f"masked, {name}, none"] = ("masked", plain(BLOCK))
        for keep in ("before", "around"):
            cached = filled(show, blocks.refreshed, BLOCK, keep=keep)
            found[f"masked, {name}, {keep}"] = ("masked", cached)
    return found


SIDES = sides()
