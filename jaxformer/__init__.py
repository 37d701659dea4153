"""Pure-JAX transformers: ViT, VLM, DiT and masked-diffusion language models."""

__version__ = "0.1.0"
