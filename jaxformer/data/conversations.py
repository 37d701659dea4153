"""Conversations as rows of ids of which only the answers are learned."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxformer.data.corpus import Lines
from jaxformer.data.rows import first_fit
from jaxformer.data.shards import Reopened
from jaxformer.data.sources import Record
from jaxformer.data.templates import PLAIN, Template, encode
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError


@dataclass(frozen=True)
class Conversations(Reopened):
    """JSON Lines of conversations, whole ones side by side in rows of `length` tokens.

    A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}`,
    as OpenAI has it, or `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt",
    ...}]}`, as ShareGPT has it; see `messages`. It is written as `template` says, see
    `data.templates`; `answer` is 1 for what the assistant says and the end of it.

    `source[i]` is `{"tokens", "segments", "answer"}`, int32 `[length]` each, see `rows`. A
    conversation goes into the first row that has room for it, of the last 64.

    Raises:
      InputError: a line that is no such conversation, or longer than a row, by file and
        line; with `cut` the latter is cut at its end instead.
    """

    paths: str | tuple[str, ...]
    tokenizer: Tokenizer
    length: int
    cut: bool = False
    template: Template = PLAIN

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @functools.cached_property
    def _rows(self) -> list[list[tuple[Any, Any]]]:
        lines = Lines(self.paths)
        made = [self._encoded(lines[index]) for index in range(len(lines))]
        rows = first_fit([(len(ids),) for ids, _ in made], (self.length,))
        return [[made[i] for i in row] for row in rows]

    def _encoded(self, record: Record) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        where = record["source"]
        ids, answer = encode(messages(record), self.template, self.tokenizer)
        if not answer[: self.length].any():
            rest = "in what is left of it " if answer.any() else ""
            raise InputError(f"{where}: there is no answer {rest}to learn; leave the line out")
        if len(ids) > self.length and not self.cut:
            raise InputError(
                f"{where}: has {len(ids)} tokens and a row length={self.length}; leave the "
                "line out, make rows longer, or set cut=True"
            )
        return ids[: self.length], answer[: self.length]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = {
            name: np.zeros(self.length, np.int32) for name in ("tokens", "segments", "answer")
        }
        start = 0
        for number, (ids, answer) in enumerate(self._rows[index], 1):
            place = slice(start, start + len(ids))
            row["tokens"][place], row["answer"][place] = ids, answer
            row["segments"][place] = number
            start += len(ids)
        return row | {"source": f"row {index}"}


# The roles of each layout, and ours.
_OPENAI = {r: r for r in ("system", "user", "assistant")} | {"developer": "system"}
_SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant"} | _OPENAI


def messages(record: Record) -> list[tuple[str, str]]:
    """Role and content of each message of a line, or InputError that names file and line.

    Roles are system, user and assistant; OpenAI's developer is system, ShareGPT's human and
    gpt are user and assistant. A content is text, or a list of parts of text.
    """
    where, found = record.get("source", "a record"), []
    layouts = {
        "messages": ("role", "content", _OPENAI),
        "conversations": ("from", "value", _SHAREGPT),
    }
    field = next((name for name in layouts if name in record), "messages")
    who, what, roles = layouts[field]
    said = record.get(field)
    if not isinstance(said, list) or not said:
        raise InputError(
            f'{where}: has no "messages"; a conversation is {{"messages": [{{"role": "user", '
            '"content": "..."}, ...]} or {"conversations": [{"from": "human", "value": "..."}, '
            "...]}"
        )
    for number, message in enumerate(said):
        message = message if isinstance(message, dict) else {}
        role, content = message.get(who), _text(message.get(what))
        for name, value in ((who, role), (what, content)):
            if not isinstance(value, str):
                raise InputError(
                    f"{where}: message {number} has no {name!r} that is text; add it or leave "
                    "the line out"
                )
        if role not in roles:
            raise InputError(
                f"{where}: message {number} has the role {role!r}, which is none of "
                f"{', '.join(roles)}"
            )
        if roles[role] == "assistant" and not content.strip():
            raise InputError(f"{where}: message {number} is an empty answer; leave it out")
        found.append((roles[role], content))
    return found


def _text(content: Any) -> Any:
    """Parts of text as one; what is no text stays as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") != "text":
            return content
        texts.append(text)
    return "".join(texts)
