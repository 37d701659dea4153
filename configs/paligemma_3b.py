"""PaliGemma 3B at 224 pixels, tuned on answers about images of your own.

Paper: Beyer et al. 2024, arXiv 2407.07726: all parameters train; its table of transfers has
256 a step and a rate of 1e-5 for most, here without decay and with a cosine to 0. Tower:
SigLIP So400m/14, 256 patches; connector: a linear layer; decoder: Gemma 2B. What is asked
sees itself and the image both ways. 2,923,466,480 parameters.
Expected: not run here.
Data: `data/vqa/train.jsonl` in LLaVA's layout with images under `data/vqa/images`, and
`data/vqa/paligemma-3b-pt-224` as the hub has it. Command:
    python -m train configs/paligemma_3b.py --mesh data=1,fsdp=64
"""

import jax.numpy as jnp

from jaxformer.data.images import CenterCrop, Decode, Normalize, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.tokenizer import TokenizerFile
from jaxformer.data.vqa import Dialogues
from jaxformer.experiment import Experiment, Keep
from jaxformer.layers.connect import Project
from jaxformer.layers.norm import OneRMSNorm
from jaxformer.models import decoder, siglip, vit
from jaxformer.models.decoder import Decoder
from jaxformer.models.vlm import VLM
from jaxformer.objectives.next_token import NextToken
from jaxformer.ops.activation import gelu_tanh
from jaxformer.optim import AdamW, Cosine
from jaxformer.start import Hub

SIDE, PATCHES, IMAGE, WIDTH = 224, 256, 257_152, 2048


def model() -> VLM:
    """All of the tower's tokens after its last norm."""
    dtype = jnp.bfloat16
    tower = siglip.named("So400m/14", channels=3, remat="dots", dtype=dtype).parts().vision
    language = Decoder(
        vocab=257_216,
        width=WIDTH,
        depth=18,
        mlp_dim=16_384,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        length=8192,
        norm=OneRMSNorm,
        activation=gelu_tanh,
        embed_scale=WIDTH**0.5,
        remat="dots",
        dtype=dtype,
    )
    return VLM(tower, Project(WIDTH, dtype=dtype), language, IMAGE)


def flops(model: VLM, text: tuple[int, ...], images: tuple[int, ...], *rest) -> int:
    """Operations of one row forward."""
    count, *shape = images
    tower = vit.named("So400m/14", pool="gap", num_classes=0)
    seen = count * vit.flops(tower, (shape[0], shape[1], shape[2]))
    return seen + decoder.flops(model.language, tuple(text))


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    home = "data/vqa/paligemma-3b-pt-224"
    source = Dialogues(
        "data/vqa/train.jsonl",
        "data/vqa/images",
        TokenizerFile(f"{home}/tokenizer.json", "<bos>", "<eos>"),
        length=384,
        image=IMAGE,
        features=PATCHES,
        size=(SIDE, SIDE, 3),
        transforms=(Decode(), Resize(SIDE, "bicubic"), CenterCrop(SIDE), Normalize(0.5, 0.5)),
    )
    return Experiment(
        model=model(),
        objective=NextToken(inputs=("tokens", "images"), prefix=True),
        optimizer=AdamW(rate=Cosine(peak=1e-5, warmup=0.05), decay=0.0),
        data=Pipeline(source, workers=16),
        start=(Hub(home),),
        steps=5_000,
        batch_size=256,
        keep=Keep(every=500),
        flops=flops,
    )
