"""Documents from files, and what is said of those that are none."""

import json
import pickle

import pytest

from jaxformer.data.corpus import JsonLines, Stdlib, TextFiles, held_out
from jaxformer.data.shards import ParquetText
from jaxformer.errors import InputError


def test_the_standard_library_is_split_by_name():
    train, test = Stdlib("train"), Stdlib("test")
    names = [{s[i]["source"] for i in range(len(s))} for s in (train, test)]
    assert not names[0] & names[1] and {"ast.py", "json/decoder.py"} <= names[0] | names[1]
    assert 0.05 < len(names[1]) / len(names[0]) < 0.2
    assert not [n for n in names[0] | names[1] if "test" in n.split("/") or "encodings" in n]
    assert [held_out(n) for n in ("ast.py", "typing.py", "html/entities.py")] == HELD
    assert all(train[i]["text"].strip() for i in range(len(train)))
    again = pickle.loads(pickle.dumps(test))
    assert again == test and again[3] == test[3] and len(pickle.dumps(test)) < 200
    with pytest.raises(InputError, match="Stdlib has no split 'dev'"):
        Stdlib("dev")


HELD = [False, False, False]


def test_text_files_are_documents(tmp_path):
    for name, text in (("b", "two"), ("a", "eins\nzwei ü")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    source = TextFiles(str(tmp_path / "*.txt"))
    assert [source[i]["text"] for i in range(len(source))] == ["eins\nzwei ü", "two"]
    assert source[1]["source"].endswith("b.txt")


def test_bad_text_files_are_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    with pytest.raises(InputError, match=r"a\.txt: byte 5 is not UTF-8; convert the text"):
        TextFiles(str(tmp_path / "a.txt"))[0]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"b\.txt: the document is empty; leave it out"):
        TextFiles(str(tmp_path / "b.txt"))[0]
    with pytest.raises(InputError, match="no such file"):
        len(TextFiles(str(tmp_path / "c*")))


def test_lines_of_json_are_documents_named_by_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "ü one"}), "", json.dumps({"text": "two", "id": 3})]
    path.write_text("\n".join(lines), encoding="utf-8")
    source = JsonLines(str(path))
    assert len(source) == 2 and source[0]["text"] == "ü one"
    assert source[1] == {"text": "two", "source": f"{path}:3"}
    bad = {
        '{"text": 3}': "x.jsonl:1: a text is a string, not int",
        '{"text": ""}': "x.jsonl:1: the document is empty",
        '{"body": "a"}': "x.jsonl:1: has no field 'text' but body; name the field",
        '["a"]': "x.jsonl:1: a line is a JSON object, not list",
        '{"text": "a"': "x.jsonl:1: is not JSON",
    }
    for line, said in bad.items():
        path.write_text(line)
        with pytest.raises(InputError, match=said):
            JsonLines(str(path))[0]
    path.write_bytes(b'{"text": "\xfe"}')
    with pytest.raises(InputError, match=r"x\.jsonl:1: byte 10 is not UTF-8"):
        JsonLines(str(path))[0]


def test_a_column_of_parquet_is_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": ["a", "b", ""], "n": [1, 2, 3]}), path, row_group_size=2)
    source = ParquetText(path)
    assert len(source) == 3 and source[1]["text"] == "b"
    with pytest.raises(InputError, match=r"x\.parquet\[2\]: column 'text' holds no text or"):
        source[2]
    with pytest.raises(InputError, match="has no column 'body' but text, n"):
        len(ParquetText(path, text="body"))
