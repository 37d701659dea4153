"""An answer as it comes: `python -m evaluate.ask CONFIG IMAGE "question" --checkpoint DIR`.

In the place of the config and its run a directory of the hub may stand, see `evaluate.hub`.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from evaluate import hub
from evaluate.greedy import likeliest
from evaluate.run import Trained, restored, trained
from jaxformer.data.images import Decode, resized
from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry

STEPS = 8  # words of the longest answer.


@runtime_checkable
class Asks(Protocol):
    """The last transform of what a model is evaluated with that is asked about images.

    Such as `data.scenes.Ask`.
    """

    @property
    def end(self) -> int:
        """The id that closes an answer."""
        ...

    def prompt(self, question: str) -> list[int]:
        """The ids that an answer follows, those of the image among them."""
        ...

    def word(self, token: int) -> str:
        """How an id of an answer reads."""
        ...


def asker(trained: Trained, test: Pipeline) -> Callable[[np.ndarray, str], Iterator[str]]:
    """Who gives the words of the likeliest answer to a question, one after the other.

    It is called with an image as the pipeline's source has them (of scenes `[Y, X, 1]`, uint8
    or float32 in [0, 1], bright digits on black) and a question. What one question has
    compiled serves all whose prompt, filled up to a multiple of 8 tokens, is as long.

    Args:
      trained: a `models.vlm.VLM` and its parameters.
      test: a pipeline as the model was evaluated with, which ends in one that `Asks`.
    """
    before, ask = test.transforms[:-1], asks(test)
    draw = likeliest(trained.model, trained.params, STEPS)

    def answer(image: np.ndarray, question: str) -> Iterator[str]:
        record: dict[str, Any] = {"image": image, "source": "the image"}
        for transform in before:
            record = transform(record)
        for token in draw(asked(ask, question), record["image"]):
            if token == ask.end:
                return
            yield ask.word(token)

    return answer


def asks(test: Pipeline) -> Asks:
    """The transform by which a pipeline asks.

    Raises:
      InputError: it has none.
    """
    last = test.transforms[-1] if test.transforms else None
    if not isinstance(last, Asks):
        raise InputError(
            f"the transforms end in {type(last).__name__}; they must end in one that has end, "
            "prompt and word, as data.scenes.Ask"
        )
    return last


def asked(ask: Asks, question: str) -> list[int]:
    """The ids of a question and its image.

    Raises:
      InputError: it is empty, or in words that the model does not know.
    """
    if not question.strip():
        raise InputError("the question is empty; ask something")
    return ask.prompt(question)


def read(path: str, size: tuple[int, int]) -> np.ndarray:
    """A picture of a file in grey, of `size` pixels, (rows, columns).

    Raises:
      InputError: no such file, or it is no picture.
    """
    return decoded(contents(path), path, size)


def contents(path: str) -> bytes:
    """The bytes of a picture's file."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a picture") from None


def decoded(data: bytes, source: str, size: tuple[int, int]) -> np.ndarray:
    """An encoded picture as `read` has it; `source` names it where it is none."""
    image = Decode(channels=1)({"image": data, "source": source})["image"]
    return image if image.shape[:2] == size else resized(image, size, "bilinear")


def asking(experiment: Any, config: str) -> Any:
    """The task of a config that asks about images.

    Raises:
      InputError: it has none.
    """
    task = experiment.tasks.get("vqa")
    if task is None:
        raise InputError(f"{config}: has no task vqa; name a config that asks")
    return task


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints an answer; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.ask", description="Answers a question about an image."
    )
    parser.add_argument("config", help="that of the run, or a directory of the hub")
    parser.add_argument("image", help="a PNG, JPEG, WebP or BMP; of scenes, bright on black")
    parser.add_argument("question", help="such as 'what is the sum ?'")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.image=1")
    parser.add_argument("--checkpoint", help="a run's directory")
    parser.add_argument("--template", choices=list(hub.TEMPLATES), default="vicuna")
    args = parser.parse_intermixed_args(argv)
    if pathlib.Path(args.config).is_dir():
        data = contents(args.image)
        for text in hub.asker(args.config, hub.TEMPLATES[args.template])(data, args.question):
            print(text, end="", flush=True)
        print()
        return 0
    if args.checkpoint is None:
        raise InputError(f"{args.config}: is a config; name its run by --checkpoint DIR")
    experiment = load(args.config, args.overrides)
    task = asking(experiment, args.config)
    image = read(args.image, task.test.source.size)
    asked(asks(task.test), args.question)  # Before the checkpoint is read.
    _, made, params = restored(experiment, args.checkpoint)
    answer = asker(trained(experiment, made, params), task.test)
    for word in answer(image, args.question):
        print(word, end=" ", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
