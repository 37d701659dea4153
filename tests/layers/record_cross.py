"""`python -m tests.layers.record_cross`: records a tiny Whisper decoder of transformers.

Needs the extra `parity`. Writes its parameters, a text, what it hears and its logits.
"""

import pathlib

import numpy as np
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

PATH = pathlib.Path(__file__).parent / "cross.npz"


def main() -> None:
    """Records it."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=17,
        d_model=12,
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=20,
        max_target_positions=9,
        pad_token_id=0,
    )
    module = WhisperDecoder(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens, heard = torch.randint(1, 17, (2, 7)), torch.randn(2, 5, 12)
    with torch.no_grad():
        found = module(input_ids=tokens, encoder_hidden_states=heard, use_cache=False)
        hidden = found.last_hidden_state
        logits = hidden @ module.embed_tokens.weight.T
    arrays = {name: x.numpy() for name, x in module.state_dict().items()}
    asked = {"in:tokens": tokens.numpy().astype("int32"), "in:context": heard.numpy()}
    np.savez_compressed(PATH, **arrays, **asked, **{"out:logits": logits.numpy()})
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
