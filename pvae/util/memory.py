"""Checks that a declared model and its training fit into memory, made before anything large is allocated."""

import copy
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pvae.errors import DataError, DeclarationError, out_of_memory

COUNTED_BYTES = 1 << 26
"""Size (bytes) above which a tensor is only counted, not allocated. Once all tensors together exceed eight times this
size, every further tensor is only counted."""
SMALL_BYTES = 1 << 14
"""Size (bytes) up to which a buffer keeps its values in a copy without memory: they may decide what is computed."""
INDEXING = frozenset([torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default])
KEPT_IN_TRAINING = 3
"""Copies of the weights that a fit keeps beside them and their gradients: two moments, and the best weights."""
ON_META = {"device": torch.device("meta")}
GIB = 1 << 30
Device = torch.device | None

Made = TypeVar("Made", bound=nn.Module)
Step = Callable[[Any], object]
"""Function that runs a training step on a module without memory."""


class _Weighing(torch.utils._python_dispatch.TorchDispatchMode):
    """Torch mode that counts the bytes of the living tensors, and makes large ones on the meta device, without memory.

    Whatever is computed from a tensor on the meta device is one, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.sum = 0
        self.large = False
        self.living: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first tensor imports torch's compiler, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
        for t in tensors:
            self._count(t, 0)
        if any(t.is_meta for t in tensors) or (len(tensors) > 1 and self._is_large(_largest_result(tensors))):
            self.large, found = True, self._on_meta(func, args, given)
        elif not tensors and self._is_large(prod(n for n in tree_leaves(args) if isinstance(n, int) and n > 1)):
            makes = any(argument.name == "device" for argument in func._schema.arguments)
            self.large, found = self.large or makes, func(*args, **{**given, **(ON_META if makes else {})})
        else:
            found = func(*args, **given)
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                self._count(t, t.untyped_storage().nbytes())
        return found

    def _is_large(self, elements: float) -> bool:
        """Return True if a new tensor of so many elements is only counted."""
        return 4 * elements > COUNTED_BYTES or self.now + 4 * elements > 8 * COUNTED_BYTES

    def _on_meta(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Return the result of an operation with all its tensors moved to the meta device."""
        if func is torch.ops.aten._is_all_true.default:  # arguments of distributions are valid
            return torch.ones((), dtype=torch.bool)
        if func in INDEXING:  # by a mask, as if all of it were true
            args = (args[0], [j for i in args[1] for j in _places(i)], *args[2:])
        moved, options = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, given))
        found = func(*moved, **{**options, **(ON_META if "device" in options else {})})
        return args[0] if func._schema.is_mutable and found is moved[0] else found

    def _count(self, t: Tensor, size: int) -> None:
        storage = t.untyped_storage()
        if (key := storage._cdata) not in self.living:
            self.living[key] = weakref.ref(storage, lambda _: self._end(key, size))
            self.now += size
            self.sum += size
            self.peak = max(self.peak, self.now)

    def _end(self, key: int, size: int) -> None:
        self.living.pop(key, None)
        self.now -= size


def _largest_result(tensors: list[Tensor]) -> float:
    """Return about the most elements that a broadcast, product or convolution of the two largest tensors has."""
    b, a = sorted(tensors, key=Tensor.numel)[-2:]
    pairs = zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1)
    inner, outer = min(a.shape[-1:] + a.shape[1:2], default=1), max(b.shape[:1] + b.shape[-1:], default=1)
    return max(prod(map(max, pairs)), a.numel() / max(1, inner) * outer)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return an index of a tensor, in place of a mask as many indices as the mask has elements."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.dim()


