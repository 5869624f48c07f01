"""One split (train, validation or test) of a data set, from which mini-batches are taken."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pvae.data.rows.rows import Part, chunks
from pvae.data.streamed import Streamed, WindowOrder
from pvae.errors import DataError, refuse
from pvae.graph.frame import Entry
from pvae.util import Record, field, group, replace, seeds


class Split(Record, eq=False):
    """Split of a data set: its rows, labels, and covariates if the model is conditional.

    Arguments:
        name: "train", "validation", "test", "all" (see `Dataset.whole`) or "new" (see `Run.rows`).
        rows: (n, *shape) float32; with covariates (n, D + covariates), each datum flattened and followed by its
            covariates. Data that stay on the disk are `Streamed`: rows are read when they are indexed.
        y: (n,) int64 labels, or None.
        raw: (n, *shape) intensities in [0, 1] that `draw` binarises anew for every batch, or None.
        event: shape of a datum without covariates, if rows include covariates; else None.
        part: row numbers in the source, or None if they are 0, 1, 2, ...
        ids: (n,) name of each row as NumPy text, as the source has it, or None; names may repeat.
        label_names: name of each label, or None.
        origin: (n,) name of the split that each row is from, as NumPy text; None if all are from this one.
        notes: remarks on how the rows were read.
        side: values beside x by name, `(n,)` float32: codes of levels, standardised numbers; NaN if missing.
    """

    name: str
    rows: Tensor | Streamed
    y: Tensor | None = None
    raw: Tensor | Streamed | None = None
    event: tuple[int, ...] | None = None
    part: Part | None = None
    ids: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    origin: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    side: Mapping[str, Tensor] = field(default_factory=dict)

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
    def numbers(self) -> np.typing.NDArray[np.int64]:
        """Number of each row in its source, `(n,)` int64 counted from 0; of an archive of splits, in their order."""
        part = range(len(self)) if self.part is None else self.part
        return np.arange(part.start, part.stop) if isinstance(part, range) else part

    @property
    def splits(self) -> np.ndarray:
        """Name of the split of each row, `(n,)` NumPy text."""
        return np.full(len(self), self.name) if self.origin is None else self.origin

    @property
    def words(self) -> np.ndarray | None:
        """Name of the label of each row, `(n,)` NumPy text, its number if it has none; None without labels."""
        if self.y is None or self.label_names is None:
            return None if self.y is None else self.y.cpu().numpy().astype(np.str_)
        return np.array([*self.label_names, ""])[self.y.cpu()]  # -1: no label

    @property
    def labels(self) -> Tensor | None:
        """Labels `(n,)`: integers or, where some of the rows have none, floats with NaN there; None without labels."""
        if self.y is None or self.label_names is None or not (self.y < 0).any():
            return self.y
        return self.y.double().masked_fill(self.y < 0, torch.nan)

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
        intensity = self.raw[index]
        fresh = torch.bernoulli(intensity.nan_to_num()).where(~intensity.isnan(), torch.nan)
        if self.event is None:
            return fresh
        columns = self.rows.columns if isinstance(self.rows, Streamed) else self.rows[:, prod(self.event) :]
        assert columns is not None  # noqa: S101 - there is an event, so columns stand behind it
        return torch.cat([fresh.flatten(1), columns[index].to(fresh)], 1)

    def to(self, device: str | torch.device) -> Self:
        """Return the split with its tensors on a device; streamed rows are moved to it when they are read."""
        moved = {name: part.to(device) for name in ("rows", "y", "raw") if (part := getattr(self, name)) is not None}
        return replace(self, **moved, side={name: part.to(device) for name, part in self.side.items()})

    def plain(self) -> Self:
        """Return the split without covariates in its rows."""
        if self.event is None:
            return self
        rows = self.rows.with_columns(None) if isinstance(self.rows, Streamed) else self.data
        return replace(self, rows=rows, event=None)

    def conditioned(self, entries: Mapping[str, Entry]) -> Self:
        """Return the split as a conditional model needs it: each row flattened and followed by its entries.

        The arguments are those of `Dataset.conditioned`.

        Raises:
            DataError: the split lacks labels or values of an entry, or one has a value that it cannot have.
        """
        plain = self.plain()
        if not entries:
            return plain
        hidden = torch.full((len(self), 1), torch.nan)
        found = [hidden.expand(-1, e.width) if e.latent else plain.values(name, e) for name, e in entries.items()]
        columns, rows = torch.cat(found, 1), plain.rows
        if isinstance(rows, Streamed):
            return replace(plain, rows=rows.with_columns(columns), event=tuple(rows.shape[1:]))
        return replace(plain, rows=torch.cat([rows.flatten(1), columns.to(rows)], 1), event=tuple(rows.shape[1:]))

    def values(self, name: str, entry: Entry) -> Tensor:
        """Return the numbers of an entry of every row, `(n, width)`, after a check of each."""
        if entry.source == "sum":
            found: Tensor | None = torch.cat([chunk.flatten(1).nansum(1) for chunk in self.chunks()])
        else:
            known = [part for key, part in self.side.items() if key == name or key.startswith(f"{name}[")]
            found = self.y if entry.source == "label" else torch.stack(known, 1).squeeze(1) if known else None
        if found is None:
            raise DataError.of("data.split.absent", split=self.name, name=name, entry=entry)
        if (width := found[:1].numel()) not in (0, 1 if entry.tokens is not None else entry.width):
            raise DataError(f"{self.name}: expected {entry.width} values of {name!r} in each row; got {width}.")
        if entry.latent and (entry.codes or entry.source == "label"):
            found = found.float().masked_fill(found < 0 if entry.codes else found == -1, torch.nan)
        codes = entry.codes if entry.tokens is None else len(entry.tokens)
        wrong = replace(entry, codes=codes).wrong(found)
        if wrong.any() and entry.source == "label":
            raise DataError.of("data.split.codes", name=self.name, y=found[~found.isnan()], codes=codes, entry=entry)
        if wrong.any():
            row, *_ = wrong.nonzero()[0].tolist()
            said = {"split": self.name, "row": row, "name": name, "value": found[row].tolist()}
            raise DataError.of("data.split.entry", **said, codes=codes, size=entry.size)
        if entry.tokens is not None:
            found = torch.tensor(entry.tokens, device=found.device)[found.long()]
        return found.reshape(len(found), -1)

    def chunks(self) -> Iterator[Tensor]:
        """Yield the data without covariates in consecutive chunks `(m, *shape)` of about `CHUNK_ELEMENTS` values."""
        rows: Any = self.rows
        return (self.observed(torch.as_tensor(chunk)) for _, chunk in chunks(rows, range(len(self))))

    def require_support(self, constraint: Any, hint: str, of: str = "the likelihood does", holed: bool = False) -> None:
        """Refuse a split with an element outside a constraint.

        Arguments:
            constraint: support of the likelihood; one on whole events is applied to each element.
            hint: advice that ends the message, such as the transform to use instead.
            of: what expects such values.
            holed: True if any element may be missing, NaN.

        Raises:
            DataError: an element is outside; the message gives its split, row, element and the support.
        """
        constraint = elementwise(constraint)
        row = 0
        # All data are finite, or missing.
        for chunk in () if constraint is torch.distributions.constraints.real else self.chunks():
            inside = constraint.check(chunk) | (chunk.isnan() & holed)
            if not bool(inside.all()):
                first, *element = (int(i) for i in (~inside).nonzero()[0])
                value, (where, wanted) = chunk[(first, *element)].flatten()[:6].tolist(), _named(constraint, element)
                place = {"split": self.name, "row": row + first, "value": value}
                raise DataError.of("data.split.support", **place, where=where, wanted=wanted, of=of, hint=hint)
            row += len(chunk)


def together(splits: Sequence[Split]) -> Split:
    """Return the rows of several splits of a data set as one split, "all", in the order of their numbers."""
    numbers = np.concatenate([split.numbers for split in splits])
    order = np.argsort(numbers, kind="stable")

    def joined(parts: Sequence[Any]) -> Any:
        if any(part is None for part in parts):
            return None
        if isinstance(first := parts[0], Streamed):
            return first.of_part(numbers[order], joined([part.columns for part in parts]))
        return torch.cat(list(parts))[order] if isinstance(first, Tensor) else np.concatenate(parts)[order]

    fields = {"part": "numbers", "origin": "splits", "rows": "rows", "y": "y", "ids": "ids"}
    found = {field: joined([getattr(split, name) for split in splits]) for field, name in fields.items()}
    found["side"] = {name: joined([split.side[name] for split in splits]) for name in splits[0].side}
    return replace(splits[0], name="all", raw=None, **found)


def chosen_labels(y: Tensor, count: int, seed: int) -> Tensor:
    """Return True for `count` of the rows with a label, `(rows,)`, of every class as many as for the others, or all.

    The choice depends on labels, `(rows,)` or several `(rows, d)`, -1 or NaN for none, and seed alone.

    Raises:
        DataError: fewer rows have a label.

    Example:
        >>> y = torch.tensor([0, 1, 1, 1, 0, 0, 2, -1])
        >>> sorted(y[chosen_labels(y, 5, seed=0)].tolist())
        [0, 0, 1, 1, 2]
    """
    columns = y.reshape(len(y), -1).nan_to_num(-1)
    none = (columns < 0).all(1)
    refuse(count > (there := int((~none).sum())), "data.split.labelled", there=there, count=count)
    classes = columns.unique(dim=0, return_inverse=True)[1].masked_fill(none, -1).cpu().numpy()
    rows = len(y)
    order = np.random.RandomState(seed).permutation(rows)
    order = order[np.argsort(classes[order], kind="stable")]  # by class, in random order within each
    starts = np.searchsorted(classes[order], classes[order])
    turn = np.argsort(np.arange(rows) - starts, kind="stable")  # the first of every class, then the second, ...
    turn = order[turn][classes[order][turn] >= 0]
    return torch.from_numpy(np.isin(np.arange(rows), turn[:count]))


def fingerprint_of(splits: Iterable[Split], shape: tuple[int, ...], binarize: str, made_of: str = "") -> str:
    """Return the SHA-256 over all values of all splits, of computed x over `made_of` in their place, in hexadecimal."""
    digest = hashlib.sha256(f"{made_of}{shape} {binarize}".encode())
    for split in splits:
        beside = ((f"side.{name}", values) for name, values in split.side.items())
        rows, raw = (torch.from_numpy(split.numbers), None) if made_of else (split.rows, split.raw)
        for what, x in (("x", rows), ("y", split.y), ("raw", raw), *beside):
            if x is not None:
                digest.update(f" {split.name}.{what} {tuple(x.shape)} {x.dtype} ".encode())
                digest.update(x.blocks.survey.digest if isinstance(x, Streamed) else x.numpy().data.cast("B"))
    return digest.hexdigest()


def elementwise(constraint: Any) -> Any:
    """Return the constraint on a single element, without `independent` wrappers: ``real`` for ``real_vector``."""
    while isinstance(constraint, torch.distributions.constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _named(constraint: Any, element: list[int]) -> tuple[str, str]:
    """Return the name of an element (column of a table, or array indices) and a description of its support."""
    from pvae.models.likelihoods.columns import columns

    if isinstance(constraint, columns):
        return constraint.named(element[0]), constraint.of(element[0])
    # torch's own words, `Interval(lower_bound=0.0, upper_bound=1.0)`, or the constraint's name
    return f"element {tuple(element)}", f"a value in {constraint}".removesuffix("()")
