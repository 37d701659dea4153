import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evaluate import ask, pictures
from evaluate.answers import answered, picture
from evaluate.generate import generate
from evaluate.polling import Presence, polls, yes_no
from evaluate.run import Trained
from jaxformer import sharding
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import (
    END,
    IMAGE,
    NAMES,
    VOCAB,
    Ask,
    Scenes,
    decode,
    encode,
    question,
)
from jaxformer.errors import InputError
from jaxformer.layers.block import Chain
from jaxformer.layers.connect import Merge, Project
from jaxformer.models.decoder import Decoder
from jaxformer.models.flamingo import Flamingo, gated
from jaxformer.models.vit import ViT
from jaxformer.models.vlm import VLM
from jaxformer.samplers.logits import GREEDY
from tests.layers.test_block import randomized

KINDS = ("left", "read")
MODEL = VLM(
    ViT(8, 1, 12, 2, 8, 0, size=(16, 32), pool="gap"),
    Chain((Merge(2, (2, 4)), Project(12))),
    Decoder(vocab=VOCAB, width=12, depth=1, mlp_dim=16, num_heads=2),
    IMAGE,
)


@pytest.fixture(scope="module")
def trained():
    tokens, images = jnp.full((1, 4), 3), jnp.zeros((1, 1, 16, 32, 1))
    variables = jax.jit(MODEL.init)(jax.random.key(0), tokens, images)
    params = randomized(variables, jax.random.key(1))
    # It never draws a place of an image, of which there would be no feature.
    table = params["language"]["table"]["embedding"].at[IMAGE].set(0)
    params["language"]["table"]["embedding"] = table
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    return Trained(MODEL.apply, params, mesh, sharding.DATA_PARALLEL, 4, MODEL)


@pytest.mark.slow  # Compiles a program or two.
def test_answers_are_what_is_likeliest_after_the_image_and_the_question(trained, tmp_path):
    test = Pipeline(Scenes("test", 5), (Normalize(), Ask(2, 40, KINDS)))
    found = answered(trained, test, range(3))
    apply = jax.jit(MODEL.apply)
    for index, texts in enumerate(found):
        scene = test.source[index]
        for kind, text in zip(KINDS, texts, strict=True):
            ids = [IMAGE] * 2 + encode(question(kind, scene)[0])
            row, images = np.zeros((1, 20), np.int32), jnp.asarray(scene["image"])[None, None]
            made = []
            for _ in range(5):
                row[0, : len(ids) + len(made)] = ids + made
                logits = apply({"params": trained.params}, jnp.asarray(row), images)
                made.append(int(logits[0, len(ids) + len(made) - 1].argmax()))
                if made[-1] == END:
                    break
            assert text == decode(made)
    path = picture(test, range(3), found, tmp_path / "scenes")
    assert path.suffix == ".png" and path.read_bytes()[:4] == b"\x89PNG"


def test_a_prompt_with_an_image_is_never_cut(trained):
    beside = [{"images": np.zeros((1, 16, 32, 1), np.float32)}]
    with pytest.raises(InputError, match="prompt 0 has 9 tokens, and length=10 leaves 6"):
        generate(trained, [[IMAGE] * 9], length=10, steps=4, beside=beside)


def test_a_pipeline_that_does_not_ask_is_refused(trained):
    with pytest.raises(InputError, match="end in Normalize; they must end in Ask"):
        answered(trained, Pipeline(Scenes("test", 5), (Normalize(),)), range(2))


class Letters:
    """Another's transform: a letter is a token, and 1 is the end."""

    end = 1

    def __call__(self, record):
        return record

    def prompt(self, question):
        return [IMAGE] * 2 + [3 + ord(letter) % 5 for letter in question]

    def word(self, token):
        return chr(ord("a") + token)


def test_who_asks_by_other_words_is_asked_too(trained, monkeypatch):
    seen = []

    def likeliest(model, params, steps):
        def draw(prompt, image):
            seen.append((list(prompt), image.shape))
            return iter([2, 0, 1, 5])

        return draw

    monkeypatch.setattr(ask, "likeliest", likeliest)
    answer = ask.asker(trained, Pipeline(Scenes("test", 5), (Normalize(), Letters())))
    assert "".join(answer(np.zeros((16, 32, 1), np.uint8), "abc")) == "ca"
    assert seen == [(Letters().prompt("abc"), (16, 32, 1))]
    with pytest.raises(InputError, match="end in Normalize; they must end in one that has end"):
        ask.asker(trained, Pipeline(Scenes("test", 5), (Normalize(),)))


@pytest.mark.slow  # Compiles a program or two.
def test_an_answer_comes_word_by_word(trained):
    test = Pipeline(Scenes("test", 5), (Normalize(), Ask(2, 40, KINDS)))
    found = answered(trained, test, [2])[0]
    for kind, text in zip(KINDS, found, strict=True):
        asked = question(kind, test.source[2])[0]
        made = list(ask.asker(trained, test)(test.source[2]["image"], asked))
        assert made[:5] == text.split()[:5] and len(made) <= ask.STEPS


def test_questions_of_like_length_compile_once(trained, caplog):
    """The first compiles; one of other words and another image does not, nor a longer one."""
    answer = ask.asker(trained, Pipeline(Scenes("test", 5), (Normalize(), Ask(2, 40, KINDS))))
    draw = np.random.default_rng(0)

    def compiled(question):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            list(answer(draw.random((16, 32, 1), np.float32), question))
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    assert compiled("what is the sum ?")
    assert compiled("which digit is largest ?") == compiled("how many ?") == []


