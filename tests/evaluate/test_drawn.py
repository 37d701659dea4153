"""Pictures of a model whose draws are known, judged by a toy, on any mesh."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from evaluate.__main__ import as_json
from evaluate.draw import Draw
from evaluate.drawn import Drawn
from evaluate.encoder import Converted, Look, Run
from evaluate.generate import Records
from evaluate.grid import Grid
from evaluate.reference import main, reference
from evaluate.report import table
from evaluate.run import Trained
from jaxformer import convert, distances
from jaxformer.data import statistics
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.text import Caption, encode
from jaxformer.errors import InputError
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.gaussian import Gaussian
from jaxformer.objectives.paths import Reading
from jaxformer.samplers.ddpm import Ddpm
from jaxformer.samplers.guidance import Guidance
from jaxformer.samplers.ode import Ode
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from tests.parity.case import RECORDED

SHAPE = (2, 2, 1)
PATTERNS = np.random.default_rng(0).uniform(-0.5, 0.5, (4, *SHAPE)).astype(np.float32)
HALF = Normalize(mean=0.5, std=0.5)


class Denoiser(nn.Module):
    """Says of everything that it is the pattern of its label, and a bit of what it was."""

    label_dropout: float = 0.1

    def __call__(self, x, t, label=None, *, train=False):
        label = jnp.full(len(x), 3) if label is None else label
        return jnp.asarray(PATTERNS)[label] + 0.2 * jnp.tanh(x)


class Judge(nn.Module):
    """Features and logits of a picture in [0, 1] that was made to lie about 0."""

    def __call__(self, image):
        apart = ((image[:, None] - jnp.asarray(PATTERNS[:3])[None]) ** 2).sum((2, 3, 4))
        return -20 * apart

    def features(self, image):
        return image.reshape(len(image), -1)[:, :3]


class Toy:
    name = "toy at step 0"

    def check(self):
        pass

    def load(self, mesh):
        model = Judge()
        return Trained(model.apply, {}, mesh, FSDP_TENSOR, 16, model), (HALF,)


def records(seed, count):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    off = rng.normal(size=(count, *SHAPE)).astype(np.float32) * 0.1
    images = (PATTERNS[labels] + off) / 2 + 0.5
    return Pipeline(Source([{"image": i, "label": int(n)} for i, n in zip(images, labels)]))  # noqa: B905


@dataclasses.dataclass(frozen=True)
class Source(Records):
    num_classes: int = 3


TRAIN, TEST = records(1, 40), records(2, 20)
FLOW = Flow(Classes(3), Reading("data"))
DRAW = Draw(SHAPE, HALF, Ode(6))
TASK = Drawn(DRAW, Toy(), TRAIN, TEST, count=30)


def model(devices=8, batch=16, objective=FLOW, **fields):
    mesh = make_mesh("", jax.devices()[:devices])
    toy = Denoiser(**fields)
    return Trained(toy.apply, {}, mesh, FSDP_TENSOR, batch, toy, objective, 0.9)


@pytest.mark.parametrize(("devices", "batch"), [(1, 7), (3, 9), (8, 16)])
def test_a_judgement_is_that_of_all_rows_on_any_mesh(devices, batch):
    found = TASK.run(model(devices, batch))
    images = DRAW.images(model(), [i % 3 for i in range(30)])
    real = np.stack([record["image"] for record in TRAIN.source.records])
    at, judge = [2 * x.reshape(len(x), -1)[:, :3] - 1 for x in (real, images)], Judge()
    reference = distances.statistics(at[0], Toy.name)
    wanted = distances.frechet(reference, distances.statistics(at[1], Toy.name))
    assert found["frechet"].value() == pytest.approx(wanted, rel=1e-4)
    assert found["kernel"].value() == pytest.approx(
        distances.kernel_distance(*at), rel=1e-3, abs=1e-7
    )
    read = np.asarray(judge.apply({}, 2 * images - 1)).argmax(1)
    assert found["as_asked"].sum == (read == np.arange(30) % 3).sum() > 25
    assert found["as_asked"].count == 30 and 2 < found["inception"].value() <= 3
    assert 0 < found["test_frechet"].value() < found["frechet"].value()
    assert found["test_precision"].value() > 0.5
    told = found["protocol"].value()
    assert told | {"count": 30, "steps": 6, "guidance": 1.0, "ema": 0.9, "real": 40} == told
    assert told["vae"] is None and told["seed"] == 0
    assert told["encoder"] == Toy.name and len(told["reference"]) == 12
    assert "euler" not in told["sampler"] and "heun" in told["sampler"]
    text = json.loads(json.dumps(as_json({"drawn": found})))["drawn"]
    assert text["protocol"]["value"]["count"] == 30
    assert text["frechet"]["value"] == pytest.approx(wanted, rel=1e-4)
    assert "encoder=toy at step 0" in table(3, {"drawn": found})


def test_a_file_of_statistics_is_the_reference(tmp_path):
    """Written of what the encoder sees of the real pictures, it changes no number."""
    path = str(tmp_path / "real.npz")
    statistics.save(path, reference(TASK))
    by_file = dataclasses.replace(TASK, reference=path)
    by_file.check()
    found, alone = by_file.run(model()), TASK.run(model())
    assert found["frechet"].value() == pytest.approx(alone["frechet"].value(), rel=1e-4)
    told = [one["protocol"].value()["reference"] for one in (found, alone)]
    assert told[0] == statistics.load(path).digest
    statistics.save(path, dataclasses.replace(reference(TASK), mean=np.full(3, 9.0)))
    assert by_file.run(model())["frechet"].value() > 100


class Double(nn.Module):
    """Latents [y x C] as pictures of twice the size, a row and column for each."""

    def decode(self, latents):
        if latents.shape[-1] != 1:
            raise ValueError(f"latents have {latents.shape[-1]} channels; the model has 1")
        return 2 * latents.repeat(2, 1).repeat(2, 2)


class Decoder:
    name = "double at step 3"

    def check(self):
        raise InputError("no autoencoder is there")

    def load(self, mesh):
        assert mesh.size in (1, 3, 8)
        return Trained(Double().apply, {}, mesh, FSDP_TENSOR, 8, Double()), ()


class Reader(nn.Module):
    """The pattern of the class that a text's first letter tells; without a text, the last."""

    def __call__(self, x, t, tokens, real, *, train=False):
        first = jnp.where(real.any(1), tokens[:, 0] - encode("A", 2)[0], 3)
        return jnp.asarray(PATTERNS)[first] + 0.2 * jnp.tanh(x)


