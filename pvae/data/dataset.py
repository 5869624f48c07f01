"""Data sets: train, validation and test splits as tensors, from a declared source or from objects in Python."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas
import torch
from numpy.typing import ArrayLike

from pvae.component import from_table
from pvae.data import new, streamed
from pvae.data.rows.files import Stored
from pvae.data.rows.prepare import Scaled, extremes, prepare, scaled
from pvae.data.rows.rows import SPLITS, Part, Rows, joined, partition, reshape, shared_rows
from pvae.data.sources.base import Data, named
from pvae.data.sources.python import PassedData, TensorSource, anndata_rows, collected, feature_names, tensors
from pvae.data.sources.tabular import FrameSource
from pvae.data.split import Split, fingerprint_of, together
from pvae.data.tables.side import notes_of
from pvae.errors import DataError, misdeclared, near, refuse
from pvae.graph.frame import Entry
from pvae.util import Record, replace


class Dataset(Record, eq=False):
    """Data set: the train, validation and test splits of one source, scaled and binarised as declared.

    Arguments:
        shape: shape of one datum.
        source: name of the declared source.
        binarize: "none", "threshold", "static" or "dynamic".
        fingerprint: SHA-256 over all values of all splits, in hexadecimal; equal data have equal fingerprints.
        label_names: name of each label, or None.
        notes: remarks that are not errors: files left out, rows shared between splits, constant features.
        table: transforms of a tabular data set, which has columns; None for other data.
        transforms: what was fitted to the training rows, by which new rows are prepared as these were.
        masked: True if values may be missing, NaN.

    Example:
        >>> data = Dataset.of(torch.rand(100, 3))
        >>> [len(split) for split in data.splits], data.shape
        ([80, 10, 10], (3,))
        >>> data.train.x.shape
        torch.Size([80, 3])
    """

    train: Split
    validation: Split
    test: Split
    shape: tuple[int, ...]
    source: str
    binarize: str
    fingerprint: str
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    table: new.FittedTransforms | None = None
    transforms: new.FittedTransforms | None = None
    masked: bool = False

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The three splits, in the order train, validation, test."""
        return self.train, self.validation, self.test

    def split(self, name: str) -> Split:
        """Return the split with the given name: "train", "validation" or "test".

        Raises:
            DeclarationError: no split has that name.
        """
        found = {split.name: split for split in self.splits}
        misdeclared(name not in found, f"Expected a split, {', '.join(found)}; got {name!r}{near(name, found)}.")
        return found[name]

    def whole(self) -> Split:
        """Return the rows of all splits as one split, "all", in the order of the source.

        `Split.numbers` has their numbers in the source, `Split.splits` the split of each. Rows that are in no split,
        because the declared ranges leave them out, are not among them: `Run.rows` reads a whole file. Streamed values
        that are binarised at random are drawn for the whole, not as in their splits.

        Example:
            >>> everything = Dataset.of(torch.arange(60.0).reshape(20, 3)).whole()
            >>> everything.x[:, 0].tolist() == list(range(0, 60, 3)), everything.numbers[:3]
            (True, array([0, 1, 2]))
        """
        return together(self.splits)

    def to(self, device: str | torch.device) -> Self:
        """Return the data set with all its tensors on a device."""
        return self._each(lambda split: split.to(device))

    def _each(self, change: Callable[[Split], Split]) -> Self:
        return replace(self, **{split.name: change(split) for split in self.splits})  # type: ignore[arg-type]

    def conditioned(self, entries: Mapping[str, Entry]) -> Self:
        """Return the data set as a conditional model needs it: each row flattened and followed by its entries.

        Without entries, return the data set with plain rows.

        Arguments:
            entries: the entries of a row by name, in order: covariates, and observed values of latents. Their numbers
                are the labels of the data, the `side` values of the same name, or sums of x.

        Raises:
            DataError: labels or side values are absent, or a value is none that its entry can have.

        Example:
            >>> from pvae.graph.frame import Entry
            >>> data = Dataset.of((torch.rand(20, 3), torch.arange(20) % 2))
            >>> data.conditioned({"y": Entry(codes=2), "size": Entry(source="sum")}).train.x.shape
            torch.Size([16, 5])
        """
        return self._each(lambda split: split.conditioned(entries))

    @classmethod
    def from_tensors(
        cls, x: torch.Tensor | ArrayLike, y: torch.Tensor | ArrayLike | None = None, *, validation: Any = None,
        test: Any = None, declared: TensorSource | None = None, label_names: Sequence[str] | None = None,
    ) -> "Dataset":  # fmt: skip
        """Make a data set of tensors or arrays, whose values are copied as float32.

        Arguments:
            x: training data (n, *shape), any real type.
            y: integer labels (n,), or None.
            validation: x (m, *shape) of the validation split, or a tuple (x, y); None takes a random tenth of the rows.
            test: test split, in the same form as ``validation``.
            declared: declaration of scale, binarisation, shape, splits, and the seed of the random splits.
            label_names: name of each label, or None.

        Raises:
            DataError: the data are empty, not finite, differ in shape between splits, or do not fit the declaration.

        Example:
            >>> Dataset.from_tensors(torch.rand(50, 3)).validation.x.shape
            torch.Size([5, 3])
        """
        return _passed(tensors, (x, y), validation, test, declared, label_names)

    @classmethod
    def from_torch(cls, dataset: torch.utils.data.Dataset[Any], *, stream: bool = False, **more: Any) -> "Dataset":
        """Make a data set of a torch `Dataset`, map-style or iterable, whose items are read once.

        Arguments:
            dataset: dataset of items x, (x, y), or mappings with "x" and perhaps "y"; y is an integer label.
            stream: keep the rows in a temporary file of the cache folder, for data larger than memory.
            more: other options of `from_tensors`; `validation` and `test` are datasets, or None.

        Raises:
            DataError: items differ in shape or type, or are too large for memory; see `from_tensors`.
            StorageError: the cache folder is full.
        """
        return _passed(partial(collected, stream=stream), dataset, **more)

    @classmethod
    def from_anndata(
        cls, adata: Any, *, layer: str | None = None, labels: str | None = None, declared: TensorSource | None = None
    ) -> "Dataset":
        """Make a data set of an AnnData object, or of any object with the same fields `X`, `obs` and `layers`.

        A sparse matrix stays sparse and a backed one stays on the disk; their rows are made dense batch by batch.

        Arguments:
            adata: AnnData-like object.
            layer: name of the layer to use instead of `X`.
            labels: a column of `obs`: categories or names, which become `label_names`, or integers.
            declared: declaration of scale, binarisation, shape, splits, and the seed of the random splits.

        Raises:
            DataError: the layer or column does not exist, or a row has no label; see `from_tensors`.
        """
        declared = (declared or TensorSource()).model_copy(update={"layer": layer, "labels": labels})
        return _assembled(declared, anndata_rows(adata, declared))

    @classmethod
    def from_frame(
        cls, frame: pandas.DataFrame, columns: Mapping[str, Any] | None = None, *, declared: FrameSource | None = None,
        **more: Any,
    ) -> "Dataset":  # fmt: skip
        """Make a data set of a pandas DataFrame.

        Arguments:
            frame: data frame with one row for each datum.
            columns: type of every column, by its name: `"continuous"` and so on, or a table as under `[data.columns]`.
            declared: complete declaration, which replaces `columns` and `more`.
            more: other fields of `FrameSource`: `label`, `na`, `split_seed`, `splits`.

        Raises:
            DataError: a column is absent, or contains a value that its type does not allow; the message gives the row.
            DeclarationError: the declared columns or other fields are invalid.

        Example:
            >>> import pandas
            >>> frame = pandas.DataFrame({"size": [1.0, 2.5, 4.0, 3.0], "seen": [True, False, True, True]})
            >>> Dataset.from_frame(frame, {"size": "continuous", "seen": "binary"}).shape
            (2,)
        """
        source = declared or from_table(FrameSource, {"columns": dict(columns or {}), **more}, "from_frame")
        return _assembled(source, source.rows_of(frame))

    @classmethod
    def of(
        cls, data: Any, declared: PassedData | None = None, covariates: Mapping[str, Any] | None = None
    ) -> "Dataset":
        """Make a data set of any supported object.

        Supported are a `Dataset`, which is returned unchanged; a torch `Dataset`; AnnData; a tensor, an array or a
        sparse matrix; a dictionary of `x`, labels `y` and the values that are declared beside x (`side`); if a table is
        declared, a DataFrame; and the path of a file of any of them.

        Arguments:
            data: the object.
            declared: declaration of scale, columns, splits and so on.
            covariates: values beside x by name, `(n,)` or `(n, d)`, with tensors, arrays and torch datasets.

        Raises:
            DataError: see `from_torch`, `from_anndata`, `from_frame` and `from_tensors`.
        """
        if isinstance(data, Dataset):
            return data
        data, declared = {"x": data, **covariates} if covariates else data, declared or TensorSource()
        return _assembled(declared, new.rows_of(data, new.source_of(data, declared)))

    def require_support(self, constraint: torch.distributions.constraints.Constraint, hint: str) -> None:
        """Refuse data with values outside the support of a likelihood.

        Arguments:
            constraint: support of the likelihood; one on whole events is applied to each element.
            hint: advice that ends the message, such as the transform to use instead.

        Raises:
            DataError: a value is outside; the message gives its split, row, element and the expected values.
        """
        for split in self.splits:
            split.require_support(constraint, hint, holed=self.masked and self.table is None)


