"""What the products of a training step's networks are made in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Precision = Literal["float32", "bfloat16"]
PRODUCTS = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
"""What takes (input, weight, bias, ...)."""


class BFloat16Products(TorchFunctionMode):
    """Dense layers and convolutions of float32 tensors multiply in bfloat16, forward and backward.

    Factors and results are rounded to bfloat16, a relative error of at most 2^-8 (binary x is exact); biases are added
    in float32, and all else stays as it is: weights, optimiser, activations, draws, densities, and products of other
    types. (autocast would hand bfloat16 on to what follows, down to the scales of distributions.) Layers inside torch's
    own composites (`nn.MultiheadAttention`, `nn.GRU`) are not reached, and what is computed anew on the way back
    (`torch.utils.checkpoint`) is refused by torch, since the mode holds on the way forward.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        options = dict(kwargs or {})
        if func in PRODUCTS and (args[0] if args else options["input"]).dtype is torch.float32:
            return _product(func, *args, **options)
        return func(*args, **options)


def _product(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    out = func(input.bfloat16(), weight.bfloat16(), None, *rest, **options).float()
    if bias is None:
        return out
    return out + (bias if func is functional.linear else bias.reshape(-1, *[1] * (weight.dim() - 2)))


def products_in(precision: Precision) -> AbstractContextManager[Any]:
    """Within, networks multiply in `precision`."""
    return BFloat16Products() if precision == "bfloat16" else nullcontext()
