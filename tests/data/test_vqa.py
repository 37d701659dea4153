"""Rows of conversations about images; every planted fault is named before any step."""

import dataclasses
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxformer.data.images import Decode, Normalize
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.vqa import Dialogues, PackedDialogues
from jaxformer.errors import InputError

IMAGE, FEATURES = 258, 4


def png(x=8, y=8):
    file = io.BytesIO()
    draw = np.random.default_rng(0).integers(0, 255, (y, x, 3)).astype(np.uint8)
    Image.fromarray(draw).save(file, "PNG")
    return file.getvalue()


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def line(*texts, image="a.png", **fields):
    return {"image": image, "conversations": turns(*texts), **fields}


@pytest.fixture
def make(tmp_path):
    (tmp_path / "images").mkdir()
    files = {"a.png": png(), "b.png": png(), "wide.png": png(180, 8), "big.png": png(70, 70)}
    files |= {"text.png": b"no image at all", "cut.png": png()[:-60]}
    for name, data in files.items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "outside.png").write_bytes(png())

    def made(lines, **fields):
        path = tmp_path / "talk.jsonl"
        path.write_text(
            "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n"
        )
        fields = {"most": 2, "length": 120, "max_pixels": 4000} | fields
        return Dialogues(
            str(path),
            str(tmp_path / "images"),
            Bytes(),
            image=IMAGE,
            features=FEATURES,
            size=(8, 8, 3),
            transforms=(Decode(), Normalize()),
            **fields,
        )

    return made


def test_a_line_becomes_a_row(make):
    two = line("<image>\nWhat? <image>", "A cat.", "And?", "A dog.", image=["a.png", "b.png"])
    rows = make([two, line("Hi", "Ho", image=None)])
    row = rows[0]
    tokens, answer = row["tokens"], row["answer"]
    starts = np.flatnonzero((tokens == IMAGE) & (np.roll(tokens, 1) != IMAGE))
    assert (tokens == IMAGE).sum() == 2 * FEATURES and len(starts) == 2
    said = Bytes().decode(tokens[(answer == 1) & (tokens < 257)])
    assert said == "A cat.A dog." and (tokens[answer == 1] == 257).sum() == 2
    text = Bytes().decode(tokens[(tokens < 257) & (row["segments"] == 1)])
    assert text == "<|user|>\n\nWhat? <|assistant|>\nA cat.<|user|>\nAnd?<|assistant|>\nA dog."
    assert row["images"].shape == (2, 8, 8, 3) and row["images"].any((1, 2, 3)).all()
    assert not rows[1]["images"].any() and not (rows[1]["tokens"] == IMAGE).any()
    assert rows.vocab == IMAGE + 1
    rows.check()


def test_lines_share_rows_as_tokens_and_images_allow(make):
    """Each is what it is alone: tokens, answers, and its images in the order of its places."""
    lines = [line("<image>What?", "A cat."), line("Hi", "Ho " * 20, image=None)]
    lines += [line("<image>And?", "A dog.", image="b.png"), line("<image>?", "A bird.")]
    source = make(lines, length=140)
    packed = PackedDialogues(source)
    assert len(packed) == 2 and packed.vocab == source.vocab
    assert [packed[i]["source"].count("talk.jsonl:") for i in range(2)] == [2, 2]
    found = []
    for row in (packed[0], packed[1]):
        assert row["tokens"].shape == (140,) and row["images"].shape == (2, 8, 8, 3)
        seen = 0
        for number in range(1, row["segments"].max() + 1):
            own = row["segments"] == number
            count = (row["tokens"][own] == IMAGE).sum() // FEATURES
            found.append((row, own, row["images"][seen : seen + count]))
            seen += count
        assert not row["images"][seen:].any()
    alone = [source[i] for i in (0, 1, 2, 3)]
    for row, own, images in found:
        match = [
            one
            for one in alone
            if np.array_equal(one["tokens"][one["segments"] == 1], row["tokens"][own])
        ]
        (one,) = match
        np.testing.assert_array_equal(one["answer"][one["segments"] == 1], row["answer"][own])
        np.testing.assert_array_equal(one["images"][: len(images)], images)
    with pytest.raises(InputError, match="1 faults in 1 lines"):
        PackedDialogues(make([line("What?", "A cat.")])).check()


