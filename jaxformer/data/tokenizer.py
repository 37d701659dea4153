"""Text to ids and back: bytes, a `tokenizer.json`, or one that is learned from texts.

A tokenizer has `vocab`, the number of its ids; `begin` and `end`, the ids that stand before
and after a text, None for none; `encode(texts)`, int32 ids of each text without the two;
`decode(ids)`; and `lengths`, how many bytes each id stands for, `[vocab]`.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxformer.errors import InputError

BEGIN, END = "<|begin|>", "<|end|>"
_TEXTS = 64  # encoded at a time: what the library gives back is large.


@dataclass(frozen=True)
class Bytes:
    """Each byte of the UTF-8 text is its own id; 256 begins a text and 257 ends it.

    >>> Bytes().encode(["Aé"])[0].tolist(), Bytes().decode([256, 65, 195, 169, 257])
    ([65, 195, 169], 'Aé')
    """

    vocab = 258
    begin = 256
    end = 257

    @property
    def lengths(self) -> Int[np.ndarray, " V"]:
        return (np.arange(self.vocab) < 256).astype(np.int32)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

    def decode(self, ids: Iterable[Any]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        ids = [int(i) for i in ids]
        if not all(0 <= i < self.vocab for i in ids):
            raise InputError(
                f"ids must be from 0 to {self.vocab - 1}, not {min(ids)}, {max(ids)}"
            )
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` as Hugging Face's tokenizers write it.

    `begin` and `end` are tokens by name. What looks like a special token inside of a text
    is text. `lengths` are exact for tokenizers on bytes (GPT-2, Llama 3, Qwen), and for
    others those of the token as it is spelled.

    Raises:
      InputError: no such file, it is no tokenizer, or it has no such token.
    """

    path: str
    begin_token: str | None = None
    end_token: str | None = "<|endoftext|>"

    @property
    def vocab(self) -> int:
        return 1 + max(self._tokenizer.get_vocab().values())

    @property
    def begin(self) -> int | None:
        return None if self.begin_token is None else self.id(self.begin_token)

    @property
    def end(self) -> int | None:
        return None if self.end_token is None else self.id(self.end_token)

    @property
    def lengths(self) -> Int[np.ndarray, " V"]:
        return _lengths(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        return _encode(self._tokenizer, texts)

    def decode(self, ids: Iterable[Any]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    @property
    def _tokenizer(self) -> Any:
        return read(self.path)

    def id(self, token: str) -> int:
        """That of a token by its name."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError(
                f"{self.path}: has no token {token!r}; name its own begin_token and end_token, "
                "or None, and a template of its model"
            )
        return found


@dataclass(frozen=True)
class Learned:
    """Byte pairs learned from a source of texts when they are first asked for.

    The same texts give the same `vocab` ids: `<|begin|>` is 0 and `<|end|>` is 1. See
    `learn`; `python -m train.tokenizer` keeps one in a file.
    """

    source: Any  # of records with `text`, such as `Stdlib("train")`.
    vocab: int
    begin = 0
    end = 1

    @property
    def lengths(self) -> Int[np.ndarray, " V"]:
        return _lengths(_learned(self.source, self.vocab))

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        return _encode(_learned(self.source, self.vocab), texts)

    def decode(self, ids: Iterable[Any]) -> str:
        return _learned(self.source, self.vocab).decode([int(i) for i in ids])


Tokenizer = Bytes | TokenizerFile | Learned  # Or what has the same names.


def learn(source: Any, vocab: int) -> Any:
    """Byte-pair encoding on bytes, after Sennrich et al. 2016 and GPT-2: a `Tokenizer`.

    `.save(path)` writes its `tokenizer.json`.

    Args:
      source: records with `text`, `len` and `[]`.
      vocab: ids in all: the two marks, 256 bytes, and the rest is learned.

    Raises:
      InputError: fewer ids than that, or texts that do not yield as many.
    """
    tokenizers = _library()
    if vocab < 258:
        raise InputError(f"vocab={vocab} must be 258 or more: 256 bytes and two marks")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (source[i]["text"] for i in range(len(source)))
    made.train_from_iterator(texts, trainer, length=len(source))
    if made.get_vocab_size() < vocab:
        raise InputError(
            f"the texts yield {made.get_vocab_size()} tokens and vocab={vocab} asks for more; "
            "give more text or a smaller vocabulary"
        )
    return _as_text(made)


@functools.cache
def read(path: str) -> Any:
    """The tokenizer of a `tokenizer.json`, in which special tokens are text.

    Raises:
      InputError: no such file, or it is no tokenizer.
    """
    tokenizers = _library()
    try:
        return _as_text(tokenizers.Tokenizer.from_file(path))
    except Exception as error:  # It raises nothing more special.
        raise InputError(
            f"{path}: is no tokenizer.json ({error}); name one as tokenizers write it"
        ) from error


_learned = functools.cache(learn)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise InputError(
            'a tokenizer of its own needs tokenizers; pip install "jaxformer[hf]"'
        ) from None
    return tokenizers


def _as_text(tokenizer: Any) -> Any:
    tokenizer.encode_special_tokens = True  # A text that spells one does not end there.
    return tokenizer


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
    found = []
    for first in range(0, len(texts), _TEXTS):
        some = list(texts[first : first + _TEXTS])
        made = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        found += [np.array(encoding.ids, np.int32) for encoding in made]
    return found


def _lengths(tokenizer: Any) -> Int[np.ndarray, " V"]:
    """Bytes by id; marks stand for none."""
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(1 + max(vocab.values()), np.int32)
    on_bytes = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    for token, index in vocab.items():
        # On bytes, a letter of the token is a byte.
        lengths[index] = len(token) if on_bytes else _spelled(token)
    for index, mark in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if mark.special else len(mark.content.encode())
    return lengths


def _spelled(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x"):
        return 1
    return len(token.replace("\u2581", " ").encode())
