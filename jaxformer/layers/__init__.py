"""Stateless linen modules that models are made of."""
