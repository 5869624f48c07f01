"""One split (train, validation or test) of a data set, from which mini-batches are taken."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.data.rows.rows import chunks
from pvae.data.streamed import Streamed, WindowOrder
from pvae.errors import DataError
from pvae.util import group, seeds


@dataclass(frozen=True, eq=False)
class Split:
    """Split of a data set: its rows, labels, and covariates if the model is conditional.

    Arguments:
        name: "train", "validation" or "test".
        rows: (n, *shape) float32; with covariates (n, D + covariates), each datum flattened and followed by its
            covariates. Data that stay on the disk are `Streamed`: rows are read when they are indexed.
        y: (n,) int64 labels, or None.
        raw: (n, *shape) intensities in [0, 1] that `draw` binarises anew for every batch, or None.
        event: shape of a datum without covariates, if rows include covariates; else None.
    """

    name: str
    rows: Tensor | Streamed
    y: Tensor | None = None
    raw: Tensor | Streamed | None = None
    event: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def x(self) -> Tensor:
        """All rows of the split as one tensor, shaped as `rows`.

        Raises:
            DataError: the rows are streamed and too many to be read at once; index `rows` instead.
        """
        return self.rows[:] if isinstance(self.rows, Streamed) else self.rows

    @property
    def data(self) -> Tensor:
        """All data of the split without covariates, one tensor (n, *shape); see `x` for streamed rows."""
        return self.observed(self.x)

    def observed(self, rows: Tensor) -> Tensor:
        """Return the data `(m, *shape)` of rows `(m, ...)` of this split, without their covariates."""
        return rows if self.event is None else rows[:, : prod(self.event)].reshape(len(rows), *self.event)

    def order(self, seed: int, epoch: int, batch: int = 1, shards: group.Shards | None = None) -> Tensor | WindowOrder:
        """Return the random order of the rows in an epoch, a function of (seed, epoch); its slices are row numbers.

        Of streamed rows every shard of a batch has blocks of its own, which its process alone reads.
        """
        x = self.rows if self.raw is None else self.raw
        if isinstance(x, Streamed):
            return x.blocks.order(seed, epoch, batch, shards)
        return seeds.permutation(len(x), seed, epoch).to(x.device)

    def draw(self, index: Tensor) -> Tensor:
        """Return the batch of rows with given row numbers.

        Dynamically binarised data are sampled anew at each call, from torch's global generator.
        """
        if self.raw is None:
            return self.rows[index]
        fresh = torch.bernoulli(self.raw[index])
        if self.event is None:
            return fresh
        columns = self.rows.columns if isinstance(self.rows, Streamed) else self.rows[:, prod(self.event) :]
        assert columns is not None  # noqa: S101 - there is an event, so columns stand behind it
        return torch.cat([fresh.flatten(1), columns[index].to(fresh)], 1)

    def to(self, device: str | torch.device) -> Self:
        """Return the split with its tensors on a device; streamed rows are moved to it when they are read."""
        moved = {name: part.to(device) for name in ("rows", "y", "raw") if (part := getattr(self, name)) is not None}
        return replace(self, **moved)

    def plain(self) -> Self:
        """Return the split without covariates in its rows."""
        if self.event is None:
            return self
        rows = self.rows.with_columns(None) if isinstance(self.rows, Streamed) else self.data
        return replace(self, rows=rows, event=None)

    def conditioned(self, codes: int, tokens: Sequence[Sequence[int]] | None = None) -> Self:
        """Return the split with each row flattened and followed by its label as a covariate.

        Arguments:
            codes: number of values of the label.
            tokens: token sequence of every label; if given, rows are followed by these tokens, not by the label.

        Raises:
            DataError: the split has no labels, or a label is outside 0 .. codes - 1.
        """
        if self.y is None:
            raise DataError(f"{self.name}: expected labels, on which the model is conditioned; got none.")
        if len(self.y) and not 0 <= int(self.y.min()) <= int(self.y.max()) < codes:
            raise DataError(
                f"{self.name}: expected labels 0 .. {codes - 1}; got {int(self.y.min())} .. {int(self.y.max())}. "
                f"Set the covariate's codes to {int(self.y.max()) + 1}."
            )
        columns = self.y[:, None] if tokens is None else torch.tensor(tokens, device=self.y.device)[self.y]
        event = tuple(self.rows.shape[1:])
        if isinstance(self.rows, Streamed):
            return replace(self, rows=self.rows.with_columns(columns), event=event)
        return replace(self, rows=torch.cat([self.rows.flatten(1), columns.to(self.rows)], 1), event=event)

    def chunks(self) -> Iterator[Tensor]:
        """Yield the data without covariates in consecutive chunks `(m, *shape)` of about `CHUNK_ELEMENTS` values."""
        rows: Any = self.rows
        return (self.observed(torch.as_tensor(chunk)) for _, chunk in chunks(rows, range(len(self))))

    def require_support(self, constraint: Any, hint: str) -> None:
        """Refuse a split with an element outside a constraint.

        Arguments:
            constraint: support of one element, as `elementwise` returns it.
            hint: advice that ends the message, such as the transform to use instead.

        Raises:
            DataError: an element is outside; the message gives its split, row, element and the support.
        """
        row = 0
        for chunk in self.chunks():
            inside = constraint.check(chunk)
            if not bool(inside.all()):
                first, *element = (int(i) for i in (~inside).nonzero()[0])
                value = chunk[(first, *element)]
                shown = f"{value.item():g}" if value.numel() == 1 else str(value.flatten()[:6].tolist())
                where, wanted = _named(constraint, element)
                raise DataError(
                    f"{self.name}, row {row + first}, {where}: expected {wanted}, as the likelihood does; got {shown}. "
                    f"{hint}".rstrip()
                )
            row += len(chunk)


def elementwise(constraint: Any) -> Any:
    """Return the constraint on a single element, without `independent` wrappers: ``real`` for ``real_vector``."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _named(constraint: Any, element: list[int]) -> tuple[str, str]:
    """Return the name of an element (column of a table, or array indices) and a description of its support."""
    from pvae.models.likelihoods.columns import columns

    if isinstance(constraint, columns):
        return constraint.named(element[0]), constraint.of(element[0])
    # torch's own words, `Interval(lower_bound=0.0, upper_bound=1.0)`, or the constraint's name
    return f"element {tuple(element)}", f"a value in {constraint}".removesuffix("()")
