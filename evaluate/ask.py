"""An answer as it comes: `python -m evaluate.ask CONFIG IMAGE "question" --checkpoint DIR`."""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evaluate.run import Trained, restored, trained
from jaxformer.data.images import Decode, resized
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import END, IMAGE, WORDS, Ask, encode
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.layers.cache import Stepper, empty
from jaxformer.program import entry

STEPS = 8  # words of the longest answer.


def words(trained: Trained, test: Pipeline, image: np.ndarray, question: str) -> Iterator[str]:
    """The words of the likeliest answer, one after the other.

    Args:
      trained: a `models.vlm.VLM` and its parameters.
      test: a pipeline as the model was evaluated with, which ends in `data.scenes.Ask`.
      image: `[Y, X, 1]`, uint8 or float32 in [0, 1]; bright digits on black.
      question: in the words of the scenes.
    """
    *before, ask = test.transforms
    if not isinstance(ask, Ask):
        raise InputError(f"the transforms end in {type(ask).__name__}; they must end in Ask")
    record: dict[str, Any] = {"image": image, "source": "the image"}
    for transform in before:
        record = transform(record)
    prompt = [IMAGE] * ask.places + encode(question)
    model: Any = trained.model
    variables = {"params": trained.params}
    images = jnp.asarray(record["image"])[None, None]
    # One row does not divide over a mesh: it is laid out by no rules.
    cache = empty(model, variables, 1, len(prompt) + STEPS)
    step = Stepper(model, variables, {"images": images})
    run = jax.jit(lambda *new, fresh: step(*new, fresh=fresh), static_argnames="fresh")
    at = jnp.arange(len(prompt))[None]
    logits, cache = run(cache, jnp.array([prompt]), at, fresh=True)
    for number in range(len(prompt), len(prompt) + STEPS):
        word = int(logits[0, -1].argmax())
        if word == END:
            return
        yield WORDS[word]
        new = jnp.array([[word]]), jnp.array([[number]])
        logits, cache = run(cache, *new, fresh=False)


def read(path: str, size: tuple[int, int]) -> np.ndarray:
    """A picture of a file in grey, of `size` pixels, (rows, columns).

    Raises:
      InputError: no such file, or it is no picture.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a picture") from None
    return decoded(data, path, size)


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
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("image", help="a PNG, JPEG, WebP or BMP: bright digits on black")
    parser.add_argument("question", help="such as 'what is the sum ?'")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.image=1")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    task = asking(experiment, args.config)
    image = read(args.image, task.test.source.size)
    encode(args.question)  # Before the checkpoint is read.
    _, made, params = restored(experiment, args.checkpoint)
    for word in words(trained(experiment, made, params), task.test, image, args.question):
        print(word, end=" ", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
