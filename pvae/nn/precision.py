"""Numerical precision of the matrix products and convolutions of networks in a training step."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "float32", "bfloat16"]
ROUNDED = "bfloat16 by rounded factors"
"""Precision of a fit in bfloat16 on a processor without bfloat16 products; see `BFloat16Products`."""
CONVOLUTIONS = [f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)]
PRODUCTS = (nn.functional.linear, *(getattr(nn.functional, name) for name in CONVOLUTIONS))
"""Functions of (input, weight, bias, ...) whose products can be computed in bfloat16."""
SPLIT = 2.0**16 + 1
"""Veltkamp's factor: it divides the 24 significant bits of a float32 into 8, those of a bfloat16, and 16."""


class BFloat16Products(torch.overrides.TorchFunctionMode):
    """Context manager in which dense layers and convolutions of float32 tensors multiply in bfloat16.

    In the forward and backward pass, factors and results are rounded to bfloat16, a relative error of at most 2^-8
    (binary x is exact). Biases are added in float32, and all else stays as it is: weights, optimiser, activations,
    samples, densities, and products of other types. (autocast would pass bfloat16 on to later operations, down to the
    scales of distributions.) Layers inside torch's own composites (`nn.MultiheadAttention`, `nn.GRU`) are not affected.
    Recomputation in the backward pass (`torch.utils.checkpoint`) raises an error in torch, since the mode is active in
    the forward pass only.

    A CPU without bfloat16 products would emulate them slowly and round more than once: on it the factors of the forward
    pass are rounded to bfloat16 and multiplied in float32, and nothing else is rounded.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in PRODUCTS and (args[0] if args else options["input"]).dtype is torch.float32:
            return _product(func, *args, **options)
        return func(*args, **options)


@cache
def multiplies_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 products (AVX512-BF16, AMX, or those of ARM) and torch uses them."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def resolved(precision: str, device: torch.device) -> str:
    """Return what a declared precision is on a device: "float32", "bfloat16" or `ROUNDED` (never of "auto")."""
    has = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else multiplies_bfloat16()
    if precision == "auto":
        precision = "bfloat16" if has else "float32"
    return ROUNDED if precision == "bfloat16" and not has else precision


def rounded(x: Tensor) -> Tensor:
    """Return a float32 tensor rounded to the nearest bfloat16 values, still float32; gradients pass unchanged.

    A cast to bfloat16 and back is fastest, but Inductor takes it out: a compiled step rounds by sums, which are exact
    below 2^111.
    """
    still = x.detach()
    if torch.compiler.is_compiling():
        high = still * SPLIT
        return x - (still - (high - (high - still)))
    return x - (still - still.bfloat16())


def _product(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    if input.device.type == "cpu" and not multiplies_bfloat16():
        return func(rounded(input), rounded(weight), bias, *rest, **options)
    out = func(input.bfloat16(), weight.bfloat16(), None, *rest, **options).float()
    if bias is None:
        return out
    return out + (bias if func is nn.functional.linear else bias.reshape(-1, *[1] * (weight.dim() - 2)))


def products_in(precision: str) -> AbstractContextManager[Any]:
    """Return a context manager in which networks compute their products in a resolved precision."""
    return BFloat16Products() if precision.startswith("bfloat16") else nullcontext()
