"""Tasks on a toy model: the same integers on any mesh and batch, and those of NumPy."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import evaluate.__main__
from evaluate import features
from evaluate.knn import KNN
from evaluate.linear import LinearProbe
from evaluate.retrieval import Retrieval
from evaluate.run import Trained, check
from evaluate.zero_shot import ZeroShot
from jaxformer.data.glyphs import Glyphs, NamedGlyphs
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.data.text import Spell
from jaxformer.errors import InputError
from jaxformer.experiment import Task, load
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from tests.train.test_commands import FAST
from train.run import train

TRAIN, TEST = (Pipeline(Digits(split), (Normalize(),)) for split in ("train", "test"))
NAMED = Pipeline(NamedGlyphs("both", 8), (Spell(74), Normalize()))


NAMES = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")


@dataclasses.dataclass(frozen=True)
class Named:
    """Digits that know their names."""

    classes: tuple[str, ...] = NAMES
    num_classes: int = 10

    def __len__(self):
        return len(TEST.source)

    def __getitem__(self, index):
        return TEST.source[index]


class Toy(nn.Module):
    """Random features of images and of texts."""

    def setup(self):
        self.look, self.read = nn.Dense(16), nn.Dense(16)

    def features(self, images):
        return nn.gelu(self.look(images.reshape(len(images), -1)))

    encode_image = features

    def encode_text(self, tokens):
        return self.read(jax.nn.one_hot(tokens, 40).reshape(len(tokens), -1))

    def __call__(self, images, tokens):
        return self.features(images) @ self.encode_text(tokens).T


TASKS: dict[str, Task] = {
    "linear": LinearProbe(TRAIN, TEST, l2=0.01, steps=80),
    "knn": KNN(TRAIN, TEST, k=7),
    "zero_shot": ZeroShot(
        Pipeline(Named(), (Normalize(),)), Spell(74), ("DIGIT {}", "{} IN {}", "{}")
    ),
    "retrieval": Retrieval(NAMED),
}


def trained(devices=1, batch_size=64):
    mesh = make_mesh(f"data={devices}", jax.devices()[:devices])
    zeros = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 74), jnp.int32)
    params = Toy().init(jax.random.key(3), *zeros)["params"]
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    return Trained(Toy().apply, params, mesh, FSDP_TENSOR, batch_size)


def integers(found):
    counted = {n: m for n, m in found.items() if n != "loss"}
    for metric in counted.values():
        assert metric.sum.dtype == metric.count.dtype == np.int64
    return {n: (int(m.sum), int(m.count)) for n, m in counted.items()}


@pytest.fixture(scope="module")
def alone():
    return {name: task.run(trained()) for name, task in TASKS.items()}


@pytest.mark.parametrize("devices,batch_size", [(3, 50), (8, 100)])
@pytest.mark.parametrize("name", TASKS)
def test_integers_are_equal_on_any_mesh_and_batch(name, devices, batch_size, alone):
    found = TASKS[name].run(trained(devices, batch_size))
    assert integers(found) == integers(alone[name])
    counts = {count for _, count in integers(found).values()}
    assert counts == {250 if name == "retrieval" else 360}, "no batch divides them"
    if name == "linear":
        np.testing.assert_allclose(
            found["loss"].value(), alone[name]["loss"].value(), rtol=1e-4
        )


@pytest.fixture(scope="module")
def plain():
    """Features and labels of both splits, made without any of the machinery."""
    toy = trained()

    def rows(pipeline):
        images = np.stack([r["image"] for r in pipeline.source])
        made = toy.apply({"params": toy.params}, jnp.asarray(images), method="features")
        return np.asarray(made), np.array([r["label"] for r in pipeline.source])

    return rows(TRAIN), rows(TEST)


def test_collect_gives_every_record_in_order(plain):
    for devices, size in ((1, 500), (8, 41)):
        made, labels = trained(devices, size).collect(
            lambda apply, params, batch: (
                apply({"params": params}, batch["image"], method="features"),
                batch["label"],
            ),
            TRAIN,
        )
        np.testing.assert_allclose(made, plain[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels, plain[0][1])


def test_linear_probe_is_scikit_learns(alone, plain):
    (x, y), (new, truth) = plain
    scaler = StandardScaler().fit(x)
    sklearn = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=5000)
    right = sklearn.fit(scaler.transform(x), y).predict(scaler.transform(new)) == truth
    assert abs(int(alone["linear"]["top1"].sum) - right.sum()) <= 1
    assert 0.6 < right.mean() < 0.97


def test_knn_is_scikit_learns(alone, plain):
    (x, y), (new, truth) = plain

    def votes(distance):
        return np.exp((1 - distance) / 0.07)

    sklearn = KNeighborsClassifier(7, metric="cosine", weights=votes).fit(x, y)
    assert int(alone["knn"]["top1"].sum) == (sklearn.predict(new) == truth).sum()


def test_a_model_that_knows_the_answer_finds_it():
    def label(apply, params, batch):
        return jax.nn.one_hot(batch["label"], 6181)

    found = Retrieval(NAMED, image=label, text=label).run(trained(8))
    assert integers(found) == {
        f"{way}@{k}": (250, 250)
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    }

    def first_letter(apply, params, batch):
        return jax.nn.one_hot(batch["tokens"][:, 0], 40)

    def of_label(apply, params, batch):
        letters = jnp.array([ord(name[0]) - ord("A") + 14 for name in NAMES])
        return jax.nn.one_hot(letters[batch["label"]], 40)

    task = dataclasses.replace(TASKS["zero_shot"], prompts=("{}",), image=of_label)
    found = integers(dataclasses.replace(task, text=first_letter).run(trained(3)))
    labels = np.array([r["label"] for r in Digits("test")])
    alike = np.isin(labels, [2, 3, 4, 5, 6, 7])  # TWO and THREE tie, and so on.
    assert found == {"top1": (360 - alike.sum(), 360), "top5": (360, 360)}


def test_pixels_are_features():
    found = KNN(TRAIN, TEST, features.pixels, k=1).run(trained(8))
    assert found["top1"].value() > 0.97


CONFIG = """
import dataclasses
from configs.vit_digits import experiment as digits
from evaluate.knn import KNN
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits

