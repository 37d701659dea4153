"""Every source gives the records that were put in, and names what is wrong with one."""

import hashlib
import io
import json
import pickle

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from jaxformer.data.shards import ArrayRecord, Captions, Parquet, write_array_record
from jaxformer.data.sources import Digits, ImageFolder
from jaxformer.errors import InputError


def png(value: int, size: tuple[int, int] = (5, 4)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(data, "PNG")
    return data.getvalue()


def write_parquet(path, labels, image="image", plain=False, **options):
    """Two columns as Hugging Face's `datasets` writes them: Image() and ClassLabel()."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [png(i) for i, _ in enumerate(labels)]
    if not plain:
        images = [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)]
    columns = {
        image: pa.array(images, pa.binary() if plain else kind),
        "label": pa.array(labels, pa.int64()),
        "other": pa.array(["unread"] * len(labels)),
    }
    pyarrow.parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def test_digits_are_split_by_class_and_stay_so():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    names = {r["source"] for r in train} | {r["source"] for r in test}
    assert len(names) == 1797
    counts = [np.bincount([r["label"] for r in split]) for split in (train, test)]
    share = counts[1] / (counts[0] + counts[1])
    assert np.abs(share - 360 / 1797).max() < 1 / 170  # within one row of a class.
    stream = b"".join(r["image"].tobytes() + bytes([r["label"]]) for r in test)
    assert hashlib.sha256(stream).hexdigest()[:16] == "f7a94571209902c8"
    image = test[0]["image"]
    assert image.shape == (8, 8, 1) and image.dtype == np.float32
    assert image.min() == 0 and image.max() == 15 / 16


def test_digits_know_their_splits():
    with pytest.raises(InputError, match="no split 'val'; the splits are train and test"):
        Digits("val")


def test_image_folder_sorts_classes_and_reads_only_images(tmp_path):
    for place in ("dog/b.PNG", "cat/a.png", "cat/c.jpeg", ".git/x.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(png(7))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / "README").write_text("no folder")
    source = ImageFolder(str(tmp_path))
    assert source.classes == ("cat", "dog") and source.num_classes == 2
    assert [(r["source"][len(str(tmp_path)) + 1 :], r["label"]) for r in source] == [
        ("cat/a.png", 0),
        ("cat/c.jpeg", 0),
        ("dog/b.PNG", 1),
    ]
    assert source[2]["image"] == png(7)


def test_image_folder_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; give one"):
        len(ImageFolder(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="holds no folders; images go into one folder"):
        len(ImageFolder(str(tmp_path)))
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"cat: holds no image .*; add some or remove"):
        len(ImageFolder(str(tmp_path)))
    (tmp_path / "cat" / "a.png").write_bytes(png(7))
    source = ImageFolder(str(tmp_path))
    assert len(source) == 1
    (tmp_path / "cat" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a.png: cannot be read .*; restore or remove it"):
        source[0]


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_gives_every_row_of_every_group_of_every_file(tmp_path, plain):
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for i, part in enumerate((labels[:6], labels[6:])):
        write_parquet(tmp_path / f"train-{i}.parquet", part, plain=plain, row_group_size=2)
    source = Parquet(str(tmp_path / "train-*.parquet"), num_classes=10)
    assert [r["label"] for r in source] == labels
    assert [r["image"] for r in source] == [png(i) for i in (*range(6), *range(5))]
    rows = [f"train-0.parquet[{i}]" for i in range(6)] + [
        f"train-1.parquet[{i}]" for i in range(5)
    ]
    assert [r["source"] for r in source] == [str(tmp_path / row) for row in rows]
    again = pickle.loads(pickle.dumps(source))
    assert again == source and again[10]["label"] == 5


def test_parquet_keeps_few_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0] * 40, row_group_size=2)
    source = Parquet(path, num_classes=1)
    assert len(list(source)) == 40
    assert source._table.cache_info().currsize == 4


def test_parquet_says_what_is_wrong(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 2])
    with pytest.raises(InputError, match=r"b.parquet: no such file; give files or a pattern"):
        len(Parquet(str(tmp_path / "b.parquet"), num_classes=3))
    with pytest.raises(InputError, match=r"a.parquet\[2\]: label 2 is not .* from 0 to 1"):
        list(Parquet(path, num_classes=2))
    with pytest.raises(InputError, match="has no column 'img' but image, label, other"):
        len(Parquet(path, num_classes=3, image="img"))
    with pytest.raises(InputError, match=r"a.parquet\[0\]: column 'other' holds no image"):
        Parquet(path, num_classes=3, image="other")[0]
    data = (tmp_path / "a.parquet").read_bytes()
    for damaged in (data[:-9], b"", b"no parquet at all"):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a.parquet: is not a whole Parquet file"):
            len(Parquet(path, num_classes=3))
    (tmp_path / "a.parquet").write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    with pytest.raises(InputError, match=r"a.parquet: row group 0 is damaged; fetch"):
        Parquet(path, num_classes=3)[0]


def test_array_record_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    images = [
        png(1),
        rng.integers(256, size=(3, 2, 3), dtype=np.uint8),
        rng.random((2, 5, 1), dtype=np.float32),
        b"\n{}\n",
    ]
    records = [{"image": image, "label": i} for i, image in enumerate(images)]
    write_array_record(str(tmp_path / "a.array_record"), records[:3])
    write_array_record(str(tmp_path / "b.array_record"), records[3:])
    source = ArrayRecord(str(tmp_path / "*.array_record"), num_classes=4)
    for found in (source, pickle.loads(pickle.dumps(source))):
        assert [r["label"] for r in found] == [0, 1, 2, 3]
        for record, image in zip(found, images, strict=True):
            assert type(record["image"]) is type(image)
            np.testing.assert_array_equal(record["image"], image)
    assert source[2]["image"].dtype == np.float32
    assert source[3]["source"] == str(tmp_path / "b.array_record[0]")


def test_array_record_is_json_and_bytes(tmp_path):
    path = str(tmp_path / "a.array_record")
    write_array_record(path, [{"image": np.full((1, 2, 1), 7, np.uint8), "label": 3}])
    head, body = grain.sources.ArrayRecordDataSource(path)[0].split(b"\n")
    assert json.loads(head) == {"label": 3, "dtype": "uint8", "shape": [1, 2, 1]}
    assert body == b"\x07\x07"


@pytest.mark.parametrize(
    "record",
    [
        b"no header",
        b"[1, 2]\nx",
        b'{"dtype": "uint8"}\nx',
        b'{"label": 0, "dtype": "object", "shape": [1, 1, 1]}\nx',
        b'{"label": 0, "dtype": "uint8", "shape": [9, 9, 9]}\nx',
        b'{"label": 0, "dtype": "uint8", "shape": [1, 1]}\nx',
        b"[" * 100_000 + b"\n",
        b'{"label": 0, "more": "' + b"." * 300 + b'"}\nx',
    ],
)
def test_array_record_refuses_other_encodings(tmp_path, record):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(tmp_path / "a.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    writer.write(record)
    writer.close()
    with pytest.raises(InputError, match=r"a.array_record\[0\]: is not a record as write"):
        ArrayRecord(path, num_classes=1)[0]


def test_array_record_says_what_is_wrong(tmp_path):
    path = str(tmp_path / "a.array_record")
    with pytest.raises(InputError, match=r"a.array_record: no such file; give files or"):
        len(ArrayRecord(path, num_classes=1))
    (tmp_path / "a.array_record").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"a.array_record: is not a whole ArrayRecord file"):
        len(ArrayRecord(path, num_classes=1))
    with pytest.raises(InputError, match=r"\[1\]: an image is bytes or .* not int64 \[2, 2\]"):
        images = (b"", np.zeros((2, 2), np.int64))
        write_array_record(path, [{"image": image, "label": 0} for image in images])
    write_array_record(path, [{"image": b"", "label": 5}])
    with pytest.raises(InputError, match=r"\[0\]: label 5 is not an integer from 0 to 4; corr"):
        ArrayRecord(path, num_classes=5)[0]


def test_captions_are_images_with_texts(tmp_path):
    path = str(tmp_path / "a.parquet")
    images = [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}]
    rows = {"image": images, "text": ["a cat", "a dog"], "more": [["one", "two"], []]}
    pyarrow.parquet.write_table(pa.table(rows), path)
    source = Captions(path)
    assert len(source) == 2
    assert source[1] == {"image": b"y", "text": "a dog", "source": f"{path}[1]"}
    assert Captions(path, text="more")[0]["text"] == "one"
    with pytest.raises(InputError, match=r"a.parquet\[1\]: column 'more' holds no text"):
        Captions(path, text="more")[1]
