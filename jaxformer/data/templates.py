"""How a conversation is written, model by model: text, special tokens, and what is learned.

A template has `write(said)`, from roles and contents of messages to parts in their order, each
a `Token` or a `Text`; and `frame`, the tokens before and after an image, or None.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError

MARK = "<image>"  # Where an image stands in a content.
BEGIN, END = "begin", "end"
Said = Sequence[tuple[str, str]]  # role (system, user, assistant) and content.


class Token(NamedTuple):
    """A special token by name; or `BEGIN` and `END`, those of the tokenizer.

    Where it has none, nothing stands for a begin, and a line break for an end.
    """

    name: str
    learned: bool = False


class Text(NamedTuple):
    """Text that is encoded at once: what stands before, and what is learned of it."""

    before: str
    answer: str = ""


Part = Token | Text


def _text(before: str, role: str, content: str) -> Text:
    return Text(before, content) if role == "assistant" else Text(before + content)


@dataclass(frozen=True)
class Plain:
    """`<|role|>` as text, a line break, the content, and the tokenizer's end."""

    frame = None

    def write(self, said: Said) -> Iterator[Part]:
        yield Token(BEGIN)
        for role, content in said:
            yield Text(f"<|{role}|>\n")
            yield _text("", role, content)
            yield Token(END, role == "assistant")


@dataclass(frozen=True)
class Vicuna:
    """`SYSTEM USER: question ASSISTANT: answer</s>USER: ...` of Vicuna 1.1 and LLaVA 1.5.

    What the system says in a conversation takes the place of `system`. Source: FastChat's
    `vicuna_v1.1`, which is LLaVA's `v1`.
    """

    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    frame = None

    def write(self, said: Said) -> Iterator[Part]:
        system, rest = _system(said, self.system)
        yield Token(BEGIN)
        before = f"{system} " if system else ""
        for role, content in rest:
            if role == "assistant":
                yield Text(f"{before}ASSISTANT:", f" {content}" if content else "")
                yield Token(END, True)
                before = ""
            else:
                before += f"USER: {content} "


@dataclass(frozen=True)
class Llama3:
    """`<|start_header_id|>role<|end_header_id|>`, an empty line, the content, `<|eot_id|>`.

    Contents lose the white space at their ends. Source: the template of Llama 3 8B Instruct.
    Those of 3.1 and later begin with a message of the system that tells the date: write it.
    """

    frame = None

    def write(self, said: Said) -> Iterator[Part]:
        yield Token("<|begin_of_text|>")
        for role, content in said:
            yield Token("<|start_header_id|>")
            yield Text(role)
            yield Token("<|end_header_id|>")
            yield _text("\n\n", role, content.strip())
            yield Token("<|eot_id|>", role == "assistant")


@dataclass(frozen=True)
class Qwen:
    """`<|im_start|>role`, a line break, the content and `<|im_end|>`, of Qwen 2 and Qwen2-VL.

    `system` is said where a conversation begins without; "" is nothing (Qwen 3). Source: the
    templates of both.
    """

    system: str = "You are a helpful assistant."
    frame = ("<|vision_start|>", "<|vision_end|>")

    def write(self, said: Said) -> Iterator[Part]:
        system, rest = _system(said, self.system)
        first = [("system", system)] if system else []
        for role, content in (*first, *rest):
            yield Token("<|im_start|>")
            yield _text(f"{role}\n", role, content)
            yield Token("<|im_end|>", role == "assistant")
            yield Text("\n")


@dataclass(frozen=True)
class Captions:
    """Images, what is said of them and a line break: nothing of a question, and no end.

    Source: LLaVA's `plain`, with which its connector is aligned.
    """

    frame = None

    def write(self, said: Said) -> Iterator[Part]:
        yield Token(BEGIN)
        for role, content in said:
            if role == "assistant":
                yield Text("", f"{content}\n")
            else:
                yield Text(MARK * content.count(MARK))


Template = Plain | Vicuna | Llama3 | Qwen | Captions  # Or what has the same names.
PLAIN = Plain()


def encode(
    said: Said, template: Template, tokenizer: Tokenizer, image: Sequence[int] | None = None
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Ids of a conversation, and 1 for those that are learned: answers and their ends.

    What looks like a special token in a content is text. With `image`, those ids stand in the
    place of each `MARK`, in the template's `frame`.

    Raises:
      InputError: a token of the template that the tokenizer does not have.
    """
    frame = [] if image is None else [special(tokenizer, name) for name in template.frame or ()]
    seen = [*frame[:1], *(image or ()), *frame[1:]]
    ids: list[int] = []
    learned: list[int] = []

    def add(more: Sequence[int], mine: bool = False) -> None:
        ids.extend(more)
        learned.extend([int(mine)] * len(more))

    for part in template.write(said):
        if isinstance(part, Token):
            add(_ids(tokenizer, part.name), part.learned)
            continue
        *pieces, before = [part.before] if image is None else part.before.split(MARK)
        for text in pieces:
            add(tokenizer.encode([text])[0].tolist())
            add(seen)
        # The first token of an answer is that which what stands before it does not have.
        alone, both = (x.tolist() for x in tokenizer.encode([before, before + part.answer]))
        pairs = enumerate(zip(alone, both, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(alone))
        add(both[:same])
        add(both[same:], bool(part.answer))
    return np.array(ids, np.int32), np.array(learned, np.int32)


def prompt(
    said: Said, template: Template, tokenizer: Tokenizer, image: Sequence[int] | None = None
) -> Int[np.ndarray, " n"]:
    """Ids after which the assistant's answer comes, see `encode`."""
    ids, learned = encode([*said, ("assistant", "")], template, tokenizer, image)
    last = np.flatnonzero(learned)[-1]
    others = np.flatnonzero(learned[:last] == 0)
    return ids[: others[-1] + 1 if len(others) else 0]


def special(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token.

    Raises:
      InputError: the tokenizer has none.
    """
    find = getattr(tokenizer, "id", None)
    if find is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no token {name!r}, which the template writes; "
            "take the tokenizer.json of the template's model, or another template"
        )
    return find(name)


def _ids(tokenizer: Tokenizer, name: str) -> Sequence[int]:
    if name == BEGIN:
        return [] if tokenizer.begin is None else [tokenizer.begin]
    if name == END:
        return (
            tokenizer.encode(["\n"])[0].tolist() if tokenizer.end is None else [tokenizer.end]
        )
    return [special(tokenizer, name)]


def _system(said: Said, otherwise: str) -> tuple[str, Said]:
    """What the system says, and the rest."""
    if said and said[0][0] == "system":
        return said[0][1], said[1:]
    return otherwise, said