def logits(apply, params, batch):
    return apply({"params": params}, batch["image"])

def experiment():
    train, test = (Pipeline(Digits(s), (Normalize(),)) for s in ("train", "test"))
    return dataclasses.replace(digits(), tasks={"knn": KNN(train, test, logits, k=9)})
"""


@pytest.mark.slow
def test_tasks_run_at_the_end_and_from_a_checkpoint(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    train(load(config, FAST), tmp_path / "run")
    rows = [
        json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    (end,) = [r for r in rows if "eval/knn/top1" in r]
    assert end["step"] == 4
    out = tmp_path / "out.json"
    argv = [config, "--checkpoint", tmp_path / "run", "--json", out, *FAST]
    assert evaluate.__main__.main([str(a) for a in argv]) == 0
    found = json.loads(out.read_text())["evals"]
    assert found["knn"]["top1"]["value"] == end["eval/knn/top1"]
    assert found["knn"]["top1"]["count"] == 360 and "test" in found
    assert "knn/top5" in capsys.readouterr().out
    assert evaluate.__main__.main([str(a) for a in [*argv, "tasks={}"]]) == 0
    assert "knn" not in json.loads(out.read_text())["evals"]
    # Other tasks are no other run, and the evaluation needs nothing else.
    argv += ["tasks.knn.k=3", "tasks.knn.temperature=1"]
    assert evaluate.__main__.main([str(a) for a in argv]) == 0
    assert json.loads(out.read_text())["evals"]["knn"] != found["knn"]


def test_tasks_need_no_evals():
    digits = load(pathlib.Path("configs/vit_digits.py"))
    only = dataclasses.replace(digits, evals={}, tasks={"knn": KNN(TRAIN, TEST, k=3)})
    check(only)
    assert evaluate.run._inputs(only)[0].shape == (1, 8, 8, 1)


BAD = {
    "classes": (
        lambda: KNN(TRAIN, Pipeline(Glyphs("test"), (Normalize(),))),
        "Digits has 10 classes to learn from, Glyphs 650 to test; give two splits of one",
    ),
    "k": (lambda: KNN(TRAIN, TEST, k=1438), "k=1438 neighbours must be from 1 to the 1437"),
    "names": (
        lambda: ZeroShot(TEST, Spell(9)),
        "Digits does not tell the names of its classes",
    ),
    "prompts": (
        lambda: dataclasses.replace(TASKS["zero_shot"], prompts=("A",)),
        r"prompts=\('A',\) must be one text or more with \{\} in each",
    ),
    "letters": (
        lambda: dataclasses.replace(TASKS["zero_shot"], prompts=("a {}",)),
        "'a ZERO': 'a' is no letter",
    ),
    "length": (
        lambda: Retrieval(Pipeline(NAMED.source, (Spell(5), Normalize()))),
        "letters and an end do not go into length=5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_runs(name):
    make, message = BAD[name]
    digits = load(pathlib.Path("configs/vit_digits.py"))
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(digits, tasks={"task": make()}))


def test_a_task_has_a_name_of_its_own():
    digits = load(pathlib.Path("configs/vit_digits.py"))
    with pytest.raises(InputError, match=r"tasks.test has the name of an eval; choose another"):
        dataclasses.replace(digits, tasks={"test": KNN(TRAIN, TEST)})
