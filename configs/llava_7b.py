"""LLaVA 1.5 7B, first stage: the connector alone learns to say what a picture shows.

Paper: Liu et al. 2023, arXiv 2310.03744: 558,000 pairs of image and caption once, 256 a step,
a rate of 1e-3, warm-up 3 %, a cosine to 0, AdamW without decay. Tower: CLIP L/14 at 336
pixels before its last layer, 576 patches; connector: an MLP; decoder: Vicuna 7B (Llama 2).
7,050,312,704 parameters, of which 20,979,712 train. The second stage is llava_7b_instruct.py.
Expected: not run here; on 256 TPU v5p a plan has 163 ms a step, 6 minutes (docs/pods.md).
Data: `data/llava/pretrain.jsonl` as JSON Lines in LLaVA's layout with images under
`data/llava/images`, `tokenizer.json` and the two models beside, as safetensors: where the
hub has a pickle alone (`pytorch_model*.bin`), which is never read, write the model anew by
transformers' `CLIPModel.from_pretrained(NAME).save_pretrained(FOLDER)`, and Vicuna by
`LlamaForCausalLM`. Command:
    python -m train configs/llava_7b.py --mesh data=4,fsdp=64
"""

import dataclasses
import math

import jax.numpy as jnp

from jaxformer.data.images import CenterCrop, Decode, Normalize, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.templates import Captions, Template
from jaxformer.data.tokenizer import TokenizerFile
from jaxformer.data.vqa import Dialogues
from jaxformer.experiment import Experiment, Keep
from jaxformer.layers.connect import Project
from jaxformer.models import clip, decoder, decoder_sizes, vit
from jaxformer.models.vlm import VLM, Early
from jaxformer.objectives.next_token import NextToken
from jaxformer.optim import AdamW, Cosine, Parts
from jaxformer.start import Hub

SIDE, PATCHES, IMAGE = 336, 576, 32_000
PAIRS, BATCH = 558_128, 256
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def model() -> VLM:
    """A row for the image's token is added to the decoder's 32,000, and to the head."""
    dtype = jnp.bfloat16
    language = decoder_sizes.named("llama2-7b", vocab=IMAGE + 1, remat="dots", dtype=dtype)
    tower = clip.named("L/14@336", channels=3, remat="dots", dtype=dtype).parts().vision
    stack = tower.stack.clone(depth=tower.stack.depth - 1)
    tower = dataclasses.replace(tower, stack=stack, norm=None, neck=None)
    return VLM(Early(tower), Project(4096, 4096, dtype=dtype), language, IMAGE, skip=1)


def flops(model: VLM, text: tuple[int, ...], images: tuple[int, ...], *rest) -> int:
    """Operations of one row forward, of the tower's layers that run."""
    count, *shape = images
    tower = vit.named("L/14", depth=23, num_classes=0)
    seen = count * vit.flops(tower, (shape[0], shape[1], shape[2]))
    return seen + decoder.flops(model.language, tuple(text))


def dialogues(name: str, length: int, template: Template) -> Pipeline:
    """Conversations about one image each."""
    tokenizer = TokenizerFile("data/llava/tokenizer.json", "<s>", "</s>")
    transforms = (Decode(), Resize(SIDE, "bicubic"), CenterCrop(SIDE), Normalize(MEAN, STD))
    size = (SIDE, SIDE, 3)
    paths, root = f"data/llava/{name}.jsonl", "data/llava/images"
    source = Dialogues(
        paths, root, tokenizer, length, IMAGE, PATCHES, size, transforms, template=template
    )
    return Pipeline(source, workers=16)


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    return Experiment(
        model=model(),
        objective=NextToken(inputs=("tokens", "images")),
        optimizer=Parts(AdamW(rate=Cosine(peak=1e-3, warmup=0.03), decay=0.0), ("connector",)),
        data=dialogues("pretrain", 768, Captions()),
        start=(
            # Of 24 layers 23 run.
            Hub(
                "data/llava/clip-vit-large-patch14-336",
                "vision/encoder",
                "vision",
                apart=(("stack", 0),),
            ),
            # Without the image's token.
            Hub(
                "data/llava/vicuna-7b-v1.5",
                "language",
                apart=(("table", 0), ("head", 1)),
            ),
        ),
        steps=math.ceil(PAIRS / BATCH),
        batch_size=BATCH,
        keep=Keep(every=500),
        flops=flops,
    )
