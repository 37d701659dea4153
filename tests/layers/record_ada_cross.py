"""`python -m tests.layers.record_ada_cross`: records two blocks of diffusers that hear a text.

Needs the extra `parity`. Stable Diffusion's block, and PixArt's, which a time tells shifts,
scales and gates: parameters, tokens, a text with padding, and what comes out.
"""

import pathlib

import numpy as np
import torch
from diffusers.models.attention import BasicTransformerBlock

PATH = pathlib.Path(__file__).parent / "ada_cross.npz"
OPTIONS = {
    "sd": {"activation_fn": "geglu"},
    "pixart": {
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
    },
}


def main() -> None:
    """Records them."""
    torch.manual_seed(0)
    x, text = torch.randn(2, 6, 12), torch.randn(2, 5, 10)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    told = torch.randn(2, 6 * 12)
    arrays = {"x": x, "text": text, "real": real, "told": told}
    for name, options in OPTIONS.items():
        module = BasicTransformerBlock(12, 3, 4, cross_attention_dim=10, **options).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            found = module(
                x,
                encoder_hidden_states=text,
                encoder_attention_mask=-1e4 * (1 - real[:, None].float()),
                timestep=told if name == "pixart" else None,
            )
        arrays |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        arrays[f"{name}:out"] = found
    np.savez_compressed(PATH, **{name: value.numpy() for name, value in arrays.items()})
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
