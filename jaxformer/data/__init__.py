"""Grain pipelines: sources, images, loader."""
