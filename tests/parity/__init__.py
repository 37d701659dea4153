"""Our models beside the originals, by files that the originals wrote.

`recorded/` holds tiny models with every parameter randomised, as their library saves them,
with what they answered and the gradients of their parameters. `make.py` writes them; the
tests read them, and need no torch.
"""