@pytest.mark.slow  # Compiles a program or two.
def test_words_after_a_prompt_still_see_the_image_through_gates(trained):
    """Of a model with gated cross-attention: as the whole text says at once."""
    parts: VLM = MODEL
    model = Flamingo(parts.vision, Project(12), gated(parts.language), IMAGE)
    tokens, images = jnp.full((1, 4), 3), jnp.zeros((1, 1, 16, 32, 1))
    params = randomized(
        jax.jit(model.init)(jax.random.key(0), tokens, images), jax.random.key(1)
    )
    seen = dataclasses.replace(trained, apply=model.apply, params=params, model=model)
    scene, asked = Scenes("test", 5)[0]["image"], "what is the sum ?"
    test = Pipeline(Scenes("test", 5), (Normalize(), Ask(1, 40, KINDS)))
    record = Normalize()({"image": scene})["image"]
    image, ids, made = jnp.asarray(record)[None, None], [IMAGE, *encode(asked)], []
    row = np.zeros((1, 16), np.int32)

    @jax.jit
    def whole(params, row, image):
        features = model.apply({"params": params}, image, method="encode")
        # Words that are drawn are no further images.
        how = {"seen": jnp.ones_like(row), "features": features}
        return model.apply({"params": params}, row, **how)

    for _ in range(ask.STEPS):
        row[0, : len(ids) + len(made)] = ids + made
        logits = whole(params, jnp.asarray(row), image)
        made.append(int(logits[0, len(ids) + len(made) - 1].argmax()))
        if made[-1] == END:
            break
    assert " ".join(ask.asker(seen, test)(scene, asked)) == decode(made)
    generated = generate(
        seen, [ids], length=16, steps=len(made), law=GREEDY, beside=[{"images": image[0]}]
    )
    assert generated == [made] and len(made) > 2


@pytest.mark.slow  # Compiles a program or two.
@pytest.mark.parametrize("through", ["splice", "gates"])
def test_where_an_answer_looks(trained, through, monkeypatch, tmp_path):
    """What the last token gives to the places of an image, or to its features by gates."""
    parts: VLM = MODEL
    count, grid, model = 2, (1, 2), MODEL
    if through == "gates":
        count, grid = 1, (2, 4)
        model = Flamingo(parts.vision, Project(12), gated(parts.language), IMAGE)
    prompt = (*[IMAGE] * count, *encode("what is the sum ?"))
    images = jnp.zeros((1, 1, 16, 32, 1))
    drawn = jax.jit(model.init)(jax.random.key(0), jnp.array([prompt]), images)
    params = randomized(drawn, jax.random.key(1))
    seen = dataclasses.replace(trained, apply=model.apply, params=params, model=model)
    test = Pipeline(Scenes("test", 3), (Normalize(), Ask(count, 40, KINDS)))
    found = {}

    def kept(images, weights, path, **how):
        found.update(images=images, weights=weights)
        return drawn_as(images, weights, path, **how)

    drawn_as = pictures.attention_picture
    monkeypatch.setattr(pictures, "attention_picture", kept)
    path = pictures.Looks(test, prompt, grid, count=3).picture(seen, tmp_path / "looks.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    weights, image = found["weights"], jnp.asarray(found["images"])[:, None]
    assert weights.shape == (3, 2, 1, grid[0] * grid[1])
    # All that the last token gives: to the image and, in a splice, to the words.
    tokens = jnp.broadcast_to(jnp.array(prompt), (3, len(prompt)))
    how = {"method": "hidden", "mutable": ["maps"]}
    run = jax.jit(lambda image: model.apply({"params": params}, tokens, image, **how)[1])
    leaves = jax.tree.leaves(run(image)["maps"]["language"])
    own = [x[-1, :, :, -1] for x in leaves if through == "splice" or x.shape[-1] == 8]
    (own,) = own
    np.testing.assert_allclose(own.sum(-1), 1, atol=1e-2)
    np.testing.assert_allclose(own[..., : grid[0] * grid[1]], weights[:, :, 0], atol=1e-2)
    assert (np.abs(weights[0] - weights[1]) > 1e-4).any(), "and images differ"


def test_a_picture_is_read_in_grey_and_in_size(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)).save(path)
    image = ask.read(str(path), (16, 32))
    assert image.shape == (16, 32, 1) and image.dtype == np.uint8
    assert ask.read(str(path), (32, 32)).shape == (32, 32, 1)
    with pytest.raises(InputError, match="cannot be read"):
        ask.read(str(tmp_path / "none.png"), (16, 32))


def test_a_question_in_other_words_is_told_before_anything_is_read(tmp_path, capsys):
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(path)
    argv = ["configs/vlm_digits.py", str(path), "what is love ?", "--checkpoint", "nowhere"]
    assert ask.main(argv) == 2
    assert "'love' is no word of the scenes" in capsys.readouterr().err
    argv[2] = " "
    assert ask.main(argv) == 2
    assert "the question is empty; ask something" in capsys.readouterr().err


@pytest.mark.slow  # Compiles a program or two.
def test_digits_are_polled_by_what_is_answered(trained):
    test = Pipeline(Scenes("test", 3), (Normalize(), Ask(2, 40, KINDS)))
    digits = [{int(d) for d in test.source[i]["digits"] if d >= 0} for i in range(3)]
    answer, asked, said = ask.asker(trained, test), polls(digits, each=1), []
    for image, digit, _ in asked:
        question = f"how many {NAMES[digit]} are there ?"
        made = answer(test.source[image]["image"], question)
        said.append(next(made, "") != "0")
    assert Presence(test).run(trained) == yes_no(said, [poll.truth for poll in asked])
