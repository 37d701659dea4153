"""Losses as pure functions of (params, batch, key)."""
