"""Statements hidden in functions of Python that a model fills in, by all it is shown."""

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from evaluate.completions import parses
from evaluate.edits import edits
from evaluate.generate import Records, generate
from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.loader import Pipeline
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError
from jaxformer.models.mdlm import denoiser
from jaxformer.samplers.logits import GREEDY, Law
from jaxformer.samplers.unmask import Count, Show, sample

STEPS = Count(64)  # One token a step, up to 64.


class Hole(NamedTuple):
    """A document as ids, and which of them, from `start` to `stop`, are hidden."""

    source: str
    ids: np.ndarray
    start: int
    stop: int


@dataclass(frozen=True)
class Infill:
    """Fills holes in held-out files, one at a time; `exact`, `similarity` and `parse`.

    Hidden are the lines of one statement within a function or method, neither its first nor
    its last, of `most` tokens at most, and what its first and last token hold of the lines
    beside it. A model that sees both ways, with `mask_id`, is given `length` tokens around the
    hole, `before` of what is seen in front of it; a model of the next token as many in front,
    and goes on. Both are told how many tokens are hidden, and no more. Where a file has as
    many tokens left, a hole begins at a multiple of `align`: filled by blocks of so many it
    lies in the fewest.

    `exact` are those filled with what was hidden; `similarity` is 1 less the edits of letters
    to get there, by the longer of the two; `parse` are files that Python's parser takes with
    what was filled in. `count` holes are taken, evenly from all in files of a row or more.
    """

    test: Any  # a source of documents in Python, such as `corpus.Stdlib("test")`.
    tokenizer: Tokenizer
    length: int
    mask_id: int | None = None  # None: the model is one of the next token.
    block: int | None = None  # of a model of block diffusion, which divides the length.
    shift: bool = False  # as of `models.mdlm.denoiser`.
    show: Show = STEPS
    law: Law = GREEDY
    before: float = 0.5
    most: int = 32
    count: int = 64
    seed: int = 0
    align: int = 1

    def check(self) -> None:
        """Raises InputError where there is no room for a hole."""
        if not 1 <= self.most < self.length:
            raise InputError(f"most={self.most} must be from 1 to {self.length - 1}")
        if not 0 <= self.before <= 1:
            raise InputError(f"before={self.before} must be a share, from 0 to 1")
        if self.count < 1:
            raise InputError(f"count={self.count} must be 1 hole or more")
        if self.align < 1:
            raise InputError(f"align={self.align} must be 1 token or more")
        if self.block is not None and self.length % self.block:
            raise InputError(f"block={self.block} must divide length={self.length}")

    def holes(self) -> list[Hole]:
        """What is hidden."""
        return list(_holes(self))

    def canvas(self, hole: Hole) -> tuple[np.ndarray, int]:
        """The ids that a model is given, with masks, and where the hole begins in them."""
        count = hole.stop - hole.start
        first = hole.start - round(self.before * (self.length - count))
        last = len(hole.ids) - self.length
        first = min(max(first, 0), last)
        ahead = (hole.start - first) % self.align
        first += ahead if first + ahead <= last else 0
        ids = hole.ids[first : first + self.length].copy()
        at = hole.start - first
        ids[at : at + count] = -1 if self.mask_id is None else self.mask_id
        return ids, at

    def fill(self, trained: Trained) -> list[tuple[Hole, np.ndarray]]:
        """Each hole, and the ids that the model says are hidden there."""
        holes = self.holes()
        if self.mask_id is None:
            return list(zip(holes, self._from_the_left(trained, holes), strict=True))
        found = []
        for hole, row in zip(holes, self.unmask(trained, holes)[0], strict=True):
            at = self.canvas(hole)[1]
            found.append((hole, row[at : at + hole.stop - hole.start]))
        return found

    def unmask(self, trained: Trained, holes: list[Hole]) -> tuple[np.ndarray, np.ndarray]:
        """The canvases filled, and the step that showed each token, -1 if it was given."""
        mask_id = self.mask_id
        if mask_id is None:
            raise InputError("a model of the next token has no mask; set mask_id")
        records = [
            {"tokens": self.canvas(hole)[0].astype(np.int32), "number": np.int32(number)}
            for number, hole in enumerate(holes)
        ]
        model: Any = trained.model

        def run(apply, params, batch):
            key = jax.random.key(self.seed)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["number"])
            made = sample(
                denoiser(model, params, shift=self.shift, block=self.block),
                batch["tokens"],
                keys,
                mask_id=mask_id,
                show=self.show,
                law=self.law,
                block=self.block,
            )
            return made.tokens, made.shown

        return trained.collect(run, Pipeline(Records(records)))

    def _from_the_left(self, trained: Trained, holes: list[Hole]) -> list[np.ndarray]:
        made = generate(
            trained,
            [hole.ids[: hole.start].tolist() for hole in holes],
            length=self.length,
            steps=self.most,
            law=self.law,
            seed=self.seed,
        )
        pairs = zip(holes, made, strict=True)
        return [np.asarray(ids[: h.stop - h.start], np.int32) for h, ids in pairs]

    def run(self, trained: Trained) -> metrics.Metrics:
        return self.judge(self.fill(trained))

    def judge(self, filled: Sequence[tuple[Hole, np.ndarray]]) -> metrics.Metrics:
        """What holes filled with these ids are worth."""
        exact = parse = 0
        similar = 0.0
        for hole, ids in filled:
            text, told = self._text(hole, ids), self.tokenizer.decode(ids)
            true = self.tokenizer.decode(hole.ids[hole.start : hole.stop])
            exact += told == true
            similar += similarity(told, true)
            parse += parses(text)
        count = np.int64(len(filled))
        return {
            "exact": metrics.Mean(np.int64(exact), count),
            "similarity": metrics.Mean(np.float64(similar), count),
            "parse": metrics.Mean(np.int64(parse), count),
        }

    def _text(self, hole: Hole, ids: np.ndarray) -> str:
        whole = np.concatenate([hole.ids[: hole.start], ids, hole.ids[hole.stop :]])
        return self.tokenizer.decode(whole)


