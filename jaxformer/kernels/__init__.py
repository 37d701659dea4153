"""Attention kernels in Pallas. They import jax and nothing of ours but each other."""
