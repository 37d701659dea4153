"""`python -m train.plan CONFIG.py --topology v5p:8x8x8 [--mesh data=..,fsdp=..] [--search]`.

Compiles the training step for TPUs on a machine without one, and prints what it would cost.
"""

import argparse
import contextlib
import importlib.metadata
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # What is planned for is not here.

from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, load
from jaxformer.plan import Plan, advice, plan, search
from jaxformer.program import entry, write_json

_GB = 1e9


@entry
def main(argv: list[str] | None = None) -> int:
    """Plans; returns the exit status: 0 it fits, 1 it does not, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan",
        description="Compiles a training step for chips that are not there, and says what "
        "it would cost.",
    )
    parser.add_argument("config", help="a Python file that defines experiment()")
    parser.add_argument("overrides", nargs="*", help="such as batch_size=512 model.remat=dots")
    parser.add_argument("--topology", required=True, help="such as v5p:8x8x8 or v5e:16x16")
    parser.add_argument("--mesh", help="such as data=4,fsdp=64; default: the config's")
    parser.add_argument("--price", type=float, help="of a chip for an hour, in any currency")
    parser.add_argument("--json", help="a file for all of it")
    parser.add_argument("--program", help="a file for the compiled program's text")
    parser.add_argument("--parameters", action="store_true", help="say where each lies")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and batch sizes"
    )
    parser.add_argument("--most", type=int, default=8, help="programs that a search compiles")
    args = parser.parse_intermixed_args(argv)
    mesh = [f"mesh={args.mesh}"] if args.mesh is not None else []
    experiment = load(args.config, [*args.overrides, *mesh])
    if args.search:
        for name in ("price", "program", "parameters"):
            if getattr(args, name):
                raise InputError(
                    f"--{name} is of one plan, and --search makes several; search first, and "
                    "plan the one that you choose"
                )
        found = []
        for candidate in search.candidates(experiment, args.topology, args.most):
            made = plan(candidate, args.topology)
            found.append(made)
            print(line(made), flush=True)
        found.sort(key=search.rank)
        print("\nbest first:\n" + "\n".join(map(line, found)))
        fits, data = found[0].fits, [p.as_json() for p in found]
    else:
        made = plan(experiment, args.topology, args.program)
        print(page(made, args.config, experiment, args.price, args.parameters))
        fits, data = made.fits, made.as_json()
    if args.json:
        about = {"command": command(argv), "versions": versions()}
        data = about | (data if isinstance(data, dict) else {"plans": data})
        write_json(args.json, data, indent=1)
    return 0 if fits else 1


def command(argv: list[str] | None) -> list[str]:
    """What was asked for, without where the answer goes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("--json", "--program"):
        if name in argv:
            del argv[argv.index(name) : argv.index(name) + 2]
    return argv


