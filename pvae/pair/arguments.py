"""Several arguments of hand-written programs, packed into one tensor with a row of bytes for every row of data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from pvae.component import Shape
from pvae.errors import DataError

PairData = Tensor | Sequence[Any] | Mapping[str, Any]
"""Data of a pair: a tensor, or several arguments as a sequence or a mapping of tensors."""


@dataclass(frozen=True)
class Argument:
    """Shape of one row of an argument, its type, and its name (None for a positional one)."""

    shape: Shape
    dtype: torch.dtype
    name: str | None = None

    @property
    def width(self) -> int:
        """Number of bytes of one row."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Arguments:
    """Arguments of the programs of a pair, `model(x, y)` or `model(x=x, y=y)`, as rows of bytes.

    All are cut into the same batches: every analysis and every fit sees one tensor `(n, bytes)`, and the programs get
    their arguments back, of their own shapes and types, bit for bit.

    Example:
        >>> x, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
        >>> arguments = Arguments.of((x, y))
        >>> rows = arguments.pack((x, y))
        >>> args, _ = arguments.unpack(rows[1:])
        >>> torch.equal(args[0], x[1:]), args[1].tolist()
        (True, [1, 1])
    """

    parts: tuple[Argument, ...]

    @classmethod
    def of(cls, data: Sequence[Any] | Mapping[str, Any]) -> Self:
        """Return the arguments that a tuple, a list or a dictionary of tensors stands for."""
        return cls(tuple(Argument(tuple(t.shape[1:]), t.dtype, name) for name, t in _named(data)))

    def pack(self, data: Sequence[Any] | Mapping[str, Any]) -> Tensor:
        """Return the arguments as rows of bytes, `(n, bytes)`.

        Raises:
            DataError: number, names, types or shapes of the arguments differ, or their numbers of rows.
        """
        given = _named(data)
        found = tuple(Argument(tuple(t.shape[1:]), t.dtype, name) for name, t in given)
        if found != self.parts:
            raise DataError(f"x: expected the arguments {_words(self.parts)}; got {_words(found)}.")
        if len(rows := {len(t) for _, t in given}) > 1:
            raise DataError(f"x: expected arguments of the same number of rows; got {sorted(rows)}.")
        return torch.cat([t.contiguous().reshape(len(t), -1).view(torch.uint8) for _, t in given], 1)

    def unpack(self, rows: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the positional and the named arguments of rows of bytes, whatever numbers these are held as."""
        pieces = rows.to(torch.uint8).split([part.width for part in self.parts], -1)
        values = [
            (part.name, piece.contiguous().view(part.dtype).reshape(len(rows), *part.shape))
            for part, piece in zip(self.parts, pieces, strict=True)
        ]
        return tuple(v for name, v in values if name is None), {name: v for name, v in values if name is not None}


def is_several(data: Any) -> bool:
    """Return whether data are several arguments: a dictionary, or a tuple or list that holds a tensor or an array."""
    if isinstance(data, tuple | list):
        return any(hasattr(part, "shape") and len(part.shape) > 0 for part in data)
    return isinstance(data, dict)


def _named(data: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    items: Any = data.items() if isinstance(data, Mapping) else ((None, part) for part in data)
    try:
        found = [(name, torch.as_tensor(part)) for name, part in items]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"x: expected tensors or arrays as arguments; got something else: {error}.") from None
    if not found or any(not t.dim() for _, t in found):
        raise DataError("x: expected arguments with one row for every datum; got none, or a single number.")
    return found


def _words(parts: Sequence[Argument]) -> str:
    words = [f"{part.name or f'argument {i}'} {list(part.shape)} {part.dtype}" for i, part in enumerate(parts, 1)]
    return ", ".join(words)
