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


def candidates(experiment: Experiment, topology: str, most: int = 8) -> list[Experiment]:
    """At most so many layouts to compile, the likeliest first.

    Meshes of data, fsdp and tensor, each a power of two; each remat policy, where the model
    has a choice; and the batch as it is or taken in two and four parts. What cannot hold
    the batch or its state is left out; of the rest those with the fewest devices to a
    parameter come first, as they send the least, and those that compute the least again.

    Raises:
      InputError: no layout divides the batch.
    """
    there = chips.find(topology)
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    limit = int(there.chip.hbm / there.chip.devices)
    found: list[tuple[Any, Experiment]] = []
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
        for remat, parts in itertools.product(_policies(laid), (1, 2, 4)):
            accumulate = parts * experiment.accumulate
            if experiment.batch_size % (made.batch_ways * accumulate):
                continue
            order = (parts, state / limit > 0.3, mesh["tensor"], REMAT.index(remat or "none"))
            order = (*order, abs(mesh["fsdp"] - 64))
            found.append((order, _with(laid, remat, accumulate)))
    if not found:
        raise reason or InputError(
            f"no mesh of {topology} holds the parameters and the optimizer's state; take a "
            "larger topology"
        )
    found.sort(key=lambda pair: pair[0])
    return [candidate for _, candidate in _spread(found)][:most]


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


def _spread(found):
    """One of each remat policy in turn, so that few tries see all of them."""
    kinds: dict[Any, list] = {}
    for pair in found:
        remat = getattr(pair[1].model, "remat", None)
        kinds.setdefault((pair[0][0], remat), []).append(pair)
    for row in itertools.zip_longest(*kinds.values()):
        yield from (pair for pair in row if pair is not None)


def _policies(experiment: Experiment) -> tuple[str | None, ...]:
    return REMAT if hasattr(experiment.model, "remat") else (None,)


def _with(experiment: Experiment, remat: str | None, accumulate: int) -> Experiment:
    model = experiment.model
    if remat is not None:
        model = dataclasses.replace(model, remat=remat)
    return dataclasses.replace(experiment, model=model, accumulate=accumulate)
