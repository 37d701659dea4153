"""Rows hold every token, keep documents apart, and are the same however they are read."""

import itertools
import json
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxformer.data.conversations import Conversations
from jaxformer.data.loader import Pipeline, train_batches
from jaxformer.data.rows import Rows, Windows
from jaxformer.data.tokenizer import Bytes, Learned
from jaxformer.data.tokens import LLM_C, Part, Shards, Tokenized, write_shard
from jaxformer.errors import InputError
from tests.data.texts import Texts

documents = st.lists(st.text("abcé", min_size=1, max_size=30), min_size=1, max_size=8)
SOME = Texts(("a first text", "b", "the third of them, which is long"))


def targets(source):
    """(token, target) with what counts, over all rows."""
    pairs = []
    for record in (source[i] for i in range(len(source))):
        tokens, segments = record["tokens"], record["segments"]
        counts = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        if "answer" in record:
            counts &= record["answer"][1:] > 0
        pairs += zip(tokens[:-1][counts].tolist(), tokens[1:][counts].tolist(), strict=True)
    return pairs


def bigrams(texts):
    return [
        pair
        for text in texts
        for ids in [[256, *text.encode(), 257]]
        for pair in itertools.pairwise(ids)
    ]


@hypothesis.given(documents, st.integers(2, 20), st.integers(1, 19))
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_and_of_its_own_document(texts, length, stride):
    tokens = Tokenized(Texts(tuple(texts)), Bytes())
    expected = bigrams(texts)
    assert targets(Rows(tokens, length)) == expected
    windows = Windows(tokens, max(length, stride + 1), stride)
    assert targets(windows) == expected
    for record in (windows[i] for i in range(len(windows))):
        assert record["segments"].max() == 1
        first = int(record["answer"].argmax())
        begins = record["tokens"][0] == 256
        assert begins or first >= windows.length - stride, "what counts has seen enough"
        real = (record["segments"] > 0) & (record["tokens"] < 256)
        assert record["bytes"].tolist() == real.tolist()


def test_a_row_tells_documents_apart_and_counts_their_bytes():
    row = Rows(Tokenized(SOME, Bytes()), 22)[0]
    assert row["segments"].tolist() == [1] * 14 + [2] * 3 + [3] * 5
    assert row["tokens"][14:17].tolist() == [256, ord("b"), 257]
    assert row["bytes"].sum() == 12 + 1 + 4 and row["tokens"].dtype == np.int32
    last = Rows(Tokenized(SOME, Bytes()), 22)[2]
    assert last["segments"].tolist() == [1] * 9 + [0] * 13
    some = Rows(Tokenized(SOME, Bytes()), 6, most=3)
    every = Rows(Tokenized(SOME, Bytes()), 6)
    assert len(some) == 3 and len(every) == 10
    for i, j in enumerate((0, 3, 6)):
        np.testing.assert_array_equal(some[i]["tokens"], every[j]["tokens"])


def test_batches_of_rows_resume_where_they_were():
    pipeline = Pipeline(Rows(Tokenized(SOME, Bytes()), 8))
    whole = train_batches(pipeline, batch_size=2, seed=1)
    expected = [next(whole) for _ in range(5)]
    again = train_batches(pipeline, batch_size=2, seed=1)
    again.set_state({"step": 3})
    for a, b in zip(expected[3:], (next(again), next(again)), strict=True):
        assert set(a) == {"tokens", "segments", "bytes"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("tokenizer", [Bytes(), Learned(SOME, 260)], ids=["bytes", "learned"])
def test_shards_are_the_documents_they_were_written_from(tokenizer, tmp_path):
    path = str(tmp_path / "a.npy")
    tokens = Tokenized(SOME, tokenizer)
    assert write_shard(path, SOME, tokenizer) == len(tokens.parts[0].ids)
    assert not os.path.exists(path + ".part")
    shards = Shards(str(tmp_path / "*.npy"), tokenizer.vocab, lengths=None)
    (part,) = shards.parts
    assert isinstance(part.ids, np.memmap) and part.ids.dtype == np.uint16
    for a, b in zip(part, tokens.parts[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert targets(Rows(shards, 7)) == targets(Rows(tokens, 7))


def test_shards_of_others_end_documents_by_an_id(tmp_path):
    ids = np.array([5, 6, 9, 7, 9, 8, 8], np.uint32)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", ids[:3])
    paths = (str(tmp_path / "a.bin"), str(tmp_path / "b.npy"))
    shards = Shards(paths, 10, end=9, dtype="uint32")
    assert [p.ends.tolist() for p in shards.parts] == [[3, 5, 7], [3]]
    rows = Rows(shards, 7)
    assert len(rows) == 2 and rows[0]["segments"].tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert rows[1]["tokens"].tolist() == [5, 6, 9, 0, 0, 0, 0] and "bytes" not in rows[0]
    with pytest.raises(InputError, match=r"row 0: token 2 has id 9, beyond vocab=9; give"):
        Rows(Shards(paths, 9, dtype="uint32"), 7)[0]


@pytest.mark.parametrize("dtype", LLM_C)
def test_what_llm_c_puts_before_its_ids_is_no_id(dtype, tmp_path):
    head = np.zeros(256, np.int32)
    head[:3] = *LLM_C[dtype], 5
    ids = np.array([9, 5, 6, 9, 7], dtype)
    path = tmp_path / "a.bin"
    path.write_bytes(head.tobytes() + ids.tobytes())
    shards = Shards(str(path), 10, end=9, dtype=dtype)
    np.testing.assert_array_equal(shards.parts[0].ids, ids)
    path.write_bytes(head.tobytes() + ids[:4].tobytes())
    with pytest.raises(InputError, match=r"a\.bin: has 4 ids, and says 5 of itself; fetch it"):
        _ = Shards(str(path), 10, end=9, dtype=dtype).parts


def test_bad_shards_and_rows_are_told(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.uint16))
    np.save(tmp_path / "b.npy", np.zeros(0, np.uint16))
    np.save(tmp_path / "c.npy", np.zeros(4, np.uint16))
    np.save(tmp_path / "c.ends.npy", np.array([2, 5]))
    (tmp_path / "d.npy").write_text("none")
    said = {
        "a": r"a\.npy: is uint16 \[2, 2\]; a shard is one row of uint16 or uint32",
        "b": r"b\.npy: holds no token; leave the file out",
        "c": r"c\.ends\.npy: is not of .*c\.npy; write both again",
        "d": r"d\.npy: is no file of ids",
    }
    for name, message in said.items():
        with pytest.raises(InputError, match=message):
            _ = Shards(str(tmp_path / f"{name}.npy"), 9).parts
    with pytest.raises(InputError, match="text 1: the document is empty"):
        len(Rows(Tokenized(Texts(("a", " ")), Bytes()), 8))
    tokens = Tokenized(SOME, Bytes())
    with pytest.raises(InputError, match="length=1 must be 2 tokens or more"):
        Rows(tokens, 1)
    with pytest.raises(InputError, match=r"stride=8 must be from 1 to length - 1 = 7"):
        Windows(tokens, 8, 8)
    assert isinstance(tokens.parts[0], Part)


def said(*messages):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]})


