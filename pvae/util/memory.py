"""Checks that a declared model and its training fit into memory, made before anything large is allocated."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pvae.errors import DeclarationError, out_of_memory

COUNTED_BYTES = 1 << 27
"""Size (bytes) above which a tensor is only counted, not allocated. Once all tensors together exceed eight times this
size, every further tensor is only counted."""
GIB = 1 << 30
MAKERS = frozenset([torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange])

Made = TypeVar("Made")


class _Counting(TorchFunctionMode):
    """Torch mode that counts the bytes of all new tensors and creates large ones on the meta device, without memory."""

    bytes = 0
    large = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in MAKERS and given.get("out") is None:
            counted: Tensor = func(*args, **{**given, "device": "meta"})
            self.bytes += counted.nbytes
            if counted.nbytes > COUNTED_BYTES or self.bytes > 8 * COUNTED_BYTES:
                self.large = True
                return counted.requires_grad_(bool(given.get("requires_grad", False)))
        return func(*args, **given)


def weighed(make: Callable[[], Made]) -> Made:
    """Return the result of `make()`, such as a module, unless its tensors need more memory than this computer has.

    `make` is called a second time if some tensor is large but all fit; it must give the same result both times.

    Raises:
        DeclarationError: the tensors do not fit; nothing large was allocated.
    """
    counting = _Counting()
    try:
        with counting:
            made = make()
        if not counting.large:
            return made
    except Exception as error:
        if isinstance(error, RuntimeError) and "overflow" in str(error):
            raise _refused("more than 2^63 bytes") from error
        if out_of_memory(error):  # of a tensor that is made of small ones
            raise _refused("more than is free") from error
        if not counting.large:
            raise
    if counting.bytes > total_memory():
        raise _refused(f"at least {_gib(counting.bytes)}")
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _refused("more than is free") from error


def require_training_memory(pair: nn.Module, row: int, rows: int, device: torch.device) -> None:
    """Refuse a fit whose weights, gradients, optimiser state and one batch do not fit into memory.

    The estimate is five copies of the weights (weights, gradients, two moments of the optimiser, best weights), and for
    a batch its values and the outputs of linear layers, with gradients.

    Arguments:
        pair: model and guide to fit.
        row: number of elements of a datum.
        rows: number of rows of a batch.
        device: device of the fit.

    Raises:
        DeclarationError: the estimate exceeds the memory of the device; the message gives the estimate.
    """
    weights = sum(p.nbytes for p in pair.parameters())
    widths = sum(part.out_features for part in pair.modules() if isinstance(part, nn.Linear))
    needed = 5 * weights + 4 * rows * (row + 2 * widths)
    if needed > total_memory(device):
        copies = f"{weights // 4:,} weights five times over, and batches of {rows:,} rows"
        raise _refused(f"at least {_gib(needed)} to be trained ({copies})", device)


def _refused(needed: str, device: torch.device | None = None) -> DeclarationError:
    where = "this GPU" if device is not None and device.type == "cuda" else "this computer"
    return DeclarationError(
        f"Expected a declaration that fits into the {_gib(total_memory(device))} of {where}; got one that needs "
        f"{needed}. Make latents, codes, networks or batches smaller."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"


def total_memory(device: torch.device | None = None) -> int:
    """Return the total memory (bytes) of a GPU, or of this computer: physical memory, or a lower cgroup limit."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [1 << 62]
    with suppress(AttributeError, ValueError, OSError):  # a system that does not say
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(file).read_text()))
    return min(found)
