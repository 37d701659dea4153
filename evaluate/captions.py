"""Captions beside those of people: CIDEr and BLEU.

Sources: Vedantam et al. 2015 (arXiv 1411.5726), whose CIDEr-D is computed as by COCO's code
(pycocoevalcap); Papineni et al. 2002, by the library sacrebleu.
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.generate import generate
from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.images import pixels_of
from jaxformer.data.loader import Pipeline
from jaxformer.data.templates import MARK, PLAIN, Template, prompt
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError
from jaxformer.samplers.logits import GREEDY

LONGEST, SPREAD = 4, 6.0  # words of an n-gram; of lengths, for which a caption is marked down.
Grams = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Captions:
    """`cider` and `bleu` of what a model says of each image of `test`, see `scores`.

    Records have `captions`, a list of texts, and `image`, which the transforms make float32
    pixels of (`data.coco.Captions`). Captions are generated greedily, up to the tokenizer's
    end, a line break or `steps` tokens.
    """

    test: Pipeline
    tokenizer: Tokenizer
    image: int  # the token in whose places features stand,
    features: int  # so many for an image.
    template: Template = PLAIN
    question: str = f"{MARK}\nDescribe the image in one sentence."
    steps: int = 32

    def run(self, trained: Trained) -> metrics.Metrics:
        beside, references = [], []
        for index in range(len(self.test.source)):
            record = self.test.source[index]
            references.append(record["captions"])
            for transform in self.test.transforms:
                record = transform(record)
            beside.append({"images": pixels_of(record)[None]})
        said, places = [("user", self.question)], [self.image] * self.features
        ids = prompt(said, self.template, self.tokenizer, places).tolist()
        made = generate(
            trained,
            [ids] * len(beside),
            length=len(ids) + self.steps,
            steps=self.steps,
            law=GREEDY,
            end=self.tokenizer.end,
            beside=beside,
        )
        texts = [self.tokenizer.decode(ids).strip().partition("\n")[0] for ids in made]
        return scores(texts, references)


def scores(made: Sequence[str], references: Sequence[Sequence[str]]) -> metrics.Metrics:
    """`cider`, a mean over images from 0 to 10, and `bleu`, of all together, from 0 to 100.

    Both compare `words` of what was `made` for each image with those of all its `references`.

    Raises:
      InputError: no images, one without a reference, or sacrebleu is not there.
    """
    if len(made) != len(references) or not made or not all(references):
        raise InputError(
            f"{len(made)} captions and {len(references)} lists of references were given; give "
            "each image one caption and at least one reference"
        )
    each = cider(made, references)
    found = {
        "cider": metrics.Mean(math.fsum(each), len(each)),
        "bleu": metrics.Mean(bleu(made, references), 1),
    }
    return metrics.to_host(found)


def words(text: str) -> list[str]:
    """Words in small letters, without punctuation; COCO's own splits "cat's" in two.

    >>> words("A cat's hat, 2 m wide.")
    ['a', "cat's", 'hat', '2', 'm', 'wide']
    """
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())


def cider(made: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image: likeness of n-grams, of which those of few images count most.

    Of one image alone every n-gram is common, and likeness is 0.
    """
    theirs = [[_grams(text) for text in texts] for texts in references]
    often = collections.Counter(gram for some in theirs for gram in set().union(*some))
    rare = {gram: math.log(len(made)) - math.log(count) for gram, count in often.items()}
    unseen = math.log(len(made))

    def weighed(grams: Grams) -> Grams:
        return {gram: count * rare.get(gram, unseen) for gram, count in grams.items()}

    found = []
    for text, some in zip(made, theirs, strict=True):
        own = _grams(text)
        likes = (_likeness(weighed(own), weighed(x), _pairs(own) - _pairs(x)) for x in some)
        found.append(10 * math.fsum(likes) / len(some))
    return found


def bleu(made: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all captions, without smoothing."""
    try:
        import sacrebleu
    except ImportError:
        raise InputError('BLEU needs sacrebleu; pip install "jaxformer[captions]"') from None
    most = max(map(len, references))
    columns: Any = [
        [" ".join(words(texts[i])) if i < len(texts) else None for texts in references]
        for i in range(most)
    ]
    texts = [" ".join(words(text)) for text in made]
    found = sacrebleu.corpus_bleu(
        texts, columns, smooth_method="none", tokenize="none", force=True
    )
    return float(found.score)


def _grams(text: str) -> Grams:
    found, own = collections.Counter(), words(text)
    for n in range(1, LONGEST + 1):
        found.update(tuple(own[i : i + n]) for i in range(len(own) - n + 1))
    return dict(found)


def _pairs(grams: Grams) -> float:
    """What the original takes for a caption's length: its pairs of words."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _likeness(made: Grams, other: Grams, longer: float) -> float:
    """Of n-grams by their weights, the mean over n."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        ours, theirs = ({g: w for g, w in x.items() if len(g) == n} for x in (made, other))
        norms = _norm(ours.values()) * _norm(theirs.values())
        pairs = ((weight, theirs.get(gram, 0.0)) for gram, weight in ours.items())
        both = math.fsum(min(a, b) * b for a, b in pairs)
        total += both / norms if norms else both
    return total / LONGEST * math.exp(-(longer**2) / (2 * SPREAD**2))


def _norm(weights: Iterable[float]) -> float:
    return math.sqrt(math.fsum(w * w for w in weights))