@functools.cache
def _holes(task: Infill) -> tuple[Hole, ...]:
    records = [task.test[index] for index in range(len(task.test))]
    found = []
    tokenizer = task.tokenizer
    for index, ids in enumerate(tokenizer.encode([r["text"] for r in records])):
        around = [[] if i is None else [i] for i in (tokenizer.begin, tokenizer.end)]
        ids = np.concatenate([around[0], ids, around[1]]).astype(np.int32)
        if len(ids) < task.length:
            continue
        ends = np.cumsum(tokenizer.lengths[ids])
        spans = []
        for low, high in statements(records[index]["text"]):
            # Whole tokens, those that hold a byte of it.
            start, stop = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high)
            if start > 0 and stop - start + 1 <= task.most:
                spans.append((int(start), int(stop) + 1))
        source = records[index].get("source", str(index))
        found += [Hole(source, ids, *span) for span in spans]
    if not found:
        raise InputError(
            f"no document of {task.length} tokens has a statement of {task.most} or fewer "
            "within a function; give files of Python"
        )
    keep = np.linspace(0, len(found) - 1, min(task.count, len(found))).round().astype(int)
    return tuple(found[i] for i in keep)


def statements(text: str) -> list[tuple[int, int]]:
    """Bytes from and to of the lines of statements within functions, as they stand.

    Neither the first statement of a function nor its last, and none that shares a line.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    # Not by str.splitlines, which ends lines where Python does not.
    ends = np.cumsum([0, *(len(f"{line}\n".encode()) for line in text.split("\n"))])
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for before, here, after in zip(node.body, node.body[1:], node.body[2:], strict=False):
            last = here.end_lineno or here.lineno
            if (before.end_lineno or 0) < here.lineno and last < after.lineno:
                found.append((int(ends[here.lineno - 1]), int(ends[last])))
    return sorted(found)


def similarity(a: str, b: str) -> float:
    """1 less the Levenshtein distance by the longer length; two empty texts are alike."""
    return 1 - edits(a, b) / max(len(a), len(b), 1)