def load(data: Data, *, data_dir: Path | None = None, seed: int = 0) -> Dataset:
    """Return the data set of a declared source: read it, split it, scale it and binarise it.

    Arguments:
        data: declaration of the source.
        data_dir: folder in which files are looked for first.
        seed: seed of sources that simulate their data; stored data are the same for every seed.

    Raises:
        DataError: data are missing, damaged, not finite, or do not fit the declaration.

    Example:
        >>> from pvae.data import Digits
        >>> load(Digits(binarize="dynamic")).train.x.shape
        torch.Size([1000, 1, 8, 8])
    """
    with named(data, data_dir):
        return _assembled(data, data.read(data_dir, seed))


def _assembled(data: Data, rows: Rows) -> Dataset:
    parts = partition(data.splits.declared, rows)
    x = reshape(rows.x, data.shape, rows.name)
    ready = scaled(data.scale, rows, x, parts["train"])
    side = None
    if rows.side is not None:
        side = new.FittedTransforms.of_side(rows.side, parts["train"])
    elif data.side:
        raise DataError.of("data.side.none", source=getattr(data, data.tag), names=data.side)
    transforms = new.FittedTransforms.of(ready, rows, data.binarize, side)
    prepared, raw = (streamed.streams if isinstance(x, Stored) else prepare)(ready, parts, data.binarize)
    splits = {name: _split(name, prepared[name], rows, parts[name], transforms) for name in SPLITS}
    splits["train"] = replace(splits["train"], raw=raw)
    shared = {name: shared_rows(x, parts, name) for name in SPLITS[1:]}
    repeated = [f"{n} of {len(parts[name])} rows of {name} also occur in train" for name, n in shared.items() if n]
    found = [*_constant_features(splits["train"], notes_of(rows)), *_dim(rows, data, ready, parts), *repeated]
    if rows.ids is not None and (many := len(rows.ids) - len(np.unique(rows.ids))):
        found.append(f"{many} of {len(rows.ids)} ids repeat that of another row")
    shape, source = tuple(x.shape[1:]), str(getattr(data, data.tag))
    return Dataset(
        **splits, shape=shape, source=source, binarize=data.binarize, label_names=rows.label_names,
        fingerprint=fingerprint_of(splits.values(), shape, data.binarize, rows.made_of and rows.made_of + data.scale),
        table=transforms if rows.table else None, transforms=transforms, notes=(*notes_of(rows), *found),
        masked=data.masked or any(column.missing == "mask" for column in rows.table.values()),
    )  # fmt: skip


