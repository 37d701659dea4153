"""An answer as it comes: `python -m evaluate.ask CONFIG IMAGE "question" --checkpoint DIR`."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evaluate.run import Trained, restored, trained
from jaxformer.data.images import Decode, resized
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import END, IMAGE, PAD, WORDS, Ask, encode
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.layers.cache import Stepper, empty
from jaxformer.program import entry

STEPS = 8  # words of the longest answer.
FILL = 8  # tokens: prompts are as long as a multiple of it.


def asker(trained: Trained, test: Pipeline) -> Callable[[np.ndarray, str], Iterator[str]]:
    """Who gives the words of the likeliest answer to a question, one after the other.

    It is called with an image `[Y, X, 1]`, uint8 or float32 in [0, 1], bright digits on black,
    and a question in the words of the scenes. What one question has compiled serves all whose
    prompt, filled up to a multiple of 8 tokens, is as long.

    Args:
      trained: a `models.vlm.VLM` and its parameters.
      test: a pipeline as the model was evaluated with, which ends in `data.scenes.Ask`.
    """
    *before, ask = test.transforms
    if not isinstance(ask, Ask):
        raise InputError(f"the transforms end in {type(ask).__name__}; they must end in Ask")
    model: Any = trained.model

    # One row does not divide over a mesh: it is laid out by no rules.
    @jax.jit
    def first(params, tokens, lengths, images):
        variables, T = {"params": params}, tokens.shape[1]
        step = Stepper.prompted(model, variables, tokens, lengths, {"images": images})
        at = jnp.where(jnp.arange(T)[None] < lengths[:, None], jnp.arange(T)[None], -1)
        cache = empty(model, variables, 1, T + STEPS)
        logits, cache = step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)
        return logits[:, -1].argmax(-1), cache, step.then

    @jax.jit
    def after(params, then, cache, word, at):
        step = Stepper(model, {"params": params}, then=then)
        logits, cache = step(cache, word[:, None], at[:, None])
        return logits[:, -1].argmax(-1), cache

    def answer(image: np.ndarray, question: str) -> Iterator[str]:
        record: dict[str, Any] = {"image": image, "source": "the image"}
        for transform in before:
            record = transform(record)
        prompt = [IMAGE] * ask.places + asked(question)
        tokens = jnp.array([prompt + [PAD] * (-len(prompt) % FILL)])
        at, images = jnp.array([len(prompt)]), jnp.asarray(record["image"])[None, None]
        word, cache, then = first(trained.params, tokens, at, images)
        for _ in range(STEPS):
            if int(word[0]) == END:
                return
            yield WORDS[int(word[0])]
            word, cache = after(trained.params, then, cache, word, at)
            at += 1

    return answer


def asked(question: str) -> list[int]:
    """The ids of a question.

    Raises:
      InputError: it is empty, or in other words than those of the scenes.
    """
    if not question.strip():
        raise InputError("the question is empty; ask something")
    return encode(question)


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
    asked(args.question)  # Before the checkpoint is read.
    _, made, params = restored(experiment, args.checkpoint)
    answer = asker(trained(experiment, made, params), task.test)
    for word in answer(image, args.question):
        print(word, end=" ", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
