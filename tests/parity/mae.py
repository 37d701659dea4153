"""MAE of transformers."""

import functools

import jax
import jax.numpy as jnp

from jaxformer.models.mae import masking
from jaxformer.objectives.reconstruct import Reconstruct
from jaxformer.ops.activation import gelu_tanh
from tests.parity.case import Case, wrong

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
    "image_size": 16,
    "patch_size": 4,
    "mask_ratio": 0.7,  # 4 of 16 patches are shown.
}
# transformers 5 takes the encoder's names for the decoder's where it saves them.
HUB = ((r"decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),)


def _original(task: str, **fields):
    from transformers.models import vit_mae

    return getattr(vit_mae, f"ViTMAE{task}")(vit_mae.ViTMAEConfig(**TINY | fields))


def _inputs(draw, rows=16, columns=16):
    images = draw.normal(size=(2, rows, columns, 3)).astype("float32")
    noise = draw.uniform(size=(2, rows * columns // 16)).astype("float32")
    return {"images": images, "noise": noise}


def _drawn(module, inputs):
    found = module(inputs["images"].permute(0, 3, 1, 2), noise=inputs["noise"])
    loss = found.loss[None]
    restore = found.ids_restore.float()
    return {"pixels": found.logits, "mask": found.mask, "restore": restore, "loss": loss}


def _we_draw(model, variables, inputs):
    pixels, mask = model.apply(variables, inputs["images"], inputs["noise"])
    objective = Reconstruct(model.patch, model.normalize)
    batch = {"image": inputs["images"], "noise": inputs["noise"]}
    loss, _ = objective.loss(model.apply, variables["params"], batch, jax.random.key(0))
    restore = masking(jnp.asarray(inputs["noise"]), 0.7).restore.astype(float)
    return {"pixels": pixels, "mask": mask, "restore": restore, "loss": loss[None]}


def _encoded(module, inputs):
    images, noise = inputs["images"].permute(0, 3, 1, 2), inputs["noise"]
    found = module(images, noise=noise, interpolate_pos_encoding=True)
    return {"tokens": found.last_hidden_state}


def _we_encode(model, variables, inputs):
    return {
        "tokens": model.apply(variables, inputs["images"], inputs["noise"], method="encode")
    }


def _noise(change):
    return lambda model, inputs: (model, inputs | {"noise": change(inputs["noise"])})


CASES = (
    Case(
        "mae_pretrain",
        functools.partial(_original, "ForPreTraining", norm_pix_loss=True),
        _inputs,
        _drawn,
        _we_draw,
        {
            "gelu by tanh": wrong("encoder.stack.block.mlp.activation", gelu_tanh),
            "decoder's gelu": wrong("decoder.stack.block.mlp.activation", gelu_tanh),
            "pixels as they are": wrong("normalize", False),
            "another ratio": wrong("encoder.embed.ratio", 0.6),
            "the most noise is shown": _noise(lambda noise: -noise),
            "noise counts from the other end": _noise(lambda noise: noise[:, ::-1]),
        },
        hub=HUB,
    ),
    Case(
        "mae_small",  # Activations so small that epsilon counts.
        functools.partial(
            _original, "ForPreTraining", layer_norm_eps=1e-6, qkv_bias=False, image_size=8
        ),
        functools.partial(_inputs, rows=8, columns=8),
        _drawn,
        _we_draw,
        {
            "epsilon": wrong("encoder.stack.block.epsilon", 1e-5),
            "last": wrong("encoder.norm.epsilon", 1e-5),
            "decoder's": wrong("decoder.stack.block.epsilon", 1e-5),
            "decoder's last": wrong("decoder.norm.epsilon", 1e-5),
            "normalised pixels": wrong("normalize", True),
        },
        {
            "vit.embeddings": 1e-2,
            "o_proj": 1e-2,
            "fc2": 1e-2,
            "decoder_embed": 1e-2,
            "mask_token": 1e-2,
            "decoder_pos": 1e-2,
        },
        hub=HUB,
    ),
    Case(
        "mae_encoder",
        functools.partial(_original, "Model"),
        functools.partial(_inputs, columns=24),
        _encoded,
        _we_encode,
        {
            "antialiased resize": wrong("embed.embed.position.antialias", True),
            "bilinear resize": wrong("embed.embed.position.method", "bilinear"),
        },
    ),
)
