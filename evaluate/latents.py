"""`python -m evaluate.latents CONFIG.py EVAL FILE`: an autoencoder's latents, encoded once.

The images of an evaluation of the config as what its trained autoencoder makes of them, by
`jaxformer.data.latents.write_latents`, and the scale by which they have variance 1: that of
its model and of the `Draw` that reads them.
"""

import argparse
import logging
import sys

import numpy as np

from evaluate.run import restored
from jaxformer.data.latents import write_latents
from jaxformer.data.shards import ArrayRecord
from jaxformer.errors import InputError
from jaxformer.experiment import load, workdir
from jaxformer.program import entry, writing


def scale(path: str) -> float:
    """What the latents of a file are to be multiplied by to have variance 1, noise included."""
    source = ArrayRecord(path, num_classes=2**31)
    laws = [np.split(source[i]["image"], 2, -1) for i in range(len(source))]
    mean, log_variance = (np.stack(part).astype(np.float64) for part in zip(*laws, strict=True))
    return float((mean.var() + np.exp(log_variance).mean()) ** -0.5)


@entry
def main(argv: list[str] | None = None) -> int:
    """Writes a file; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.latents",
        description="Writes the latents of an evaluation's images, seen by its autoencoder.",
    )
    parser.add_argument("config", help="a config of an autoencoder")
    parser.add_argument("eval", help="the name of one of its evals")
    parser.add_argument("file", help="where to write them, an ArrayRecord")
    parser.add_argument("overrides", nargs="*", help="such as evals.train.workers=4")
    parser.add_argument("--checkpoint", help="default: runs/<config name>")
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells what it misses.
    experiment = load(args.config, args.overrides)
    if args.eval not in experiment.evals:
        raise InputError(
            f"{args.config}: has no eval {args.eval!r}; it has "
            f"{', '.join(experiment.evals) or 'none'}"
        )
    if not hasattr(experiment.model, "posterior"):
        raise InputError(
            f"{args.config}: {type(experiment.model).__name__} has no law of latents; give a "
            "config of a KLAutoencoder"
        )
    step, _, params = restored(experiment, args.checkpoint or workdir(args.config))
    with writing():
        count = write_latents(args.file, experiment.evals[args.eval], experiment.model, params)
    print(f"{args.file}: {count} images at step {step}; scale={scale(args.file):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