@dataclasses.dataclass(frozen=True)
class Enlarge:
    """Four pixels of a channel as 8 x 12 of three."""

    def __call__(self, record):
        image = 4 * record["image"].repeat(4, 0).repeat(6, 1).repeat(3, 2) - 2
        return record | {"image": image.astype(np.float32)}


def test_a_dinov2_of_hugging_faces_files_judges(tmp_path):
    """By its class token, in float64 and by a general square root; its file has its name."""
    encoder = Converted(str(RECORDED / "dinov2_model"), (Enlarge(),))
    task = dataclasses.replace(TASK, encoder=encoder, classifier=False)
    found = task.run(model())
    dino, params = convert.load(encoder.path)
    see = jax.jit(lambda x: dino.apply({"params": params}, x, method="encode")[:, 0])
    drawn = DRAW.images(model(), [i % 3 for i in range(30)])
    real = np.stack([record["image"] for record in TRAIN.source.records])
    sets = [
        np.asarray(see(np.stack([Enlarge()({"image": x})["image"] for x in images])), float)
        for images in (real, drawn)
    ]
    (mean, covariance), (other, spread) = [(x.mean(0), np.cov(x.T)) for x in sets]
    root = np.trace(scipy.linalg.sqrtm(covariance @ spread).real)
    wanted = ((mean - other) ** 2).sum() + np.trace(covariance + spread) - 2 * root
    assert found["frechet"].value() == pytest.approx(wanted, rel=1e-3)
    assert found["frechet"].value() > found["test_frechet"].value() > 0
    assert found["protocol"].value()["encoder"] == "dinov2_model"
    assert "inception" not in found and "as_asked" not in found
    path = str(tmp_path / "real.npz")
    statistics.save(path, reference(task))
    assert statistics.load(path).encoder == "dinov2_model"
    with pytest.raises(InputError, match="is of dinov2_model, and toy at step 0 looks"):
        dataclasses.replace(TASK, reference=path).check()


def test_latents_are_decoded_and_the_record_names_who_did():
    """And pictures are as large as they come out."""
    plain = dataclasses.replace(DRAW, normalize=Normalize(mean=0.5, std=0.05))
    by = dataclasses.replace(plain, autoencoder=Decoder())
    latents = plain.images(model(), [2, 0, 1])
    found = by.images(model(3, 9), [2, 0, 1])
    wanted = 2 * (latents - 0.5) + 0.5
    np.testing.assert_allclose(found, wanted.repeat(2, 1).repeat(2, 2), atol=1e-6)
    assert (plain.size, by.size) == ((2, 2), (4, 4))
    four = dataclasses.replace(by, shape=(2, 2, 4))
    with pytest.raises(InputError, match=r"draw.shape=\(2, 2, 4\): latents have 4 channels"):
        four.images(model(1), [0])
    assert plain.about(model())["vae"] is None
    assert by.about(model())["vae"] == "double at step 3"
    with pytest.raises(InputError, match="no autoencoder is there"):
        dataclasses.replace(TASK, draw=by).check()
    with pytest.raises(InputError, match="no autoencoder is there"):
        Grid(by).check()