def _split(name: str, x: Any, rows: Rows, part: Part, fitted: new.FittedTransforms) -> Split:
    numbers = np.asarray(part)
    y = None if rows.y is None else torch.from_numpy(rows.y[numbers].astype(np.int64))
    ids = None if rows.ids is None else rows.ids[numbers]
    return Split(name, x, y, part=part, ids=ids, label_names=rows.label_names, side=fitted.beside(rows.side, part))


def _constant_features(train: Split, notes: tuple[str, ...]) -> list[str]:
    """Return a remark on features that are constant in train; raise DataError if all are."""
    x = train.rows if train.raw is None else train.raw
    low, high = x.blocks.survey[:2] if isinstance(x, streamed.Streamed) else extremes(x.numpy(), range(len(x)))
    constant, features = int((low == high).sum()), prod(x.shape[1:])
    refuse(constant == features, "data.dataset.constant", features=features, rows=len(x), notes=notes)
    return [f"{constant} of {features} features are constant in train"] if constant else []


def _dim(rows: Rows, data: Data, ready: Scaled, parts: Mapping[str, Part]) -> list[str]:
    """Return a remark on unsigned bytes that are all 0 or 1 (masks), which the scale "unit" makes 0 and 1/255."""
    known = data.scale == "unit" and rows.x.dtype == np.uint8 and rows.largest == 255
    if not known or any(chunk.max() > 1 / 255 for part in parts.values() for _, chunk in ready.chunks(part)):
        return []
    return ['all values are 0 or 1, and scale = "unit" divides by 255: use scale = "raw"']


def _passed(
    read: Any, train: Any, validation: Any = None, test: Any = None, declared: Any = None, label_names: Any = None
) -> Dataset:
    """Return the data set of the splits passed for train, validation and test, without those that are None.

    `read` returns x and labels (or None) of a split, given it and its name.

    Raises:
        DataError: a split is passed although the declaration has row ranges.
    """
    declared, splits = declared or TensorSource(), zip(SPLITS, (train, validation, test), strict=True)
    given = {name: part for name, part in splits if part is not None}
    refuse(declared.splits.declared and len(given) > 1, "data.dataset.both")
    arrays = {name: read(part, name) for name, part in given.items()}
    more: dict[str, Any] = {"label_names": label_names, "features": feature_names(given.get("train"))}
    return _assembled(declared, joined(arrays, declared.split_seed, masked=declared.masked, **more))
