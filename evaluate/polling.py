"""Is it there or not? Balanced questions of presence, and what the answers are worth.

Source: Li et al. 2023 (POPE, arXiv 2305.10355): a model that sees what is not there says yes
too often, which accuracy over unbalanced questions does not tell.
"""

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluate.generate import generate
from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.images import pixels_of
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import IMAGE, NAMES, Ask, decode, encode
from jaxformer.errors import InputError
from jaxformer.samplers.logits import GREEDY

Absent = Literal["random", "popular", "adversarial"]


class Poll(NamedTuple):
    """Is `thing` in image number `image`? `truth` tells."""

    image: int
    thing: Any
    truth: bool


def polls(
    images: Sequence[set], absent: Absent = "random", each: int = 3, seed: int = 0
) -> list[Poll]:
    """As many questions about what an image has as about what it has not, image by image.

    Args:
      images: what each has; all of it together is what is asked about.
      absent: what is asked of those that an image has not: any; those that most images have;
        or those that stand most often beside what this image has.
      each: questions of either kind about an image, fewer where it has or lacks fewer.
      seed: of the draw, and of the order of ties.
    """
    draw = np.random.default_rng(seed)
    every = sorted(set().union(*images))
    often = collections.Counter(thing for image in images for thing in image)
    beside = collections.Counter(
        pair for image in images for pair in itertools.permutations(image, 2)
    )
    found = []
    for number, image in enumerate(images):
        there = [every[i] for i in draw.permutation(len(every)) if every[i] in image]
        others = [every[i] for i in draw.permutation(len(every)) if every[i] not in image]
        if absent == "popular":
            others.sort(key=lambda thing: -often[thing])
        elif absent == "adversarial":
            others.sort(key=lambda thing, image=image: -sum(beside[thing, x] for x in image))
        count = min(each, len(there), len(others))
        found += [Poll(number, thing, True) for thing in there[:count]]
        found += [Poll(number, thing, False) for thing in others[:count]]
    return found


def yes_no(said: Sequence[bool], truth: Sequence[bool]) -> metrics.Metrics:
    """What answers are worth: sums of integers, which add up over any parts.

    `yes` is the share of yes, 0.5 where it is as often as it is true; `f1` is twice the right
    ones over those said and those true.
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(said, truth, strict=True)]
    right, wrong = pairs.count((True, True)), pairs.count((True, False))
    missed, refused = pairs.count((False, True)), pairs.count((False, False))
    found = {
        "accuracy": metrics.Mean(right + refused, len(pairs)),
        "precision": metrics.Mean(right, right + wrong),
        "recall": metrics.Mean(right, right + missed),
        "f1": metrics.Mean(2 * right, 2 * right + wrong + missed),
        "yes": metrics.Mean(right + wrong, len(pairs)),
    }
    return metrics.to_host(found)


@dataclass(frozen=True)
class Presence:
    """Polls of the digits of scenes: a count that is not 0 is a yes, see `yes_no`.

    `test` is a pipeline as `data.scenes.Ask` ends it. Answers are generated.
    """

    test: Pipeline
    absent: Absent = "random"
    each: int = 1

    def run(self, trained: Trained) -> metrics.Metrics:
        *before, ask = self.test.transforms
        if not isinstance(ask, Ask):
            raise InputError(f"the transforms end in {type(ask).__name__}, and not in Ask")
        scenes = [self.test.source[i] for i in range(len(self.test.source))]
        digits = [{int(d) for d in scene["digits"] if d >= 0} for scene in scenes]
        asked = polls(digits, self.absent, self.each)
        prompts, beside = [], []
        for poll in asked:
            record = scenes[poll.image]
            for transform in before:
                record = transform(record)
            question = encode(f"how many {NAMES[poll.thing]} are there ?")
            prompts.append([IMAGE] * ask.places + question)
            beside.append({"images": pixels_of(record)[None]})
        length = max(map(len, prompts)) + 1
        made = generate(trained, prompts, length=length, steps=1, law=GREEDY, beside=beside)
        said = [decode(ids) != "0" for ids in made]
        return yes_no(said, [poll.truth for poll in asked])