def test_only_answers_of_conversations_are_learned(tmp_path):
    path = tmp_path / "talk.jsonl"
    lines = [
        said(("user", "hi"), ("assistant", "yes"), ("user", "so?"), ("assistant", "no")),
        said(("system", "s"), ("user", "q"), ("assistant", "a" * 40)),
        said(("user", "x"), ("assistant", "y")),
    ]
    path.write_text("\n".join(lines))
    source = Conversations(str(path), Bytes(), 110)
    assert len(source) == 2, "the third stands beside the first"
    row = source[0]
    learned = Bytes().decode(row["tokens"][(row["answer"] == 1) & (row["segments"] == 1)])
    assert learned == "yesno" and row["answer"].sum() == 5 + 2 + 1 + 1, "and their ends"
    whole = Bytes().decode(row["tokens"][row["segments"] == 2])
    assert whole == "<|user|>\nx<|assistant|>\ny"
    assert row["tokens"][row["segments"] == 2][-1] == 257
    assert row["segments"].max() == 2 and (np.diff(row["segments"])[:-1] >= -2).all()
    cut = Conversations(str(path), Bytes(), 50, cut=True)
    assert cut[1]["answer"].sum() < 41 and cut[1]["segments"].all()


def test_conversations_of_all_layouts_are_the_same_rows(tmp_path):
    """OpenAI's, its contents in parts, and ShareGPT's."""
    plain = [("system", "s"), ("user", "a b"), ("assistant", "c")]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    shared = [("system", "s"), ("human", "a b"), ("gpt", "c")]
    lines = [
        said(*plain),
        said(("developer", "s"), ("user", parts), ("assistant", "c")),
        json.dumps({"conversations": [{"from": r, "value": c} for r, c in shared]}),
    ]
    found = []
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line)
        found.append(Conversations(str(path), Bytes(), 64)[0])
    for other in found[1:]:
        for name in ("tokens", "segments", "answer"):
            np.testing.assert_array_equal(other[name], found[0][name])
    assert found[0]["answer"].sum() == 2


def test_bad_conversations_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "talk.jsonl"
    good = said(("user", "hi"), ("assistant", "yes"))
    bad = {
        '{"text": "a"}': 'talk.jsonl:2: has no "messages"',
        '{"messages": [{"role": "user"}]}': "talk.jsonl:2: message 0 has no 'content' that is",
        '{"messages": [{"content": "a"}]}': "talk.jsonl:2: message 0 has no 'role' that is",
        said(("robot", "a")): "talk.jsonl:2: message 0 has the role 'robot', which is none",
        said(("user", "a"), ("assistant", "")): "talk.jsonl:2: message 1 is an empty answer",
        '{"conversations": [{"from": "human"}]}': "message 0 has no 'value' that is text",
        '{"conversations": [{"role": "user"}]}': "message 0 has no 'from' that is text",
        '{"conversations": [{"from": "bard", "value": "a"}]}': "the role 'bard', which is none",
        said(("user", [{"type": "image_url"}])): "message 0 has no 'content' that is text",
        said(("user", "a")): "talk.jsonl:2: there is no answer to learn; leave the line out",
        said(("user", "a"), ("assistant", "b" * 99)): (
            "talk.jsonl:2: has 126 tokens and a row length=64; leave the line out, make"
        ),
    }
    for line, message in bad.items():
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(InputError, match=message):
            len(Conversations(str(path), Bytes(), 64))
