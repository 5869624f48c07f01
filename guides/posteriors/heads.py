"""Heads of discrete posteriors: from features to logits or vectors at every position of a grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pvae.component import Shape
from pvae.nn.network import MLP, Network, NetworkModule
from pvae.nn.resnet import Pointwise


def head(network: Network | None, inputs: Mapping[str, Shape], output: Shape) -> NetworkModule:
    """Return the network from a posterior's inputs to its parameters `(..., *output)`.

    The default is one linear map; if features lie on the same grid as the output, one shared by all positions.
    """
    if network is not None:
        return network.build(inputs, output)
    if len(output) == 3 and any(len(shape) == 3 and shape[1:] == output[1:] for shape in inputs.values()):
        return Pointwise(inputs, output)
    return MLP(hidden=()).build(inputs, output)


def channels_last(h: Tensor, grid: int) -> Tensor:
    """Return a tensor `(..., C, *grid)` as `(..., *grid, C)`, for a grid of `grid` dimensions."""
    return h.movedim(-1 - grid, -1) if grid else h