def test_a_class_is_told_in_words():
    """As a model of classes is told it by number, guided too."""
    by_number = dataclasses.replace(DRAW, guidance=Guidance(2.0))
    told = dataclasses.replace(by_number, captions=Caption(("A", "BB", "C"), 3))
    reader = Reader()
    trained = dataclasses.replace(
        model(), apply=reader.apply, model=reader, objective=Flow(None, Reading("data"))
    )
    found = told.images(trained, [2, 0, 1, 3])
    np.testing.assert_allclose(found, by_number.images(model(), [2, 0, 1, 3]), atol=1e-6)
    task = dataclasses.replace(TASK, draw=dataclasses.replace(told, guidance=Guidance()))
    assert task.run(trained)["as_asked"].sum > 25
    with pytest.raises(InputError, match="class 4 is outside the table of 3"):
        told.images(trained, [4])


def test_a_task_that_judges_nothing_has_no_reference(capsys):
    assert main(["configs/dit_digits.py", "paint", "nowhere.npz"]) == 2
    assert "no task 'paint' that judges drawn pictures; it has plain, guided" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "toy at step 1"}, "is of toy at step 1, and toy at step 0 looks"),
        ({"encoder": ""}, "is of an encoder without a name"),
        ({"size": (4, 2)}, "is of pictures of 4 x 2 pixels, and 2 x 2 are drawn"),
    ],
)
def test_statistics_of_another_encoder_or_size_are_refused(fields, message, tmp_path):
    path = str(tmp_path / "real.npz")
    held = distances.statistics(np.eye(3), Toy.name, (2, 2))
    statistics.save(path, dataclasses.replace(held, **fields))
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TASK, reference=path).check()


def test_a_picture_is_that_of_its_number_and_label():
    two = DRAW.images(model(), [2, 1])
    three = DRAW.images(model(3, 3), [2, 1, 1])
    np.testing.assert_allclose(three[:2], two, atol=1e-6)
    assert (three[2] != two[1]).any() and two.min() >= 0 and two.max() <= 1
    other = dataclasses.replace(DRAW, seed=1).images(model(), [2, 1])
    assert (other != two).any()
    free = DRAW.images(model(objective=Flow(None, Reading("data"))), None, 2)
    assert free.shape == (2, *SHAPE)
    down = dataclasses.replace(DRAW, sampler=Ddpm(5))
    chained = down.images(model(objective=Gaussian(Classes(3), kind="data")), [0, 1, 2])
    away = np.abs(2 * chained - 1 - PATTERNS[:3]).mean()
    assert away < 0.25


def test_a_grid_has_a_column_a_class(tmp_path):
    path = Grid(DRAW, rows=4, columns=10).picture(model(), tmp_path / "a" / "grid")
    with Image.open(path) as image:
        wide, high = image.size
        assert path.suffix == ".png" and np.asarray(image).std() > 10
    assert wide < high  # Three columns, not ten, of four rows.
    given = (2, 0, 1, 1, 0), (0, 1, 2, 3, 3)
    asked = Grid(DRAW, given=given).picture(model(), tmp_path / "b")
    with Image.open(asked) as image:
        assert image.size == (330, 165)  # Five columns and two rows, with room above.


def test_an_encoder_looks_at_pictures_as_its_own_evaluation_does():
    toy, transforms = Toy().load(make_mesh("", jax.devices()[:1]))
    images = np.full((3, *SHAPE), 0.75, np.float32)
    features, logits = Look(toy, transforms).at_images(images)
    assert (features == 0.5).all() and logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: DRAW.images(model(), [0, 4]), "class 4 is outside the table of 3"),
        (
            lambda: dataclasses.replace(DRAW, guidance=Guidance(2.0)).images(
                model(label_dropout=0.0), [0]
            ),
            "with model.label_dropout=0 none was learned",
        ),
        (
            lambda: dataclasses.replace(DRAW, sampler=Ddpm(2000)).images(
                model(objective=Gaussian(Classes(3))), [0]
            ),
            "^steps=2000 must be from 1 to 1000",
        ),
        (lambda: DRAW.images(model(objective=Flow()), [0]), "the objective has no classes"),
        (lambda: dataclasses.replace(TASK, count=4).check(), "count=4 must be 5 or more"),
        (
            lambda: Run("configs/vit_digits.py", "nowhere").check(),
            "first run python -m train configs/vit_digits.py, or set tasks={}",
        ),
        (lambda: Converted("nowhere").check(), "nowhere: holds no config.json"),
    ],
)
def test_what_cannot_be_is_told(run, message):
    with pytest.raises(InputError, match=message):
        run()
