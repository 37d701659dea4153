"""Autoencoders of diffusers: Stable Diffusion's, and VQ-GAN's."""

import jax
import jax.numpy as jnp

from jaxformer.layers import convolve
from tests.parity.case import Case, wrong
from tests.parity.dit import Changed

TINY = {
    "block_out_channels": (4, 6, 6),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 3,
}


def _kl():
    import diffusers

    return diffusers.AutoencoderKL(**TINY, scaling_factor=0.5, shift_factor=0.125)


def _vq():
    import diffusers

    return diffusers.VQModel(**TINY, num_vq_embeddings=7, vq_embed_dim=5)


def _images(draw):
    return {
        "images": draw.normal(size=(2, 8, 12, 3)).astype("float32"),
        "latents": draw.normal(size=(2, 2, 3, 3)).astype("float32"),
    }


def _last(x):
    return x.permute(0, 2, 3, 1)


def _kl_theirs(module, inputs):
    told = module.config
    law = module.encode(inputs["images"].permute(0, 3, 1, 2)).latent_dist
    z = inputs["latents"].permute(0, 3, 1, 2) / told.scaling_factor + told.shift_factor
    return {
        "latents": _last((law.mean - told.shift_factor) * told.scaling_factor),
        "log_variance": _last(law.logvar),
        "images": _last(module.decode(z).sample),
    }


def _kl_ours(model, variables, inputs):
    law = model.apply(variables, inputs["images"], method="posterior")
    return {
        "latents": model.apply(variables, inputs["images"], method="encode"),
        "log_variance": law.log_variance,
        "images": model.apply(variables, inputs["latents"], method="decode"),
    }


def _vq_theirs(module, inputs):
    found = module(inputs["images"].permute(0, 3, 1, 2))
    return {"images": _last(found.sample)}


def _vq_ours(model, variables, inputs):
    return {"images": model.apply(variables, inputs["images"])[0]}


class Replaced(Changed):
    """A model while a part of `layers.convolve` is another."""

    def __init__(self, model, name, part):
        super().__init__(model)
        self.name, self.part = name, part

    def apply(self, *args, **kwargs):
        kept = getattr(convolve, self.name)
        setattr(convolve, self.name, self.part)
        try:
            return self.model.apply(*args, **kwargs)
        finally:
            setattr(convolve, self.name, kept)


class PaddedAllAround(convolve.Conv):
    """Strides from a row and a column before the first."""

    def __post_init__(self):
        self.padding = (1, 0) if self.stride == 2 else self.padding
        super().__post_init__()


CASES = (
    Case(
        "sd_vae",
        _kl,
        _images,
        _kl_theirs,
        _kl_ours,
        {
            "another scale": wrong("scale", 0.18215),
            "no shift": wrong("shift", 0.0),
            "padded before": lambda m, x: (Replaced(m, "Conv", PaddedAllAround), x),
            "relu": lambda m, x: (Replaced(m, "silu", jax.nn.relu), x),
            "groups of all": wrong("groups", 1),
        },
    ),
    Case(
        "vq_gan",
        _vq,
        lambda draw: {"images": _images(draw)["images"]},
        _vq_theirs,
        _vq_ours,
        {
            "farthest code": lambda m, x: (
                Changed(
                    m,
                    given=lambda p: {
                        **p,
                        "codebook": jax.tree.map(lambda t: jnp.flip(t, 0), p["codebook"]),
                        "encoded": jax.tree.map(jnp.negative, p["encoded"]),
                    },
                ),
                x,
            )
        },
        slow=True,
    ),
)
