"""The command that learns a tokenizer and writes shards by it."""

import json

from jaxformer.data.corpus import Stdlib
from jaxformer.data.tokenizer import BEGIN, END, TokenizerFile
from jaxformer.data.tokens import Shards
from train.tokenizer import corpus, main


def test_a_tokenizer_is_learned_and_shards_are_written_by_it(tmp_path, capsys):
    texts = ["def f(x):\n    return x\n" * 5, "class F:\n    pass\n" * 5]
    path, out = tmp_path / "some.jsonl", tmp_path / "made" / "tokenizer.json"
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    some = [str(path), "--field", "body"]
    assert main(["learn", *some, "--vocab", "270", "--out", str(out)]) == 0
    shard = str(tmp_path / "some.npy")
    by = ["--tokenizer", str(out), "--begin", BEGIN]
    assert main(["write", *some, *by, "--out", shard]) == 0
    assert "tokens of 2 documents" in capsys.readouterr().out
    (part,) = Shards(shard, 270).parts
    tokenizer = TokenizerFile(str(out), BEGIN, END)
    documents = [part.ids[: part.ends[0]], part.ids[part.ends[0] :]]
    assert [tokenizer.decode(ids[1:-1]) for ids in documents] == texts
    assert [(ids[0], ids[-1]) for ids in documents] == [(0, 1)] * 2


def test_bad_input_is_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert main(["learn", str(tmp_path / "bad.txt"), "--out", str(tmp_path / "t.json")]) == 2
    assert "bad.txt: byte 0 is not UTF-8" in capsys.readouterr().err
    (tmp_path / "good.txt").write_text("good")
    assert main(["write", str(tmp_path / "good.txt"), "--out", str(tmp_path / "t.bin")]) == 2
    assert "t.bin: a shard's name ends in .npy" in capsys.readouterr().err
    assert corpus("stdlib") == Stdlib("train")
