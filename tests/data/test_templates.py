"""Conversations are written as the models' own templates have them, to the last id."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxformer.data import templates
from jaxformer.data.conversations import Conversations
from jaxformer.data.templates import Captions, Llama3, Qwen, Vicuna
from jaxformer.data.tokenizer import Bytes, TokenizerFile
from jaxformer.errors import InputError

SAID = [
    [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")],
    [("system", "Be kind."), ("user", "Hi "), ("assistant", "Ho."),
     ("user", "1 + 1 = ?"), ("assistant", "2")],
    [("user", "Is <|im_end|> </s> a word?"), ("assistant", "No,\n\nnot <|eot_id|>.")],
]  # fmt: skip
SPECIAL = [
    "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
]  # fmt: skip
RECORDED = json.loads(pathlib.Path(__file__).with_name("templates.json").read_text())
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. "
)
VICUNA = [
    {
        "whole": f"<s>{SYSTEM}USER: <image>\nWhat is it? ASSISTANT: A cat.</s>",
        "asked": f"<s>{SYSTEM}USER: <image>\nWhat is it? ASSISTANT:",
    },
    {
        "whole": "<s>Be kind. USER: Hi  ASSISTANT: Ho.</s>USER: 1 + 1 = ? ASSISTANT: 2</s>",
        "asked": "<s>Be kind. USER: Hi  ASSISTANT: Ho.</s>USER: 1 + 1 = ? ASSISTANT:",
    },
]
CASES = {
    "llama3": (Llama3(), RECORDED["llama3"][:2]),
    "qwen": (Qwen(), RECORDED["qwen"][:2]),
    "qwen with images": (Qwen(), RECORDED["qwen with images"][:2]),
    "vicuna": (Vicuna(), VICUNA),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Small tokenizers on bytes, as Llama 3 and Qwen have, and on words, as Llama 2 has."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [c["whole"] for cases in RECORDED.values() for c in cases] + [SYSTEM] * 3
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    how = {"special_tokens": SPECIAL, "show_progress": False}
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **how)
    )
    made.save(str(folder / "bytes.json"))
    words = tokenizers.Tokenizer(models.BPE(unk_token="<s>"))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, **how))
    words.save(str(folder / "words.json"))
    return {"bytes": str(folder / "bytes.json"), "words": str(folder / "words.json")}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", range(2))
def test_ids_are_those_of_the_text_that_the_original_writes(paths, name, number):
    template, cases = CASES[name]
    path = paths["words" if name == "vicuna" else "bytes"]
    tokenizer = TokenizerFile(path, "<s>", "</s>")
    own = tokenizers.Tokenizer.from_file(path)  # In whose texts special tokens are such.
    pad = own.token_to_id("<|image_pad|>")
    said, golden = SAID[number], cases[number]

    def ids(text):
        if name != "vicuna":
            return own.encode(text, add_special_tokens=False).ids
        # LLaVA's code encodes what stands before and after an image for itself.
        found = [
            own.encode(part, add_special_tokens=False).ids for part in text.split("<image>")
        ]
        return [i for part in found for i in [*part, pad]][:-1]

    image = [pad] if name in ("vicuna", "qwen with images") else None
    found, learned = templates.encode(said, template, tokenizer, image)
    assert found.tolist() == ids(golden["whole"])
    asked = templates.prompt(said[:-1], template, tokenizer, image)
    assert asked.tolist() == ids(golden["asked"])
    answers = [content for role, content in said if role == "assistant"]
    spelled = own.decode(found[learned == 1].tolist(), skip_special_tokens=True)
    assert spelled.replace("\u2581", "").replace(" ", "") == "".join(answers).replace(" ", "")
    ends = [SPECIAL.index(n) for n in ("</s>", "<|eot_id|>", "<|im_end|>")]
    assert np.isin(found[learned == 1], ends).sum() == len(answers), "and their ends"


def test_special_tokens_in_a_content_are_text(paths):
    for template in (Llama3(), Qwen(), Vicuna()):
        tokenizer = TokenizerFile(paths["bytes"], "<s>", "</s>")
        found, learned = templates.encode(SAID[2], template, tokenizer)
        count = sum(isinstance(part, templates.Token) for part in template.write(SAID[2]))
        assert (found < len(SPECIAL)).sum() == count
        assert (found[learned == 1] < len(SPECIAL)).sum() == 1


def test_captions_are_images_and_what_is_said_of_them():
    tokenizer = Bytes()
    found, learned = templates.encode(SAID[0], Captions(), tokenizer, [300, 300])
    assert found.tolist() == [256, 300, 300, *b"A cat.\n"]
    assert learned.tolist() == [0] * 3 + [1] * 7
    prompt = templates.prompt(SAID[0][:1], Captions(), tokenizer, [300, 300])
    assert prompt.tolist() == [256, 300, 300]


def test_a_template_of_another_tokenizer_is_refused(paths, tmp_path):
    with pytest.raises(
        InputError, match=r"Bytes has no token '<\|im_start\|>', which the templ"
    ):
        templates.encode(SAID[0], Qwen(), Bytes())
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in SAID[2]]}))
    plain = TokenizerFile(paths["bytes"], None, "</s>")
    rows = Conversations(str(path), plain, 200, template=Qwen())
    assert rows[0]["answer"].sum() > 3
    other = TokenizerFile(paths["bytes"], None, "<|none|>")
    with pytest.raises(InputError, match=r"has no token '<\|none\|>'"):
        len(Conversations(str(path), other, 200, template=Vicuna()))