def test_rows_of_parquet_are_lines(make, tmp_path):
    """With images by name, by their bytes, or none."""
    lines = [
        line("<image>\nWhat? <image>", "A cat.", image=["a.png", "b.png"]),
        line("Hi", "Ho", image=None),
        line("<image>Who?", "It.", image=["a.png"]),
    ]
    expected = make(lines)

    def written(images):
        said = [x["conversations"] for x in lines]
        table = pyarrow.table({"image": images, "conversations": said})
        pyarrow.parquet.write_table(table, tmp_path / "talk.parquet")
        return dataclasses.replace(expected, paths=str(tmp_path / "talk.parquet"))

    named = [x["image"] or [] for x in lines]
    held = [[{"bytes": png(), "path": name} for name in names] for names in named]
    for images in (named, held):
        rows = written(images)
        rows.check(pixels=True)
        for index in range(3):
            for name in ("tokens", "segments", "answer", "images"):
                np.testing.assert_array_equal(rows[index][name], expected[index][name])
    held[2][0]["bytes"] = png()[:-60]
    (fault,) = written(held).faults()
    assert str(fault) == f"{tmp_path / 'talk.parquet'}[2]: image 0 is cut short or damaged"


def test_the_file_is_gone_through_once(make, monkeypatch):
    source = make([line("<image>What?", "A cat.")] * 3)
    source[0]
    lines = source._lines
    assert source[1] and source._lines is lines


def about(image):
    return json.dumps(line("<image>What?", "A cat.", image=image))


FAULTS = {
    "{not json": "is not JSON",
    "[1, 2]": "a line is a JSON object, not list",
    json.dumps({"id": "c", "image": "a.png"}): 'has no "conversations"',
    json.dumps({"conversations": []}): 'has no "conversations"',
    json.dumps({"conversations": [{"from": "human"}]}): "turn 0 is none of human, gpt, system",
    json.dumps({"conversations": [{"from": "cat", "value": "Miau"}]}): "turn 0 is none of",
    json.dumps({"conversations": turns("Hi", "Ho")[1:]}): "turn 0 begins with the assistant",
    json.dumps({"conversations": turns("Hi", "Ho")[:1] * 2}): "turn 1 is of who spoke before",
    json.dumps({"conversations": turns("Hi")}): "ends with a question that has no answer",
    json.dumps(line("<image>\n ", "A cat.")): "turn 0 is an empty question",
    json.dumps(line("<image>What?", "  ")): "turn 1 is an empty answer",
    json.dumps(line("<image><image>What?", "A cat.")): "has 2 <image> and 1 images",
    json.dumps(line("What?", "A cat.")): "has 0 <image> and 1 images",
    json.dumps(line("What?", "A <image> cat.")): "turn 1 is an answer with <image> in it",
    json.dumps(line("<image>What?", "A cat.", image=None)): "has 1 <image> and 0 images",
    json.dumps(line("<image>What?", "A cat.", image=7)): '"image" is neither the name',
    about("c.png"): "c.png is not there",
    about("text.png"): "text.png is no image",
    about("cut.png"): "cut.png is cut short or damaged",
    about("big.png"): "above max_pixels=4000",
    about("wide.png"): "longer than max_aspect=20 to 1",
    about("../outside.png"): "lies outside of the folder",
    json.dumps(line("<image>What?", "A cat. " * 20)): "images and all, and a row length=120",
    json.dumps(line("<image><image><image>?", "Yes.", image=["a.png"] * 3)): "and a row most=2",
}  # fmt: skip


def test_every_planted_fault_is_named_by_file_line_and_sample(make):
    good = line("<image>What?", "A cat.")
    lines = [x for text in FAULTS for x in (good, text)]
    source = make(lines)
    found = list(source.faults())
    assert len(FAULTS) >= 20
    by_line = {}
    for fault in found:
        by_line.setdefault(int(fault.where.rpartition(":")[2]), []).append(fault)
    assert set(by_line) == {2 * i + 2 for i in range(len(FAULTS))}  # And no good line.
    for i, said in enumerate(FAULTS.values()):
        assert any(said in str(fault) for fault in by_line[2 * i + 2]), (
            said,
            by_line[2 * i + 2],
        )
        assert by_line[2 * i + 2][0].where.endswith(f"talk.jsonl:{2 * i + 2}")
    assert by_line[6][0].sample == "c" and "(sample c)" in str(by_line[6][0])
    with pytest.raises(InputError, match=f"{len(found)} faults in {len(lines)} lines"):
        source.check(pixels=True)


def test_headers_alone_tell_all_but_what_is_cut_off(make):
    source = make(list(FAULTS))
    lines = {fault.where for fault in source.faults(pixels=False)}
    assert len(lines) == len(FAULTS) - 1


def test_a_faulty_line_is_refused_where_it_is_read(make):
    source = make([line("<image>What? <image>", "A cat.", id=7)])
    said = r"talk.jsonl:1 \(sample 7\): has 2 <image> and 1 images; write one for each image; "
    with pytest.raises(InputError, match=said):
        source[0]


def test_transforms_must_end_in_the_size(make):
    source = make([line("<image>What?", "A cat.", image="big.png")], max_pixels=10_000)
    with pytest.raises(InputError, match=r"becomes float32 \(70, 70, 3\) and must become"):
        source[0]
