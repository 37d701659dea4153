"""`python -m train CONFIG.py [--workdir DIR] [--mesh data=2,fsdp=4] [a.b=c ...]`."""

import argparse
import logging
import sys

import jax

from jaxformer import hosts
from jaxformer.errors import InputError
from jaxformer.experiment import fields, load, workdir
from jaxformer.program import entry, tell


@entry
def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status: 0 done or asked to end, 2 bad input, 1 diverged,
    not saved or left by another process, 3 stuck.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Trains the experiment of a config file."
    )
    parser.add_argument("config", help="a Python file that defines experiment()")
    parser.add_argument("overrides", nargs="*", help="such as model.depth=8 steps=500")
    parser.add_argument("--workdir", help="default: runs/<config name>")
    parser.add_argument("--mesh", help="such as data=2,fsdp=4; default: the config's")
    parser.add_argument(
        "--explain", action="store_true", help="say where each parameter would lie, and end"
    )
    parser.add_argument(
        "--patience", type=float, help="seconds without a step before it ends itself as stuck"
    )
    hosts.add_arguments(parser)
    parser.add_argument("--profile", help="FIRST:LAST, steps that a trace is written of")
    argv = sys.argv[1:] if argv is None else argv
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step it takes.
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        _print_fields([a for a in argv if a not in ("-h", "--help")])
        return 0
    args = parser.parse_intermixed_args(argv)
    mesh = [f"mesh={args.mesh}"] if args.mesh is not None else []
    experiment = load(args.config, [*args.overrides, *mesh])
    profile = _span(args.profile)
    hosts.join_by(args)
    from train.log import Unsaved
    from train.run import PATIENCE, Diverged, prepare, train  # Not before bad input.

    if args.explain:
        print(prepare(experiment).explanation)
        return 0
    try:
        patience = PATIENCE if args.patience is None else args.patience
        directory = args.workdir or workdir(args.config)
        train(experiment, directory, profile=profile, patience=patience)
    except (Diverged, Unsaved) as error:
        tell(error)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        tell(
            f"process {jax.process_index()} lost another one "
            f"({str(error).splitlines()[0][:200]}); start all of them again: they go on "
            "from the last checkpoint"
        )
        return 1
    return 0


def _print_fields(argv: list[str]) -> None:
    configs = [a for a in argv if a.endswith(".py")]
    if not configs:
        print("\nwith CONFIG.py --help lists every field that an override reaches")
        return
    assignments = [a for a in argv if "=" in a and not a.startswith("-")]
    print(f"\nfields of {configs[0]}, and their values:")
    for name, value in fields(load(configs[0], assignments)):
        print(f"  {name}={value!r}" if not callable(value) else f"  {name}")


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise InputError(f"--profile {text}: expected FIRST:LAST, such as 10:15")
    return int(first), int(last)


if __name__ == "__main__":
    hosts.end(main())
