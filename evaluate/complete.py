"""`python -m evaluate.complete CONFIG.py --checkpoint DIR`: what a model says, to read.

Prints some of the completions that the config's task `Completions` makes.
"""

import argparse
import dataclasses
import sys

from evaluate.completions import Completions, parses
from evaluate.run import restored, trained
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints completions; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.complete")
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.depth=8")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    parser.add_argument("--step", type=int, help="default: the last")
    parser.add_argument("--count", type=int, default=4, help="how many to print")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    tasks = [t for t in experiment.tasks.values() if isinstance(t, Completions)]
    if not tasks:
        raise InputError(f"{args.config}: has no task that is Completions; add one")
    task = dataclasses.replace(tasks[0], files=args.count)
    _, made, params = restored(experiment, args.checkpoint, args.step)
    for prompt, text, _ in task.complete(trained(experiment, made, params)):
        told = "parses" if parses(text) else "does not parse"
        rest = text.removeprefix(prompt.start)
        print(f"--- {prompt.source}: {told}\n{prompt.start}>>>\n{rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
