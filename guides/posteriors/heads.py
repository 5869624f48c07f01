"""Heads of discrete posteriors: from features to numbers at every position of a grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pvae.component import Shape
from pvae.nn.dense import MLP
from pvae.nn.network import Network, NetworkModule
from pvae.nn.resnet import Pointwise


def head(network: Network | None, inputs: Mapping[str, Shape], output: Shape) -> NetworkModule:
    """From a posterior's inputs to numbers `(..., *output)`.

    Unless said it is one linear map, and on a grid of features one for all positions.
    """
    if network is not None:
        return network.build(inputs, output)
    if len(output) == 3 and any(len(shape) == 3 and shape[1:] == output[1:] for shape in inputs.values()):
        return Pointwise(inputs, output)
    return MLP(hidden=()).build(inputs, output)


def channels_last(h: Tensor, grid: int) -> Tensor:
    """`(..., C, *grid)` to `(..., *grid, C)`."""
    return h.movedim(-1 - grid, -1) if grid else h
