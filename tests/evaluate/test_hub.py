"""A directory of the hub is asked, and says what a whole pass finds likeliest."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from PIL import Image

from evaluate import ask, hub, serve
from jaxformer import convert
from jaxformer.errors import InputError
from tests.parity.case import RECORDED
from tests.parity.vlm import IMAGE, PATCHES

WORDS = {f"w{i}": i for i in range(19)} | {"<s>": 1, "</s>": 2, "<unk>": 0, "<image>": IMAGE}


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaVA with every parameter drawn, and a tokenizer of words."""
    path = tmp_path / "model"
    shutil.copytree(RECORDED / "llava", path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 256
    (path / "config.json").write_text(json.dumps(config))
    # It never draws a place of an image, of which there would be no feature.
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[head][IMAGE] = 0
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    words = {word: i for word, i in WORDS.items() if word not in ("w0", "w1", "w2", "w17")}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path / "tokenizer.json"))
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    seen = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(seen))
    return path


def picture():
    file = io.BytesIO()
    draw = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    Image.fromarray(draw).save(file, "PNG")
    return file.getvalue(), draw[:, 2:10]


@pytest.mark.slow  # Compiles a program or two.
def test_an_answer_is_what_is_likeliest(folder, tmp_path, capsys):
    data, middle = picture()
    found = "".join(hub.asker(str(folder), hub.PLAIN, steps=4)(data, "w5 w6"))
    model, params = convert.load(folder)
    image = jnp.asarray((middle / 255 - 0.5) / 0.25, jnp.float32)[None, None]
    # <s> <|user|>: unknown, image, w5 w6 </s>, <|assistant|>: unknown.
    ids, made = [1, 0, *[IMAGE] * PATCHES, 5, 6, 2, 0], []
    run = jax.jit(lambda row: model.apply({"params": params}, row, image))
    for _ in range(4):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids) + len(made)] = ids + made
        made.append(int(run(jnp.asarray(row))[0, len(ids) + len(made) - 1].argmax()))
        if made[-1] == 2:
            made.pop()
            break
    own = hub.TokenizerFile(str(folder / "tokenizer.json"), "<s>", "</s>")
    assert found == own.decode(made) and made
    (tmp_path / "a.png").write_bytes(data)
    argv = [str(folder), str(tmp_path / "a.png"), "w5 w6", "--template", "plain"]
    assert ask.main(argv) == 0
    assert capsys.readouterr().out.startswith(found)
    assert serve.answers_of_hub(str(folder), "plain")(data, "w5 w6").startswith(found)


def test_what_cannot_be_asked_is_told(folder, tmp_path, capsys):
    for program in (ask, serve):
        argv = ["configs/vlm_digits.py", *(["a.png", "w"] if program is ask else [])]
        assert program.main(argv) == 2
        assert "is a config; name its run by --checkpoint DIR" in capsys.readouterr().err
    with pytest.raises(InputError, match="the question is empty"):
        list(hub.asker(str(folder), hub.PLAIN)(picture()[0], " "))
    with pytest.raises(InputError, match="is a Flamingo, and questions are put to"):
        hub.asker(str(RECORDED / "idefics"), hub.PLAIN)
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="has no image_mean and image_std"):
        hub.asker(str(folder), hub.PLAIN)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer_config.json: cannot be read"):
        hub.asker(str(folder), hub.PLAIN)
