"""Functions of Python that a model completes: how many of them parse.

`python -m evaluate.complete` prints some of them.
"""

import ast
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evaluate.generate import generate
from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError
from jaxformer.samplers.logits import Law

COOL = Law(temperature=0.5)


class Opening(NamedTuple):
    """The text of a file up to the first line of a function's body."""

    source: str
    before: str  # the function.
    start: str  # of the function.


@dataclass(frozen=True)
class Completions:
    """Completes functions of held-out files; gives the shares that `parse` and are `whole`.

    A prompt is a file up to the first line in the body of a function that is no method. A
    completion ends where a line begins at the margin, or else with its last whole line; it
    parses where Python's own parser takes the function by itself. It is `whole` where the
    model ended it. `files` of the source, evenly from all, give one function each.
    """

    test: Any  # a source of documents in Python, such as `corpus.Stdlib("test")`.
    tokenizer: Tokenizer
    length: int
    steps: int = 128
    law: Law = COOL
    files: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raises InputError where there is nothing to complete, or no room for it."""
        if not 1 <= self.steps < self.length:
            raise InputError(f"steps={self.steps} must be from 1 to {self.length - 1}")

    def openings(self) -> list[Opening]:
        """The prompts, of files that have one."""
        found = []
        for index in range(len(self.test)):
            record = self.test[index]
            made = opening(record["text"], record.get("source", str(index)))
            found += [] if made is None else [made]
        if not found:
            raise InputError("no document has a function to complete; give files of Python")
        keep = np.linspace(0, len(found) - 1, min(self.files, len(found))).round().astype(int)
        return [found[i] for i in keep]

    def complete(self, trained: Trained) -> list[tuple[Opening, str, bool]]:
        """Each opening, the function as it was completed, and whether it was ended."""
        prompts = self.openings()
        encoded = self.tokenizer.encode([p.before + p.start for p in prompts])
        begin = [] if self.tokenizer.begin is None else [self.tokenizer.begin]
        made = generate(
            trained,
            [[*begin, *ids.tolist()] for ids in encoded],
            length=self.length,
            steps=self.steps,
            law=self.law,
            end=self.tokenizer.end,
            seed=self.seed,
        )
        found = []
        for prompt, ids in zip(prompts, made, strict=True):
            text, whole = function(prompt.start + self.tokenizer.decode(ids))
            found.append((prompt, text, whole or len(ids) < self.steps))
        return found

    def run(self, trained: Trained) -> metrics.Metrics:
        made = self.complete(trained)
        count = np.int64(len(made))
        right = {
            "parse": sum(parses(text) for _, text, _ in made),
            "whole": sum(whole for _, _, whole in made),
        }
        return {name: metrics.Mean(np.int64(n), count) for name, n in right.items()}


def opening(text: str, source: str) -> Opening | None:
    """What comes before the second line in the body of a file's last longer function."""
    try:
        nodes = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and len(n.body) > 1]
    if not functions:
        return None
    chosen = functions[-1]
    # Not by str.splitlines, which ends lines where Python does not.
    lines = [f"{line}\n" for line in text.split("\n")]
    first = min([chosen.lineno, *(d.lineno for d in chosen.decorator_list)]) - 1
    stop = chosen.body[0].end_lineno
    return Opening(source, "".join(lines[:first]), "".join(lines[first:stop]))


def function(text: str) -> tuple[str, bool]:
    """The function that a text begins with, in whole lines, and whether the text goes on."""
    lines = text.split("\n")
    inside = False
    for number, line in enumerate(lines):
        margin = bool(line) and not line[0].isspace() and line[0] not in "#)]}"
        if margin and inside and number < len(lines) - 1:
            return "\n".join(lines[:number]) + "\n", True
        inside |= line.startswith(("def ", "async def "))
    return "\n".join(lines[:-1]) + "\n", False


def parses(text: str) -> bool:
    """Whether Python's parser takes it."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
