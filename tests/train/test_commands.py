"""What the two programs say to bad input: one sentence, status 2, nothing lost."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import evaluate.__main__
import train.__main__
from jaxformer import checkpoint
from tests.train.test_train import TINY

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "vit_digits.py")
FAST = [*TINY, "steps=4", "keep.every=2", "eval_every=4", "mesh=data=8"]

FOLDER = """
from configs.vit_digits import experiment as digits
import dataclasses
from jaxformer.data.images import Decode, Resize, Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import ImageFolder

def experiment():
    data = Pipeline(
        ImageFolder({root!r}),
        (Decode(max_pixels=10_000, channels=1), Resize(8), Normalize((0.5,), (0.5,))),
    )
    return dataclasses.replace(digits(), data=data, evals={{}})
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "done"
    assert train.__main__.main([CONFIG, "--workdir", str(workdir), *FAST]) == 0
    return workdir


def says(capsys, main, *argv) -> str:
    """The one sentence on standard error of a command that ends with status 2."""
    status = main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and "Traceback" not in error, error
    return error.removeprefix("error: ").strip()


def trains(capsys, *argv):
    return says(capsys, train.__main__.main, *argv)


def test_help_lists_every_field_with_its_value(capsys):
    assert train.__main__.main([CONFIG, "--help", "model.depth=9"]) == 0
    out = capsys.readouterr().out
    assert "model.depth=9" in out and "keep.metric='test/top1'" in out
    assert "optimizer.rate.peak=" in out and "data.transforms.0.degrees=" in out


def test_evaluate_prints_a_table_and_writes_json_and_a_picture(done, tmp_path, capsys):
    json_file = tmp_path / "out.json"
    argv = [CONFIG, "--checkpoint", done, "--json", json_file, *FAST]
    assert evaluate.__main__.main([str(a) for a in argv]) == 0
    assert "test/top1" in capsys.readouterr().out
    found = json.loads(json_file.read_text())
    top1 = found["evals"]["test"]["top1"]
    assert found["step"] == 4 and top1["value"] == top1["sum"] / 360
    assert np.sum(found["evals"]["test"]["confusion"]["sum"]) == 360
    with Image.open(done / "evaluation" / "test_confusion.png") as picture:
        assert picture.size[0] > 300


BAD = {
    "no config": (["configs/none.py"], "configs/none.py: there is no such config"),
    "unknown field": ([CONFIG, "model.dept=3"], "did you mean 'depth'?"),
    "wrong type": ([CONFIG, "steps=many"], "steps: expected int, got 'many'"),
    "mesh": ([CONFIG, "--mesh", "data=3"], "mesh: data=3 needs 3 devices but there are 8"),
    "axis": (
        [CONFIG, *TINY, "--mesh", "tensor=8"],
        "axis 'vocab' of size 10 does not divide over tensor=8; choose one of [1, 2, 5], or "
        "keep the axis whole with replicate=vocab",
    ),
    "batch": (
        [CONFIG, "--mesh", "data=8", "batch_size=20"],
        "batch_size=20 does not divide over 8 devices and accumulate=1; 16 does",
    ),
    "classes": (
        [CONFIG, "model.num_classes=8"],
        "Digits has 10 classes, but model.num_classes=8; set model.num_classes=10",
    ),
    "patch": (
        [CONFIG, "model.patch=3"],
        "the model does not take inputs of (128, 8, 8, 1): patch=3 must divide",
    ),
    "heads": ([CONFIG, "model.num_heads=3"], "num_heads=3 must divide width=64"),
    "best by what is not measured": (
        [CONFIG, *FAST, "keep.metric=test/top2"],
        "keep.metric=test/top2 is not measured; choose one of test/calibration, test/loss",
    ),
    "patience": ([CONFIG, "--patience", "-1"], "--patience -1: must be 0, which waits"),
    "profile": ([CONFIG, "--profile", "9:3"], "--profile 9:3: expected FIRST:LAST"),
}


RGB = """
from configs.vit_digits import experiment as digits
import dataclasses
import numpy as np
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits

def rgb(record):
    return record | {"image": np.repeat(record["image"], 3, -1)}

def experiment():
    return dataclasses.replace(digits(), evals={"rgb": Pipeline(Digits("test"), (rgb,))})
"""


