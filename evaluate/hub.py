"""Questions to a model in a directory as Hugging Face saves it: LLaVA 1.5 and its like.

The directory has `config.json`, safetensors, `tokenizer.json`, `tokenizer_config.json` and
`preprocessor_config.json`.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from evaluate.greedy import likeliest
from jaxformer import convert
from jaxformer.data.images import CenterCrop, Decode, Normalize, Resize
from jaxformer.data.templates import MARK, PLAIN, Llama3, Qwen, Template, Vicuna, prompt
from jaxformer.data.tokenizer import TokenizerFile
from jaxformer.errors import InputError
from jaxformer.models.vlm import VLM

TEMPLATES: dict[str, Template] = {
    "vicuna": Vicuna(),
    "llama3": Llama3(),
    "qwen": Qwen(),
    "plain": PLAIN,
}


def asker(
    path: str, template: Template, steps: int = 128
) -> Callable[[bytes, str], Iterator[str]]:
    """Who gives the likeliest answer about an encoded image, a piece of text at a time.

    The short side of an image is resized to the model's, and its middle looked at, as LLaVA
    1.5 does. An answer ends with the tokenizer's end or after `steps` tokens.

    Raises:
      InputError: a directory that is no such model, or a file that is missing there.
    """
    model, params = convert.load(path)
    if type(model) is not VLM:
        raise InputError(
            f"{path}: is a {type(model).__name__}, and questions are put to models whose "
            "images are of one size, such as LLaVA 1.5; call its parts yourself (docs/vlm.md)"
        )
    names, seen = (_json(path, f"{name}_config.json") for name in ("tokenizer", "preprocessor"))
    begin, end = (_token(names.get(f"{name}_token")) for name in ("bos", "eos"))
    tokenizer = TokenizerFile(str(pathlib.Path(path) / "tokenizer.json"), begin, end)
    vision: Any = model.vision
    embed = getattr(vision, "encoder", vision).embed
    side = embed.position.shape[0] * embed.patch
    try:
        mean, std = tuple(seen["image_mean"]), tuple(seen["image_std"])
    except (KeyError, TypeError):
        raise InputError(
            f"{path}/preprocessor_config.json: has no image_mean and image_std; fetch it again"
        ) from None
    transforms = (Decode(), Resize(side, "bicubic"), CenterCrop(side), Normalize(mean, std))
    images = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    features = jax.eval_shape(
        lambda params, x: model.apply({"params": params}, x, method="encode"), params, images
    )
    places = [model.image] * features.shape[2]
    draw = likeliest(model, params, steps)

    def answer(image: bytes, question: str) -> Iterator[str]:
        if not question.strip():
            raise InputError("the question is empty; ask something")
        record: dict[str, Any] = {"image": image, "source": "the image"}
        for transform in transforms:
            record = transform(record)
        said = [("user", f"{MARK}\n{question}")]
        ids, told = [], ""
        for token in draw(prompt(said, template, tokenizer, places).tolist(), record["image"]):
            if token == tokenizer.end:
                return
            ids.append(token)
            whole = tokenizer.decode(ids)
            if not whole.endswith("\ufffd"):  # Half of a letter.
                yield whole[len(told) :]
                told = whole

    return answer


def _json(path: str, name: str) -> dict[str, Any]:
    file = pathlib.Path(path) / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); fetch it") from error
    return found if isinstance(found, dict) else {}


def _token(found: Any) -> str | None:
    """A token's text, which may stand in an object with how it is cut out."""
    return found.get("content") if isinstance(found, dict) else found