def versions() -> dict[str, str]:
    """Of what compiles."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def line(made: Plan) -> str:
    """A plan in one line."""
    mesh = ",".join(f"{k}={v}" for k, v in made.mesh.items())
    about = f"{mesh:28} batch {made.batch_size:6} in {made.accumulate}  remat {made.remat}"
    if made.cost is None:
        return f"{about:58}  does not fit"
    used = (made.memory.total or 0) / made.memory.limit
    mfu = f"MFU {made.mfu:5.1%}" if made.mfu is not None else ""
    rate = f"{made.examples_per_second:12,.0f} examples/s"
    return f"{about:58}  {1e3 * made.cost.seconds:9,.1f} ms  {mfu}  {rate}  {used:4.0%} of HBM"


def page(
    made: Plan,
    config: str,
    experiment: Experiment,
    price: float | None = None,
    parameters: bool = False,
) -> str:
    """A plan as a person reads it."""
    mesh = ",".join(f"{k}={v}" for k, v in made.mesh.items())
    lines = [
        f"{config} on {made.topology}: {made.chips} chips, mesh {mesh or 'of one'}, batch "
        f"{made.batch_size} in {made.accumulate}, remat {made.remat}",
        "",
        *_memory(made),
    ]
    if made.cost is not None:
        lines += [
            "",
            *_time(made),
            "",
            *_collectives(made),
            "",
            *_price(made, experiment, price),
        ]
    found = advice.advice(made)
    lines += ["", *(f"- {sentence}" for sentence in found)] if found else []
    if parameters:
        lines += ["", str(made.explanation)]
    else:
        whole = sum(r.bytes for r in made.explanation.rows)
        each = sum(r.bytes_per_device for r in made.explanation.rows)
        lines += [
            "",
            f"parameters: {whole:,} bytes in all, {each:,} on each device; --parameters lists "
            "where each lies",
        ]
    return "\n".join(lines)


def _memory(made: Plan) -> list[str]:
    memory = made.memory
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "average": memory.average,
        "batch": memory.batch,
        "temporaries": memory.temporaries,
        "program": memory.program,
    }
    lines = ["HBM of each device, GB"]
    lines += [f"  {name:12} {size / _GB:9.3f}" for name, size in rows.items() if size]
    limit = f"of {memory.limit / _GB:.1f}"
    if memory.total is None:
        return [*lines, f"  does not fit: {memory.state / _GB:.1f} and more {limit}"]
    says = f"fits, {memory.total / memory.limit:.0%}" if made.fits else "does not fit"
    return [*lines, f"  {'in all':12} {memory.total / _GB:9.3f} {limit}: {says}"]


def _time(made: Plan) -> list[str]:
    cost = made.cost
    assert cost is not None
    peak = made.peak / made.devices / 1e12
    again = f", {made.again:.0%} of them not the model's own" if made.again else ""
    rows = {
        "products": (cost.mxu, f"{cost.flops / 1e12:,.2f} Tflop at {peak:.0f} a second{again}"),
        "HBM": (cost.hbm, f"{cost.moved / _GB:,.1f} GB"),
        "links": (
            cost.ici,
            f"{made.collective_bytes / _GB:,.2f} GB sent; "
            f"{1e3 * cost.exposed:.2f} ms with nothing beside it",
        ),
        "roofline": (cost.roofline, f"the longest of these{_share(made, cost.roofline)}"),
        "compiler": (cost.compiler, "its own estimates, without kernels and links"),
        "kernels": (cost.kernels, "attention, by its schedules"),
        "predicted": (
            cost.seconds,
            "by the slower of roofline and compiler, instruction by instruction"
            + _share(made, cost.seconds),
        ),
    }
    lines = ["a step, ms"]
    lines += [f"  {name:10} {1e3 * t:10.2f}  {about}" for name, (t, about) in rows.items()]
    tokens = f", {made.tokens / cost.seconds:,.0f} tokens/s" if made.tokens else ""
    return [*lines, f"  {made.examples_per_second:,.1f} examples/s{tokens}"]


def _share(made: Plan, seconds: float) -> str:
    if made.model_flops is None:
        return ""
    return f": MFU {made.model_flops / (seconds * made.peak):.1%}"


def _collectives(made: Plan) -> list[str]:
    lines = ["collectives of a device in a step      calls        GB        ms    hidden"]
    for c in made.collectives:
        name = f"{c.kind} over {'*'.join(c.axes)}"
        lines.append(
            f"  {name:34} {c.calls:7} {c.bytes / _GB:9.3f} {1e3 * c.seconds:9.3f} "
            f"{1e3 * c.hidden:9.3f}"
        )
    return lines if made.collectives else ["no collectives"]


def _price(made: Plan, experiment: Experiment, price: float | None) -> list[str]:
    assert made.cost is not None
    hours = experiment.steps * made.cost.seconds / 3600
    lines = [
        f"{experiment.steps:,} steps: {hours:,.1f} hours, {hours * made.chips:,.0f} of a chip"
    ]
    if price is None:
        return lines
    lines[0] += f", {hours * made.chips * price:,.0f} at {price:g}"
    try:
        records = len(experiment.data.source)
        lines.append(f"an epoch of {records:,}: " + _cost_of(made, records, price))
    except (InputError, OSError):  # The data is elsewhere.
        lines.append("a million examples: " + _cost_of(made, 1_000_000, price))
    return lines


def _cost_of(made: Plan, examples: int, price: float) -> str:
    rate = made.examples_per_second
    assert rate is not None
    return f"{examples / rate / 3600 * made.chips * price:,.2f}"


if __name__ == "__main__":
    sys.exit(main())