def test_an_eval_of_other_channels_is_told_before_anything_runs(tmp_path, capsys):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(RGB)
    assert train.__main__.main([str(config), "--workdir", str(workdir)]) == 2
    said = capsys.readouterr().err
    assert "evals.rgb: the model, which learns from inputs of (128, 8, 8, 1), does not" in said
    assert "(256, 8, 8, 3)" in said and said.count("\n") == 1 and not workdir.exists()


def test_explain_prints_where_each_parameter_lies(capsys):
    argv = [CONFIG, *TINY, "--explain", "--mesh", "fsdp=4,tensor=2"]
    assert train.__main__.main(argv) == 0
    out = capsys.readouterr().out
    assert "stack/block/mlp/up/kernel" in out and "on each device" in out


def test_a_run_does_not_go_back(done, capsys):
    said = trains(capsys, CONFIG, "--workdir", done, *FAST, "steps=3")
    assert "the run is at step 4, beyond steps=3; choose more steps" in said


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path, capsys):
    argv, sentence = BAD[name]
    said = trains(capsys, *argv, "--workdir", tmp_path / "run")
    assert sentence in said and "\n" not in said


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = trains(capsys, CONFIG, "--workdir", tmp_path / "file" / "run", *FAST)
    assert "the run cannot be written there" in said and "--workdir" in said


def test_a_run_of_another_experiment_is_not_touched(done, capsys):
    before = sorted(p.name for p in (done / "checkpoints").iterdir())
    rows = (done / "metrics.jsonl").read_text()
    said = trains(capsys, CONFIG, "--workdir", done, *FAST, "model.depth=3", "seed=1")
    assert "step 4 is of another experiment; choose another --workdir" in said
    assert "- model.depth: 2\n+ model.depth: 3" in said and "+ seed: 1" in said
    assert sorted(p.name for p in (done / "checkpoints").iterdir()) == before
    assert (done / "metrics.jsonl").read_text() == rows


def test_damaged_and_missing_checkpoints(done, tmp_path, capsys):
    main = evaluate.__main__.main
    said = says(capsys, main, CONFIG, "--checkpoint", tmp_path, *FAST)
    assert "holds no checkpoint" in said
    said = says(capsys, main, CONFIG, "--checkpoint", done, "--step", "3", *FAST)
    assert "has no step 3; it has 2, 4" in said
    said = says(capsys, main, CONFIG, "--checkpoint", done, *FAST, "model.width=16")
    assert "- width: 32\n+ width: 16" in said
    copy = pathlib.Path(shutil.copytree(done, tmp_path / "copy"))
    for path in (copy / "checkpoints" / "4" / "state").rglob("ocdbt.process_0/d/*"):
        data = bytearray(path.read_bytes())
        for place in range(0, len(data), len(data) // 50 + 1):
            data[place] ^= 1
        path.write_bytes(data)
    said = says(capsys, main, CONFIG, "--checkpoint", copy, *FAST)
    assert "checkpoints/4 is damaged" in said and "go back to step 2" in said
    assert train.__main__.main([CONFIG, "--workdir", str(copy), *FAST, "steps=6"]) == 0
    said = capsys.readouterr().out
    assert "checkpoints/4 is damaged" in said and "step 2 is taken" in said
    assert checkpoint.steps(copy / "checkpoints") == [4, 6]
    assert (copy / "checkpoints" / "4.damaged" / "state").is_dir(), "nothing is deleted"
    assert main([CONFIG, "--checkpoint", str(copy), "--step", "4", *FAST]) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config on an image folder of two classes, and the folder."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (9, 9), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    config = tmp_path / "folder.py"
    config.write_text(FOLDER.format(root=str(root)))
    monkeypatch.chdir(ROOT)
    return config, root


def test_an_image_folder_trains(folder, tmp_path):
    argv = [str(folder[0]), "--workdir", str(tmp_path / "run"), *FAST]
    assert train.__main__.main([a for a in argv if "evals" not in a]) == 0


def spoil_missing(root):
    shutil.rmtree(root)
    return "images"


def spoil_truncated(root):
    path = root / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    return "cat/3.png"


def spoil_text(root):
    (root / "dog" / "5.png").write_text("not an image")
    return "dog/5.png"


def spoil_bomb(root):
    Image.new("1", (2000, 2000)).save(root / "dog" / "7.png")
    return "dog/7.png"


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_truncated, spoil_text, spoil_bomb])
def test_bad_images_are_named(spoil, folder, tmp_path, capsys):
    config, root = folder
    named = spoil(root)
    said = trains(capsys, config, "--workdir", tmp_path / "run", *FAST, "batch_size=40")
    assert named in said and "\n" not in said
