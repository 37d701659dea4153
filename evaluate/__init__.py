"""The program that reads checkpoints."""
