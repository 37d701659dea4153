"""A picture of scenes with what a model answers: `python -m evaluate.answers CONFIG ...`.

Answers are generated, token by token with a cache after the image, as in use.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from evaluate.ask import asking
from evaluate.generate import generate
from evaluate.run import Trained, restored, trained
from jaxformer.data.images import pixels_of
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import END, IMAGE, Ask, decode, encode, question
from jaxformer.data.sources import Record
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry, writing
from jaxformer.samplers.logits import GREEDY

STEPS = 5  # tokens of the longest answer, its end, and one more.


def answered(trained: Trained, test: Pipeline, indices: Sequence[int]) -> list[list[str]]:
    """The model's answers to all questions about some scenes, a list a scene.

    `test` ends in `data.scenes.Ask`, which says the kinds and how many places an image has.
    """
    *before, ask = test.transforms
    if not isinstance(ask, Ask):
        raise InputError(f"the transforms end in {type(ask).__name__}; they must end in Ask")
    prompts, beside = [], []
    for index in indices:
        record: Record = test.source[index]
        for transform in before:
            record = transform(record)
        for kind in ask.kinds:
            prompts.append([IMAGE] * ask.places + encode(question(kind, record)[0]))
            beside.append({"images": pixels_of(record)[None]})
    length = max(map(len, prompts)) + STEPS
    made = generate(
        trained, prompts, length=length, steps=STEPS, law=GREEDY, end=END, beside=beside
    )
    texts = [decode(ids) for ids in made]
    count = len(ask.kinds)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def picture(
    test: Pipeline, indices: Sequence[int], answers: list[list[str]], path: pathlib.Path
) -> pathlib.Path:
    """Draws scenes with questions and answers as a PNG; what is wrong is red."""
    ask: Any = test.transforms[-1]
    columns = 2
    rows = -(-len(indices) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index, said in zip(axes.flat, indices, answers, strict=False):
        scene = test.source[index]
        axis.imshow(scene["image"][..., 0], cmap="gray", vmin=0, vmax=1)
        for line, (kind, answer) in enumerate(zip(ask.kinds, said, strict=True)):
            asked, truth = question(kind, scene)
            right = answer == truth
            text = f"{asked} {answer}" + ("" if right else f"   (it is {truth})")
            colour = "black" if right else "red"
            place = (0.0, -0.1 - 0.12 * line)
            axis.text(*place, text, transform=axis.transAxes, fontsize=9, color=colour)
    figure.subplots_adjust(0.02, 0.17, 0.98, 0.98, hspace=0.95, wspace=0.08)
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints and draws answers; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.answers", description="Scenes with what a model answers."
    )
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.depth=8")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    parser.add_argument("--scenes", type=int, default=6, help="how many, from the first")
    parser.add_argument("--out", default="answers.png", help="the picture")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    task = asking(experiment, args.config)
    _, made, params = restored(experiment, args.checkpoint)
    indices = range(min(args.scenes, len(task.test.source)))
    found = answered(trained(experiment, made, params), task.test, indices)
    right = total = 0
    for index, said in zip(indices, found, strict=True):
        scene = task.test.source[index]
        for kind, answer in zip(task.kinds, said, strict=True):
            asked, truth = question(kind, scene)
            right, total = right + (answer == truth), total + 1
            print(f"scene {index}: {asked} {answer}")
    with writing():
        path = picture(task.test, indices, found, pathlib.Path(args.out))
    print(f"{right} of {total} are right: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
