"""Holes filled in, by every sampler: how many tokens a second, and how well.

The holes are those of the task `Infill` of `configs/decoder_stdlib.py`, in batches of about one
length, greedily, by the same three models as in `speed.unmask`. The decoder goes on from what
stands before a hole, with its cache and for as many tokens as the batch's longest hole has,
in whole eights; the others see both sides, or by blocks what stands before and in the block.
By blocks a hole begins where one does. All are told how many tokens are hidden. A rate
counts the tokens that were hidden.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evaluate.infill import Hole
from evaluate.speed.unmask import BLOCK, CONFIGS, Side, trained
from evaluate.speed.vit import CLOCKS
from jaxformer.errors import InputError
from jaxformer.layers import cache as caches
from jaxformer.layers.cache import Stepper
from jaxformer.models.mdlm import Canvas, denoiser
from jaxformer.samplers import autoregressive, blocks, unmask
from jaxformer.samplers.logits import GREEDY
from jaxformer.samplers.unmask import Above, Count

EIGHT = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--batch", type=int, help="holes at once, default 4")
    parser.add_argument("--count", type=int, help="holes, default 64")
    parser.add_argument("--most", type=int, help="tokens of a hole at most, default 32")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")
    for name, config in CONFIGS.items():
        parser.add_argument(f"--{name}", help=f"the directory of a run of {config}")


def run(
    rounds: int = 1,
    batch: int = 4,
    count: int | None = None,
    most: int | None = None,
    clock: str = "wall",
    **runs: str,
) -> dict:
    """Times everything; prints and returns a row a side. Each hole is filled `rounds` times."""
    models = {name: trained(config, runs.get(name)) for name, config in CONFIGS.items()}
    task = models["decoder"].infill
    sizes = {"count": count or task.count, "most": most or task.most}
    task = dataclasses.replace(task, **sizes)
    task.check()
    holes = sorted(task.holes(), key=lambda h: h.stop - h.start)
    if batch > len(holes):
        raise InputError(f"--batch {batch} is more than the {len(holes)} holes; give fewer")
    groups = [holes[i : i + batch] for i in range(0, len(holes) - batch + 1, batch)]
    sides = {name: make(models[kind]) for name, (kind, make) in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    calls: dict[str, list[int]] = {name: [] for name in sides}
    filled: dict[str, list[tuple[Hole, np.ndarray]]] = {name: [] for name in sides}
    known = set()
    for number in range(rounds):
        for group in groups:
            for name, once in sides.items():
                steps = longest(group) if name == "decoder" else 0
                if (name, steps) not in known:  # Compiled, and not counted.
                    once(group)
                    known.add((name, steps))
                start = CLOCKS[clock]()
                found, called = once(group)
                seconds[name].append(CLOCKS[clock]() - start)
                if not number:
                    calls[name].append(called)
                    filled[name] += list(zip(group, found, strict=True))
    rows = []
    hidden = rounds * sum(h.stop - h.start for group in groups for h in group)
    for name, times in seconds.items():
        pairs = zip(times, seconds["decoder"], strict=True)
        row: dict[str, Any] = {
            "side": name,
            "tokens_per_second": hidden / sum(times),
            "ratio_to_decoder": statistics.median(a / b for a, b in pairs),
            "calls": sum(calls[name]) / len(groups),
        }
        if SIDES[name][0] in runs:
            judged = task.judge(filled[name])
            row |= {k: float(m.sum / m.count) for k, m in judged.items()}
        rows.append(row)
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k != "side"]
        print(f"{name:<34}", "  ".join(shown))
    sizes = {"batch": batch, "holes": len(groups) * batch, "hidden": hidden // rounds}
    sizes["most"] = task.most
    return {"rounds": rounds, **sizes, "clock": clock, "trained": sorted(runs), "rows": rows}


Fill = Callable[[list[Hole]], tuple[list[np.ndarray], int]]


def longest(group: list[Hole]) -> int:
    """As many tokens as the longest hole has, in whole eights."""
    return -(-max(h.stop - h.start for h in group) // EIGHT) * EIGHT


def by_token(side: Side) -> Fill:
    """The decoder, from the left; see `Infill`."""
    model, task = side.model, side.infill
    room = task.length - task.most

    @functools.partial(jax.jit, static_argnums=3)
    def go(params, tokens, lengths, steps):
        variables = {"params": params}
        cache = caches.empty(model, variables, len(tokens), task.length)
        made = autoregressive.sample(
            Stepper(model, variables), cache, tokens, lengths, jax.random.key(0),
            steps=steps, room=task.length, law=GREEDY,
        )  # fmt: skip
        return made.tokens

    def fill(group):
        before = [hole.ids[: hole.start][-room:] for hole in group]
        tokens = np.stack([np.pad(ids, (0, room - len(ids))) for ids in before])
        lengths = jnp.asarray([len(ids) for ids in before])
        steps = longest(group)
        found = np.asarray(go(side.params, jnp.asarray(tokens), lengths, steps))
        pairs = zip(found, group, strict=True)
        return [ids[: h.stop - h.start] for ids, h in pairs], steps

    return fill


def by_mask(show, sampler, block: int | None = None, size: int | None = None, **how):
    """Unmasking: by no cache, or a sampler of `samplers.blocks`; `size` is the model's."""

    def make(side: Side) -> Fill:
        model, task = side.model, dataclasses.replace(side.infill, align=block or 1)

        @jax.jit
        def go(params, tokens):
            if sampler is unmask.sample:
                given: Any = denoiser(model, params, shift=task.shift, block=size)
            else:
                given = Canvas(model, {"params": params}, task.shift, size)
            named: Any = {"mask_id": task.mask_id, "show": show, "law": GREEDY, "block": block}
            made = sampler(given, tokens, jax.random.key(0), **named, **how)
            return made.tokens, made.steps

        def fill(group):
            canvases = [task.canvas(hole) for hole in group]
            tokens = jnp.asarray(np.stack([ids for ids, _ in canvases]).astype(np.int32))
            found, calls = go(side.params, tokens)
            rows = zip(np.asarray(found), canvases, group, strict=True)
            return [row[at : at + h.stop - h.start] for row, (_, at), h in rows], int(calls)

        return fill

    return make


def sides() -> dict[str, tuple[str, Callable[[Side], Fill]]]:
    """Every sampler by its name, and whose parameters it takes."""
    found: dict[str, tuple[str, Callable[[Side], Fill]]] = {"decoder": ("decoder", by_token)}
    shows = {f"{n} steps" if n > 1 else "1 step": Count(n) for n in (1, 2, 4, 8)}
    shows |= {"a token a step": Count(64), "above 0.9": Above(0.9), "above 0.5": Above(0.5)}
    for name, show in shows.items():
        found[f"masked, {name}"] = ("masked", by_mask(show, unmask.sample))
    for name in ("2 steps", "4 steps", "a token a step", "above 0.5"):
        around = by_mask(shows[name], blocks.refreshed, 2 * BLOCK, keep="around")
        found[f"masked, {name}, around"] = ("masked", around)
    for name in ("1 step", "2 steps", "4 steps", "a token a step", "above 0.5"):
        grown = by_mask(shows[name], blocks.growing, BLOCK, BLOCK)
        found[f"blocks, {name}, cache"] = ("blocks", grown)
    return found


SIDES = sides()
