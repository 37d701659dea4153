"""A model that sees: training, prefill and decoding, beside torch, in turns in one process.

Both are the same LLaVA by numbers, float32, greedy: a CLIP tower before its last layer, an
MLP, and the Llama of `evaluate.speed decoder`; torch's is transformers'
`LlavaForConditionalGeneration`. A row is one image and a text of random tokens, and all
parameters train. Prefill is image, prompt and one token; a decoding's time is that of
`--steps` tokens less that of one. Rates are of all tokens of the text, those of the image too.

The rate of a training step and MFU are as in `evaluate.speed decoder`, with the tower's own
operations beside; the connector's are not counted.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluate.speed import decoder as text
from evaluate.speed.vit import CLOCKS, device_peak
from jaxformer import steps as training
from jaxformer.layers import cache as caches
from jaxformer.layers.cache import Stepper
from jaxformer.layers.connect import Project
from jaxformer.models import clip, decoder, vit
from jaxformer.models.vit import Size
from jaxformer.models.vlm import VLM, Early
from jaxformer.optim import AdamW, Constant
from jaxformer.samplers import autoregressive
from jaxformer.samplers.logits import GREEDY

SIDE, PATCH, TOWER = 112, 14, Size(192, 7, 768, 6)  # Of which all layers but one run.
PLACES = (SIDE // PATCH) ** 2
IMAGE = text.MODEL.vocab - 1


def model() -> VLM:
    """Ours."""
    named = clip.CLIP(TOWER, Size(8, 1, 8, 1), PATCH, (SIDE, SIDE), vocab=8, length=8)
    tower = named.parts().vision
    stack = tower.stack.clone(depth=TOWER.depth - 1)
    early = Early(dataclasses.replace(tower, stack=stack, norm=None, neck=None))
    width = text.MODEL.width
    return VLM(early, Project(width, width), text.MODEL, IMAGE, skip=1)


def flops(length: int) -> int:
    """Operations of one row forward."""
    D, depth, mlp_dim, num_heads = dataclasses.astuple(TOWER)
    tower = vit.ViT(D, depth - 1, mlp_dim, num_heads, PATCH, num_classes=0)
    return vit.flops(tower, (SIDE, SIDE, 3)) + decoder.flops(text.MODEL, (length,))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--batch", type=int, help="rows, default 4")
    parser.add_argument("--prompt", type=int, help="tokens beside the image's 64, default 64")
    parser.add_argument("--steps", type=int, help="tokens drawn, default 32")
    parser.add_argument("--threads", type=int, help="torch's; default: one a core")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")


def run(
    rounds: int = 5,
    batch: int = 4,
    prompt: int = 64,
    steps: int = 32,
    threads: int | None = None,
    peak: float | None = None,
    clock: str = "wall",
) -> dict:
    """Times everything; prints and returns a row a side."""
    top, of_device = device_peak(peak, "float32", clock)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, IMAGE, (batch, PLACES + prompt)).astype(np.int32)
    tokens[:, :PLACES] = IMAGE
    images = draw.normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)
    own, given = model(), (jnp.asarray(tokens), jnp.asarray(images)[:, None])
    params = nn.unbox(jax.jit(own.init)(jax.random.key(0), *given))["params"]
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "train": {"ours": trained(own, params, *given)},
        "prefill": {"ours": written(own, params, *given, 1)},
        "decode": {"ours": written(own, params, *given, steps)},
    }
    for name, theirs in torchs(tokens, images, steps, threads).items():
        sides[name]["torch"] = theirs
    seconds = {name: text.timed(each, rounds, CLOCKS[clock]) for name, each in sides.items()}
    text.less_first(seconds)
    length = PLACES + prompt
    work = {"train": batch * length, "prefill": batch * length, "decode": batch * (steps - 1)}
    operations, rows = 3 * batch * flops(length), []
    for name, each in seconds.items():
        counted = operations if name == "train" else None
        for row in text.told(name, each, work[name], counted, top):
            rows.append(row)
            text.shown(row)
    sizes = {"batch": batch, "prompt": prompt, "places": PLACES, "steps": steps}
    sizes |= {"clock": clock, "operations_of_a_step": operations}
    return {"rounds": rounds, **sizes, **of_device, "threads": threads, "rows": rows}


def trained(model: VLM, params, tokens, images) -> Callable[[], Any]:
    """One training step of all parameters: the next token of what is text, and AdamW."""

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, *batch)
        assert isinstance(logits, jax.Array)
        kept, targets = logits[:, PLACES - 1 : -1], batch[0][:, PLACES:]
        each = optax.softmax_cross_entropy_with_integer_labels(kept, targets)
        return each.mean(), {}

    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, images)["params"]
    tx = AdamW(Constant(1e-3), clip=None).make(nn.get_partition_spec(boxed), 100)
    state = [training.init_state(jax.tree.map(jnp.copy, params), tx)]
    take = functools.partial(training.train_step, loss_fn=loss_fn, tx=tx)
    step = jax.jit(take, donate_argnums=0)

    def once():
        state[0], metrics = step(state[0], (tokens, images), jax.random.key(0))
        return jax.block_until_ready((state[0], metrics))

    return once


def written(model: VLM, params, tokens, images, steps: int) -> Callable[[], Any]:
    """Greedy text after images and prompts, by one program."""
    B, T = tokens.shape

    @jax.jit
    def go(params, tokens, images, counts):
        variables = {"params": params}
        cache = caches.empty(model, variables, B, T + steps)
        return autoregressive.sample(
            Stepper(model, variables, {"images": images}), cache, tokens, counts,
            jax.random.key(0), steps=steps, room=T + steps, law=GREEDY,
        )  # fmt: skip

    return lambda: jax.block_until_ready(go(params, tokens, images, jnp.full(B, T)))


def torchs(
    tokens: np.ndarray, images: np.ndarray, steps: int, threads: int | None
) -> dict[str, Callable[[], Any]]:
    """The same by transformers, or nothing where it or torch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import (  # pyright: ignore[reportMissingImports]
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
        )
    except ImportError:
        return {}
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    own = text.MODEL
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=TOWER.width,
            intermediate_size=TOWER.mlp_dim,
            num_hidden_layers=TOWER.depth,
            num_attention_heads=TOWER.num_heads,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=own.vocab,
            hidden_size=own.width,
            num_hidden_layers=own.depth,
            intermediate_size=own.mlp_dim,
            num_attention_heads=own.num_heads,
            num_key_value_heads=own.num_kv_heads,
            eos_token_id=None,
        ),
        image_token_index=IMAGE,
        image_seq_length=PLACES,
    )
    model: Any = LlavaForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    ids = torch.from_numpy(tokens).long()
    labels = torch.where(ids == IMAGE, -100, ids)
    given = {"input_ids": ids, "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2)}

    def train():
        optimizer.zero_grad()
        model(**given, labels=labels).loss.backward()
        optimizer.step()

    def write(count: int):
        with torch.inference_mode():
            options = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            return model.generate(**given, attention_mask=mask, do_sample=False, **options)

    return {
        "train": train,
        "prefill": lambda: write(1),
        "decode": lambda: write(steps),
    }
