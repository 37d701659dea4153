"""A training step compiled for chips that are not there, and what it would cost.

`plan(experiment, "v5p:8x8x8")` gives a `Plan`, as data; `python -m train.plan` prints it.
"""

from jaxformer.plan.ahead import Plan, plan

__all__ = ["Plan", "plan"]
