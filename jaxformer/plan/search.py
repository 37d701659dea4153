"""Layouts of an experiment on a slice, worth compiling."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jaxformer.data import stand_in
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment
from jaxformer.plan import chips
from jaxformer.plan.ahead import Plan, laid_out, lasting

REMAT = ("none", "dots", "full")
TENSOR = (1, 2, 4, 8)
TOGETHER = 4  # meshes that are tried in turn.


def candidates(experiment: Experiment, topology: str, most: int = 8) -> list[Experiment]:
    """At most so many layouts to compile, the likeliest first.

    Meshes of data, fsdp and tensor, each a power of two; each remat policy, where the model
    has a choice; and the batch as it is or taken in two and four parts. What cannot hold
    the batch or its state is left out. Of the meshes those come first whose state leaves most
    of the memory free, and copies of a small state on every device before shards of it; four
    of them are tried with the experiment's own policy, then with others and in more parts.

    Raises:
      InputError: no layout divides the batch.
    """
    there = chips.find(topology)
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    limit = int(there.chip.hbm / there.chip.devices)
    found: list[tuple[Any, list[Experiment]]] = []
    reason: InputError | None = None
    for mesh in meshes(len(there.devices)):
        laid = dataclasses.replace(
            experiment, mesh=",".join(f"{k}={v}" for k, v in mesh.items())
        )
        try:
            made = laid_out(laid, batch, list(there.devices))
        except InputError as error:
            reason = error
            continue
        state = lasting(made, batch, limit).state
        if state > 0.7 * limit:
            continue
        ways = [
            _with(laid, remat, parts * experiment.accumulate)
            for parts, remat in itertools.product((1, 2, 4), _policies(laid))
            if experiment.batch_size % (made.batch_ways * parts * experiment.accumulate) == 0
        ]
        order = (state / limit > 0.3, mesh["tensor"], mesh["fsdp"] > 1, abs(mesh["fsdp"] - 64))
        found += [(order, ways)] if ways else []
    if not found:
        raise reason or InputError(
            f"no mesh of {topology} holds the parameters and the optimizer's state; take a "
            "larger topology"
        )
    found.sort(key=lambda pair: pair[0])
    return list(itertools.islice(_spread([ways for _, ways in found]), most))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of data, fsdp and tensor that has so many devices."""
    for tensor in TENSOR:
        rest = devices // tensor
        if devices % tensor:
            continue
        fsdp = 1
        while fsdp <= rest:
            if rest % fsdp == 0:
                yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
            fsdp *= 2


def rank(plan: Plan) -> tuple[bool, float]:
    """Sorts what fits first, and the fastest of it before the rest."""
    rate = plan.examples_per_second
    return rate is None, -(rate or 0.0)


def _spread(meshes: list[list[Experiment]]) -> Iterator[Experiment]:
    """The first way of some meshes, then the second of each, and so on; then other meshes."""
    for i in range(0, len(meshes), TOGETHER):
        for row in itertools.zip_longest(*meshes[i : i + TOGETHER]):
            yield from (candidate for candidate in row if candidate is not None)


def _policies(experiment: Experiment) -> tuple[str | None, ...]:
    """The experiment's own, then those that keep less, then those that keep more."""
    own = getattr(experiment.model, "remat", None)
    if own is None:
        return (None,)
    place = REMAT.index(own)
    return (*REMAT[place:], *reversed(REMAT[:place]))


def _with(experiment: Experiment, remat: str | None, accumulate: int) -> Experiment:
    model = experiment.model
    if remat is not None:
        model = dataclasses.replace(model, remat=remat)
    return dataclasses.replace(experiment, model=model, accumulate=accumulate)