def weighed(make: Callable[[], Made], step: Step | None = None, rows: int = 0, device: Device = None) -> Made:
    """Return the result of `make()`, a module, unless its making or training needs more memory than there is.

    `make` is called a second time if some tensor is large but all fit; it must give the same result both times. A step
    of training is run only if it could need all memory, judged by the sum of all tensors of `make`, which runs a row.

    Arguments:
        make: function that makes the module.
        step: function that runs a training step on it, on a batch on the meta device; None if it will not be trained.
        rows: number of rows of the batch.
        device: device of the training.

    Raises:
        DeclarationError: the tensors do not fit; nothing large was allocated.
    """
    counting, trained = _Weighing(), 0
    try:
        with counting:
            made = make()
        if step is not None and counting.sum * rows > total_memory(device):
            trained = training_memory(made, step)
        if not counting.large and trained <= total_memory(device):
            return made
    except Exception as error:
        if isinstance(error, RuntimeError) and "overflow" in str(error):
            raise _refused("more than 2^63 bytes") from error
        if out_of_memory(error):  # of a tensor that is made of small ones
            raise _refused("more than is free") from error
        if not counting.large or "meta" not in str(error):
            raise
        trained = (1 + KEPT_IN_TRAINING) * counting.peak if step else 0
    if trained > total_memory(device):
        raise _refused(f"at least {_gib(trained)} to be trained in batches of {rows:,} rows", device)
    if counting.peak > total_memory():
        raise _refused(f"at least {_gib(counting.peak)}")
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _refused("more than is free") from error


def training_memory(module: nn.Module, step: Step) -> int:
    """Return the peak (bytes) of a fit: weights, gradients, optimiser state, best weights, and the tensors of a step.

    The step is run on a copy without memory. If values decide what it computes, it is counted up to there.

    Arguments:
        module: model and guide to fit.
        step: function that runs a training step on the copy, on a batch on the meta device.
    """
    counting = _Weighing()
    with suppress(Exception), torch.random.fork_rng(), counting:
        step(_on_meta(module))
    return counting.peak + (1 + KEPT_IN_TRAINING) * sum(p.nbytes for p in module.parameters())


def require_training_memory(pair: nn.Module, row: int, rows: int, device: Device, step: Step | None = None) -> None:
    """Refuse a fit whose weights, gradients, optimiser state and one batch do not fit into memory.

    The estimate is five copies of the weights (weights, gradients, two moments of the optimiser, best weights), and for
    a batch its values and the outputs of linear layers, with gradients; or `training_memory`, if that is more.

    Arguments:
        pair: model and guide to fit.
        row: number of elements of a datum.
        rows: number of rows of a batch.
        device: device of the fit.
        step: as for `training_memory`; None if the pair was weighed before.

    Raises:
        DeclarationError: the estimate exceeds the memory of the device; the message gives the estimate.
    """
    weights = sum(p.nbytes for p in pair.parameters())
    widths = sum(part.out_features for part in pair.modules() if isinstance(part, nn.Linear))
    needed = max(5 * weights + 4 * rows * (row + 2 * widths), training_memory(pair, step) if step else 0)
    if needed > total_memory(device):
        copies = f"{weights // 4:,} weights five times over, and batches of {rows:,} rows"
        raise _refused(f"at least {_gib(needed)} to be trained ({copies})", device)


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters, and buffers of more than `SMALL_BYTES`, lie on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if (own := isinstance(tensor, nn.Parameter)) or tensor.nbytes > SMALL_BYTES:
            moved = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if own else moved
    return copy.deepcopy(module, memo)


def _refused(needed: str, device: torch.device | None = None) -> DeclarationError:
    memory = _gib(total_memory(device))
    return DeclarationError.of("util.memory.declaration", memory=memory, device=device, needed=needed)


def require_memory(needed: float, name: str, got: str, todo: str) -> None:
    """Refuse rows that need more than half of this computer's memory.

    Arguments:
        needed: bytes that they need.
        name: what reads or makes them.
        got: their number, or shape and type.
        todo: what the user can do.

    Raises:
        DataError: the message gives the memory that they need.
    """
    if 2 * needed > (memory := total_memory()):
        raise DataError.of("util.memory.rows", name=name, memory=memory / GIB, got=got, needed=needed / GIB, todo=todo)


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
