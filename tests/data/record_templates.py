"""Records conversations as transformers' `apply_chat_template` writes them: templates.json.

    python -m tests.data.record_templates

The templates are those that Meta-Llama-3-8B-Instruct, Qwen2-7B-Instruct and
Qwen2-VL-7B-Instruct have in their `tokenizer_config.json` and `chat_template.json`. Vicuna has
none there: its texts are in test_templates.py, as FastChat's `vicuna_v1.1` has them.
"""

import json
import pathlib

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.data.test_templates import SAID

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
    "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = "
    "image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' "
    "in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN2, "qwen with images": QWEN2_VL}
PATH = pathlib.Path(__file__).with_name("templates.json")


def parts(content: str) -> list[dict]:
    """A content with images, as Qwen2-VL takes it."""
    first, *rest = content.split("<image>")
    found = [{"type": "text", "text": first}] if first else []
    for text in rest:
        found += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return found


def record() -> dict:
    """Each template's conversations, whole and as far as an answer that is asked for."""
    found = {}
    for name, template in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token="<|begin_of_text|>"
        )
        made = []
        for said in SAID:
            images = name.endswith("images")
            messages = [
                {"role": r, "content": parts(c) if images and "<image>" in c else c}
                for r, c in said
            ]
            how = {"chat_template": template, "tokenize": False}
            whole = tokenizer.apply_chat_template(messages, **how)
            asked = tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, **how
            )
            made.append({"whole": whole, "asked": asked})
        found[name] = made
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps(record(), indent=1) + "\n")
