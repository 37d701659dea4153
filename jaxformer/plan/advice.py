"""What to change, by what a plan shows."""

from jaxformer.plan.ahead import Plan

_LIGHTER = {"none": "dots", "dots": "full"}
_HEAVIER = {"full": "dots", "dots": "none"}


def advice(plan: Plan) -> list[str]:
    """Sentences, the most useful first; none where nothing stands out."""
    return _to_fit(plan) if not plan.fits else _to_hurry(plan)


def _to_fit(plan: Plan) -> list[str]:
    memory, found = plan.memory, []
    if memory.state > memory.limit // 2:
        found.append(
            f"parameters and what the optimizer keeps are {memory.state / 1e9:.1f} GB of a "
            f"device's {memory.limit / 1e9:.1f}: shard them over more devices (a greater fsdp "
            "or tensor), or take more chips"
        )
    if plan.remat in _LIGHTER:
        found.append(
            f"compute more of it again in the backward pass: remat={_LIGHTER[plan.remat]}"
        )
    ways = plan.batch_size // plan.accumulate
    found.append(
        f"take the batch in more parts: accumulate={2 * plan.accumulate}"
        if ways > 1
        else "take a smaller batch"
    )
    found.append("or more chips, or a mesh with tensor=2, which halves the widest activations")
    return found


def _to_hurry(plan: Plan) -> list[str]:
    cost, memory, found = plan.cost, plan.memory, []
    assert cost is not None
    used = (memory.total or 0) / memory.limit
    again = plan.again or 0.0
    if used < 0.5 and plan.remat in _HEAVIER and again > 0.1:
        found.append(
            f"{used:.0%} of the memory is used and {again:.0%} of the operations are computed "
            f"again: try remat={_HEAVIER[plan.remat]}, or a larger batch"
        )
    if cost.exposed > 0.15 * cost.seconds and cost.collectives:
        worst = cost.collectives[0]
        found.append(
            f"the links keep the chips waiting {cost.exposed / cost.seconds:.0%} of the time, "
            f"most of it for {worst.kind} over {'*'.join(worst.axes)}: make that axis shorter, "
            "or give each chip more of a batch"
        )
    gathers = [c for c in cost.collectives if c.kind == "all-reduce" and c.axes == ("fsdp",)]
    if gathers and gathers[0].bytes > plan.collective_bytes / 2 and plan.mesh["fsdp"] > 64:
        found.append(
            "parameters are gathered by all-reduce, twice the bytes: their shards are thinner "
            "than a tile; try part of fsdp as data"
        )
    if cost.hbm > cost.mxu and cost.hbm >= cost.ici:
        found.append("memory's bandwidth sets the pace: a larger batch a chip would help most")
    return found
