"""Stacks of blocks as layers with numbers, and layers as a stack that compiles few of them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn

from jaxformer.layers.block import Chain, Stack


class Layer(NamedTuple):
    """One layer: the path of its parameters, its row on their first axis, and its block.

    The row is None where the parameters have no axis of layers.
    """

    path: str
    row: int | None
    block: nn.Module


def layers_of(stack: nn.Module, path: str = "stack") -> list[Layer]:
    """The layers of a stack, a chain of stacks or a block, in the order they are run.

    Raises:
      ValueError: a stack within a stack.
    """
    if isinstance(stack, Chain):
        named = ((f"{path}/parts_{i}", part) for i, part in enumerate(stack.parts))
        return [layer for name, part in named for layer in layers_of(part, name)]
    if not isinstance(stack, Stack):
        return [Layer(path, None, stack)]
    inner = layers_of(stack.block, f"{path}/block")
    if any(layer.row is not None for layer in inner):
        raise ValueError(f"{path}: a Stack within a Stack has no layers that can be numbered")
    return [layer._replace(row=i) for i in range(stack.depth) for layer in inner]


def arrange(blocks: Sequence[nn.Module]) -> nn.Module:
    """Blocks, no two of them one object, as a stack with as few to compile as there can be.

    Either a round of blocks is repeated, or blocks that are alike follow each other.
    """
    period = next(
        p
        for p in range(1, len(blocks) + 1)
        if all(blocks[i] == blocks[i - p] for i in range(p, len(blocks)))
    )
    rounds = len(blocks) // period
    rest, every = _runs(blocks[rounds * period :]), _runs(blocks)
    if period == 1:
        return every[0]
    if period + len(rest) > len(every):
        return Chain(tuple(every))
    repeated = Stack(Chain(tuple(blocks[:period])), rounds)
    return Chain((repeated, *rest)) if rest else repeated


def _runs(blocks: Sequence[nn.Module]) -> list[Stack]:
    return [Stack(block, len(list(alike))) for block, alike in itertools.groupby(blocks)]
