"""`python -m evaluate.clips CONFIG.py --checkpoint DIR`: which times of masking to learn at.

How much the loss of a row of the config's evaluation varies under each clipped schedule, for
a model that unmasks, and the one of least variance: BD3-LM (arXiv 2503.09573) trains with it.
"""

import argparse
import logging
import sys

import jax
import jax.numpy as jnp

from evaluate.run import batches, restored
from jaxformer.errors import InputError
from jaxformer.experiment import load, workdir
from jaxformer.objectives.clips import variances
from jaxformer.objectives.schedules import Clipped
from jaxformer.objectives.unmask import FLOOR, Unmask
from jaxformer.program import entry, write_json


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.clips",
        description="Finds the clipped schedule under which a row's loss varies least.",
    )
    parser.add_argument("config", help="a config of a model that unmasks")
    parser.add_argument("overrides", nargs="*", help="such as model.depth=2")
    parser.add_argument("--checkpoint", help="default: runs/<config name>")
    parser.add_argument("--rows", type=int, default=64, help="of the first evaluation")
    parser.add_argument("--step", type=float, default=0.05, help="between ends of intervals")
    parser.add_argument("--json", help="a file for every number")
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells what it misses.
    experiment = load(args.config, args.overrides)
    objective = getattr(experiment.objective, "last", experiment.objective)
    if not isinstance(objective, Unmask) or not experiment.evals:
        raise InputError(
            f"{args.config}: needs an objective that unmasks and an eval; "
            f"{type(objective).__name__} has no times of masking"
        )
    step, _, params = restored(experiment, args.checkpoint or workdir(args.config))
    first = next(iter(batches(next(iter(experiment.evals.values())), args.rows, 1)))
    batch = jax.tree.map(jnp.asarray, first)
    hidden = objective.hidden(batch)
    how = {"mask_id": objective.mask_id, "block": objective.block, "hidden": hidden}
    says = objective.costs(experiment.model.apply, params, batch)
    found = variances(says, batch["tokens"], jax.random.key(0), step=args.step, **how)
    ranked, whole = sorted(found.items(), key=lambda pair: pair[1]), Clipped(FLOOR, 1.0)
    for schedule, variance in [*ranked[:5], (whole, found[whole])]:
        print(f"{schedule.low:.3f} to {schedule.high:.3f} masked: variance {variance:.4g}")
    if args.json:
        told = [{"low": s.low, "high": s.high, "variance": v} for s, v in ranked]
        about = {"config": args.config, "step": step, "rows": args.rows, "schedules": told}
        write_json(args.json, about, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
