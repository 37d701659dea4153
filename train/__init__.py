"""The program that makes checkpoints."""
