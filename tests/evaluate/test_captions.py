import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evaluate import captions
from evaluate.captions import Captions, bleu, cider, scores
from evaluate.run import Trained
from jaxformer import sharding
from jaxformer.data import coco
from jaxformer.data.images import Decode, Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.tokenizer import Bytes
from jaxformer.errors import InputError
from jaxformer.layers.connect import Project
from jaxformer.models.decoder import Decoder
from jaxformer.models.vit import ViT
from jaxformer.models.vlm import VLM

GOLDEN = json.loads(pathlib.Path(__file__).with_name("captions.json").read_text())
MADE, REFERENCES = GOLDEN["made"], GOLDEN["references"]


def test_cider_is_as_coco_computes_it():
    found = cider(MADE, REFERENCES)
    np.testing.assert_allclose(found, GOLDEN["cider"], rtol=1e-12, atol=1e-12)
    spelled = [text.capitalize() + "." for text in MADE]
    assert cider(spelled, REFERENCES) == found, "points and capitals are no words"
    assert scores(MADE, REFERENCES)["cider"].value() == pytest.approx(np.mean(found))
    assert cider(MADE[:1], REFERENCES[:1]) == [0.0]


def test_bleu_is_its_definition():
    assert bleu(["A b c d e.", "f g h i j"], [["a b c d e"], ["f g h i j", "k l"]]) == (
        pytest.approx(100)
    )
    # By hand: all words, pairs and triples are in one or the other, and of three fours one;
    # the reference that is nearest in length is shorter.
    found = bleu(["a b c d e f"], [["a b c x d e f y", "b c d e"]])
    assert found == pytest.approx(100 * (1 / 3) ** 0.25)
    # All is right, but of 8 words 4 are missing.
    assert bleu(["a b c d"], [["a b c d e f g h"]]) == pytest.approx(100 * np.exp(1 - 8 / 4))


def test_what_cannot_be_compared_is_told(monkeypatch):
    for made, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(InputError, match="at least one reference"):
            scores(made, references)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"BLEU needs sacrebleu; pip install"):
        bleu(MADE, REFERENCES)


@pytest.fixture
def folder(tmp_path):
    for name, value in (("a.png", 0), ("b.png", 200), ("c.png", 9)):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
        (tmp_path / name).write_bytes(file.getvalue())
    found = {
        "images": [
            {"id": i, "file_name": f"{n}.png"} for i, n in zip((7, 3, 9), "bac", strict=True)
        ],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "Light."},
            {"image_id": 3, "id": 2, "caption": "Dark."},
            {"image_id": 7, "id": 3, "caption": "All is light."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(found))
    return tmp_path


def test_images_come_with_their_captions(folder):
    path = str(folder / "captions.json")
    source = coco.Captions(path, str(folder))
    assert [source[i]["captions"] for i in range(len(source))] == [
        ["Dark."],
        ["Light.", "All is light."],
    ]
    assert source[1]["image"] == (folder / "b.png").read_bytes()
    assert source[1]["source"].endswith("captions.json: image 7")
    pairs = coco.Captions(path, str(folder), pairs=True)
    assert [pairs[i]["text"] for i in range(len(pairs))] == ["Dark.", "Light.", "All is light."]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no file of COCO's captions"),
        ("[]", "is no file of COCO's captions"),
        ('{"images": [{"id": 1}], "annotations": []}', "KeyError: 'file_name'"),
        (
            '{"images": [], "annotations": [{"image_id": 4, "caption": "a"}]}',
            "of image 4, which",
        ),
    ],
)
def test_a_file_that_is_no_such_file_is_told(tmp_path, text, said):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        len(coco.Captions(str(path), str(tmp_path)))
    with pytest.raises(InputError, match=r"none.json: cannot be read"):
        len(coco.Captions(str(tmp_path / "none.json"), str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "said"), [("d.png", "d.png cannot be read"), ("../x.png", "lies outside")]
)
def test_an_image_that_is_not_there_is_told(folder, name, said):
    path = folder / "captions.json"
    path.write_text(path.read_text().replace("a.png", name))
    with pytest.raises(InputError, match=f"image 3: .*{said}"):
        coco.Captions(str(path), str(folder))[0]


@pytest.mark.slow  # Compiles a program or two.
def test_a_model_is_marked_by_what_it_says(folder, monkeypatch):
    model = VLM(
        ViT(8, 1, 12, 2, 4, 0, size=(8, 8), pool="gap"),
        Project(12),
        Decoder(vocab=259, width=12, depth=1, mlp_dim=16, num_heads=2),
        258,
    )
    tokens, images = jnp.full((1, 4), 3), jnp.zeros((1, 1, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), tokens, images)["params"]
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    trained = Trained(model.apply, params, mesh, sharding.DATA_PARALLEL, 2, model)
    source = coco.Captions(str(folder / "captions.json"), str(folder))
    task = Captions(Pipeline(source, (Decode(), Normalize())), Bytes(), 258, 4, steps=4)
    seen = {}

    def compared(made, references):
        seen.update(made=made, references=references)
        return scores(made, references)

    monkeypatch.setattr(captions, "scores", compared)
    found = task.run(trained)
    assert seen["references"] == [["Dark."], ["Light.", "All is light."]]
    assert len(seen["made"]) == 2 and set(found) == {"cider", "bleu"}
    assert found["cider"].count == 2 and found["bleu"].value() <= 100
