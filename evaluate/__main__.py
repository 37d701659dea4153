"""`python -m evaluate CONFIG.py --checkpoint DIR [--json FILE] [a.b=c ...]`."""

import argparse
import logging
import math
import pathlib

import jax
import numpy as np

from jaxformer import checkpoint, hosts
from jaxformer.experiment import load
from jaxformer.lora import Lora
from jaxformer.metrics import Confusion
from jaxformer.program import entry, write_json, writing


@entry
def main(argv: list[str] | None = None) -> int:
    """Evaluates; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate",
        description="Evaluates a checkpoint, sharded, exact to the last example.",
    )
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.depth=8")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    parser.add_argument("--step", type=int, help="default: the last")
    parser.add_argument("--mesh", help="such as data=2,fsdp=4; default: the config's")
    parser.add_argument("--json", help="a file for every metric's sum, count and value")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--export", help="a directory to write the model to, as the hub has it")
    files.add_argument(
        "--stablehlo", help="a file for the model, of eval_batch_size, that needs only JAX"
    )
    parser.add_argument("--pictures", help="default: evaluation/ in the run's directory")
    hosts.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step it takes.
    mesh = [f"mesh={args.mesh}"] if args.mesh is not None else []
    experiment = load(args.config, [*args.overrides, *mesh])
    hosts.join_by(args)
    from evaluate.report import confusion_picture, table
    from evaluate.run import evaluate_checkpoint, restored
    from evaluate.stablehlo import artefact

    if args.export:
        from jaxformer import convert

        convert.files.library()  # What it lacks is told before a checkpoint is read.
        _, _, params = restored(experiment, args.checkpoint, args.step)
        model = experiment.model
        if isinstance(model, Lora):
            model, params = model.model, model.merged(params)
        with writing():
            convert.save(args.export, model, params)
        print(f"{args.export}: written")
        return 0
    if args.stablehlo:
        _, made, params = restored(experiment, args.checkpoint, args.step)
        data = artefact(experiment.model, params, made.inputs, experiment.eval_batch_size)
        with writing():
            pathlib.Path(args.stablehlo).write_bytes(data)
        print(f"{args.stablehlo}: written, {len(data) / 1e6:,.1f} MB")
        return 0
    step, found = evaluate_checkpoint(experiment, args.checkpoint, args.step)
    if jax.process_index():  # All know it; one tells.
        return 0
    print(table(step, found))
    if args.json:
        write_json(args.json, {"step": step, "evals": as_json(found)})
    beside = checkpoint.find(args.checkpoint).parent / "evaluation"
    pictures = pathlib.Path(args.pictures or beside)
    with writing():
        for name, metrics in found.items():
            confusion = metrics.get("confusion")
            if isinstance(confusion, Confusion):
                path = confusion_picture(confusion, pictures / f"{name}_confusion")
                print(f"confusion: {path}")
    return 0


def as_json(found: dict) -> dict:
    """Every metric's sum, count and value."""
    return {
        name: {
            metric: {
                "sum": finite(np.asarray(m.sum).tolist()),
                "count": np.asarray(m.count).tolist(),
                "value": finite(m.value()),
            }
            for metric, m in metrics.items()
        }
        for name, metrics in found.items()
    }


def finite(value):
    """JSON has no NaN: what is not finite is null."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    hosts.end(main())
