"""Draws as pure functions of a model's step or denoiser, a key and a shape."""
