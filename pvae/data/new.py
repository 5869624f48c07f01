"""New rows for a fitted model: the transforms that a fit keeps, and other data read and prepared by them."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pandas
import torch
from pydantic import Field

from pvae.component import Section
from pvae.data.rows.columns import Column, ContinuousColumn
from pvae.data.rows.files import AnyArray, Index, Stored, candidate
from pvae.data.rows.prepare import UNWARPS, Binarize, Floats, Scaled, prepare, scaled, warps_of, worded
from pvae.data.rows.rows import NEW, Part, Rows, reshape
from pvae.data.sources.arrays import Idx, NamedArrays, Npy
from pvae.data.sources.base import Data, FileData, named, signature
from pvae.data.sources.hdf import H5ad
from pvae.data.sources.python import PassedData, TensorSource, anndata_rows, is_anndata
from pvae.data.sources.stacked import StackedCodes
from pvae.data.sources.tabular import FrameSource, Tabular
from pvae.data.split import Split
from pvae.data.streamed import streams
from pvae.data.tables.side import notes_of, side_rows, tokenised, vocabularies
from pvae.errors import DataError, near, refuse

Positive = Annotated[float, Field(gt=0)]


class FittedTransforms(Section):
    """Everything of the data of a fit that is needed to prepare other rows in the same way: (f(x) - shift) / divisor.

    A run keeps it as JSON.
    """

    shape: tuple[int, ...]
    """Shape of a datum."""
    dtype: str
    """Type of the stored values, by NumPy's name."""
    shift: float | tuple[float, ...] = 0.0
    """Shift of all features, or of each in the order of the flattened datum."""
    divisor: Positive | tuple[Positive, ...] = 1.0
    """Divisor of all features, or of each."""
    binarize: Binarize = "none"
    """Binarisation of the values; what is drawn at random is drawn once for new rows."""
    columns: dict[str, Column] = {}
    """Columns of a table with their functions f, by name in the order of x; empty for other data."""
    label_names: tuple[str, ...] | None = None
    """Name of each label, or None."""
    features: tuple[str, ...] | None = None
    """Names of the features, in the order of x, where the source names them."""
    read: dict[str, str | None] = {}
    """Matrix and column of labels that were read of an AnnData object or file."""
    side: Self | None = None
    """Those of the values beside x, a table of its own; None if there are none."""
    words: dict[str, tuple[str, ...]] = {}
    """Word of each token of the texts among values beside x, by name."""

    @classmethod
    def of(cls, ready: Scaled, rows: Rows, binarize: Binarize, side: Self | None = None) -> Self:
        """Return the transforms of scaled rows of a source, and of the values beside them."""
        numbers = {"shift": ready.shift, "divisor": ready.divisor}
        scaling: Any = {k: float(n) if np.ndim(n) == 0 else tuple(np.ravel(n).tolist()) for k, n in numbers.items()}
        known: Any = {name: getattr(rows, name) for name in ("label_names", "features", "read")}
        shape, dtype = tuple(ready.x.shape[1:]), ready.x.dtype.name
        known |= {"columns": dict(rows.table), "side": side}
        return cls(shape=shape, dtype=dtype, binarize=binarize, **scaling, **known)

    @classmethod
    def of_side(cls, rows: Rows, train: Part) -> Self:
        """Return the transforms of values beside x, fitted to the training rows."""
        fitted = cls.of(scaled("raw", rows, rows.x, train), rows, "none")
        return fitted.model_copy(update={"words": vocabularies(rows, train)})

    def unit(self, name: str | None) -> torch.Tensor:
        """Return the divisors of the values beside x of a name, `(d,)`; 1 where there are none, as of labels."""
        if self.side is None or not (places := self._places(name)):
            return torch.ones(1)
        return torch.tensor(np.broadcast_to(self.side.divisor, len(self.side.columns))[places])

    def _places(self, name: str | None) -> list[int]:
        """Return the numbers of the columns beside x that hold a value of a name."""
        return [i for i, key in enumerate(self.side.columns if self.side else ()) if key.split("[")[0] == name]

    def given(self, name: str, value: Any) -> torch.Tensor:
        """Return values of a covariate in the units of the data, words or numbers, as the rows of a model have them.

        Arguments:
            name: name of the covariate.
            value: a value, `()` or `(d,)`, or several, `(n,)` or `(n, d)`.

        Raises:
            DataError: a level is unknown, or a number is none that its column allows.
        """
        places = self._places(name)
        if self.side is None or not places:
            known = self.label_names or ()
            refuse(value not in known, "data.new.label", name="given", row=0, known=known, word=value, hint="")
            return torch.tensor(known.index(value))
        column, cells = list(self.side.columns.values())[places[0]], np.asarray(value)
        is_text = name in self.side.words
        cells = cells[:, 0] if cells.ndim == 2 and cells.shape[1] == len(places) == 1 else cells
        many = cells if cells.ndim == 1 + (len(places) > 1 and not is_text) else cells[None]
        rows = side_rows({column.of or name: many}, {name: column}, len(many), "given")
        if rows is None or rows.x.shape[1] != len(places):
            raise DataError(f"given: expected {len(places)} numbers of {name}; got shape {list(cells.shape)}.")
        refuse(rows.notes, f"given: expected texts of at most {len(places)} words; got {str(value)[:60]!r}.")
        full = np.full((len(many), len(self.side.columns)), np.nan)
        full[:, places] = rows.x[:]
        found = torch.from_numpy(self.side.coded(full).of(range(len(full)))[:, places]).float()
        if is_text or not isinstance(column, ContinuousColumn):
            found = found.long() if is_text else found[:, 0].long()
        return found if many is cells else found[0]

    def beside(self, rows: Rows | None, part: Part) -> dict[str, torch.Tensor]:
        """Return values beside x as the model reads them, by name, `(m,)` float32, of the rows numbered in `part`.

        Values of latents that new rows lack are missing.

        Raises:
            DataError: values of a covariate are absent.
        """
        if self.side is None:
            return {}
        widths = Counter(key.split("[")[0] for key in (() if rows is None else rows.table))
        needed = dict.fromkeys(key.split("[")[0] for key, c in self.side.columns.items() if c.missing == "error")
        refuse(names := [name for name in needed if name not in widths], "data.side.none", source="data", names=names)
        for name, w in widths.items():
            refuse(w != (n := len(self._places(name))), f"data: expected {n} values of {name!r} a row; got {w}.")
        full = np.full((len(part) if rows is None else len(rows.x), len(self.side.columns)), np.nan)
        if rows is not None:
            full[:, [place for name in widths for place in self._places(name)]] = rows.x[:]
        return dict(zip(self.side.columns, self.side.coded(full).apply(part).T.contiguous(), strict=True))

    def coded(self, x: Floats) -> Scaled:
        """Return values beside x `(n, columns)` with the scaling of the fit, the words of texts as tokens."""
        return self.on(tokenised(x, self.columns, self.words))

    @classmethod
    def parse(cls, text: bytes, origin: str) -> Self:
        """Return the transforms that a run keeps; raises DataError if the text is not of their kind."""
        try:
            found = cls.model_validate_json(text)
            found.on(np.empty((0, *found.shape)))
        except ValueError as error:  # of pydantic, or of another number of features
            raise DataError(f"{origin}: expected the transforms of a fit; got {error}.") from None
        return found

    def on(self, x: AnyArray) -> Scaled:
        """Return stored rows `(n, *shape)` with the scaling of the fit."""
        given = self.shift, self.divisor
        shift, divisor = (n if isinstance(n, float) else np.array(n).reshape(self.shape) for n in given)
        return Scaled(x, shift, divisor, warps_of(self.columns))

    def to_frame(self, x: Any) -> pandas.DataFrame:
        """Return rows of x `(n, D)` as a data frame in the table's units, with codes rounded to the nearest level."""
        columns = zip(self.values(x).T, self.columns.items(), strict=True)
        return pandas.DataFrame({name: worded(found, column) for found, (name, column) in columns})

    def values(self, x: Any) -> Floats:
        """Return rows of x `(..., *shape)` in the units of the source, `(..., *shape)`, a level as its number."""
        ready = self.on(np.asarray(x, np.float64))
        values = np.asarray(ready.x) * ready.divisor + ready.shift
        for name, places in ready.warps.items():
            with np.errstate(over="ignore"):
                values[..., places] = UNWARPS[name](values[..., places])
        return values

    def split(self, rows: Rows, *, closed: bool = False) -> Split:
        """Return rows of a source as the split "new", prepared as the data of the fit were.

        Labels that the fit knows by name have its codes. Binarised values that are drawn at random are the same at each
        call. Streamed rows stay on the disk.

        Arguments:
            rows: rows of a source.
            closed: refuse labels that the fit does not know, because the model is conditioned on them.

        Raises:
            DataError: rows have another shape or other features than the data of the fit, or an unknown label.
        """
        ready = self.on(reshape(self._arranged(rows), self.shape, rows.name))
        part: dict[str, Part] = {NEW: range(len(ready.x))}
        prepared: Any = (streams if isinstance(ready.x, Stored) else prepare)(ready, part, self.binarize)[0]
        y, label_names = self._labels(rows, closed)
        side = self.beside(rows.side, range(len(rows.x)))
        return Split(NEW, prepared[NEW], y, ids=rows.ids, label_names=label_names, notes=notes_of(rows), side=side)

    def _arranged(self, rows: Rows) -> AnyArray:
        """Return the stored values with the features in the order of the fit; raises DataError if they do not fit."""
        x, row = rows.x, tuple(rows.x.shape[1:])
        if self.features and rows.features and rows.features != self.features:
            if lost := [name for name in self.features if name not in rows.features]:
                raise DataError.of("data.new.feature", name=rows.name, lost=lost, hint=near(lost[0], rows.features))
            places = {name: i for i, name in enumerate(rows.features)}
            order = np.array([places[name] for name in self.features])
            x = x[:, order] if isinstance(x, np.ndarray) else Chosen(x, order)
        elif (found := prod(row)) != (wanted := prod(self.shape)):
            raise DataError.of("data.new.shape", name=rows.name, shape=self.shape, wanted=wanted, row=row, found=found)
        if np.dtype(self.dtype).kind in "biu" and x.dtype.kind == "f" and self.divisor != 1.0:
            stored: Any = x
            of = f"the data of the fit have ({self.dtype}, divided by {self.divisor})"
            Split(rows.name, stored).require_support(torch.distributions.constraints.nonnegative_integer, "", of)
        return x

    def _labels(self, rows: Rows, closed: bool) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
        """Return labels as codes of the fit, and their names, those that the fit does not know behind its own."""
        if rows.y is None:
            return None, self.label_names
        codes, known, words = rows.y.astype(np.int64), self.label_names or (), rows.label_names
        if words is None:  # codes of the fit
            return torch.from_numpy(codes), self.label_names if -1 <= codes.min() <= codes.max() < len(known) else None
        if closed and (odd := [i for i in np.unique(codes).tolist() if words[i] not in known]):
            word, said = words[odd[0]], {"name": rows.name, "row": (codes == odd[0]).argmax()}
            raise DataError.of("data.new.label", **said, known=known, word=word, hint=near(word, known))
        names = tuple(dict.fromkeys([*known, *words]))
        return torch.tensor([*(names.index(word) for word in words), -1])[codes], names  # -1: no label


class Chosen(Stored):
    """Some features of rows `(n, features)`, in another order.

    Arguments:
        x: rows of a source.
        order: number of each chosen feature.
    """

    def __init__(self, x: AnyArray, order: np.ndarray) -> None:
        self.x, self.order, self.shape, self.dtype = x, order, (len(x), len(order)), x.dtype
        self.scattered = isinstance(x, Stored) and x.scattered  # type: ignore[misc]

    def read(self, index: Index) -> np.ndarray:
        return self.x[index][:, self.order]


# Reading

ENDINGS: Mapping[str, str] = {
    ".npy": "npy", ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".mat": "mat", ".h5ad": "h5ad",
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
"""Source of a file, by the ending of its name (before that of a compression)."""
OPTIONAL = ("label", "labels", "y", "id")
"""Fields of a declaration that name what new rows may lack: labels and ids."""
STREAMED_BYTES = 2**28
"""Size of a file above which its rows stay on the disk, whatever the declaration says."""


def rows_of_new(
    data: Any, declared: Data | None, fitted: FittedTransforms, data_dir: Path | None = None, *, labelled: bool = False
) -> Rows:
    """Return the rows of other data than those of a fit, as its source would read them.

    Arguments:
        data: see `source_of`.
        declared: declaration of the fit's source; None if there was none.
        fitted: transforms of the fit.
        data_dir: folder in which a relative path is looked for first.
        labelled: refuse data without labels; otherwise labels (and ids) that cannot be read are noted, and left out.

    Raises:
        DataError: the data cannot be read, lack a column, or have values that the columns do not allow.
    """
    if isinstance(declared, StackedCodes):
        first = declared.first(data_dir)
        known = first.experiment.data.with_side(declared.side)
        rows = rows_of_new(data, known, first.transforms, data_dir, labelled=labelled)
        return declared.over(rows, declared.codes(first, first.rows(data, data_dir=data_dir)))
    if fitted.columns and not isinstance(declared, Tabular):
        declared = FrameSource(columns=fitted.columns)
    source: Any = source_of(data, declared, data_dir, fitted.read)
    names = [name for name in OPTIONAL if getattr(source, name, None) is not None and (name == "id" or not labelled)]
    problems: list[DataError] = []
    for left in (left for size in range(len(names) + 1) for left in combinations(names, size)):
        try:
            rows = rows_of(data, source.model_copy(update=dict.fromkeys(left)), data_dir, NEW)
            notes = [f"{getattr(source, name)!r} is not read: {problems[0]}" for name in left]
            return replace(rows, notes=(*rows.notes, *notes))
        except DataError as error:
            problems.append(error)
    raise problems[-1]


def source_of(
    data: Any, declared: Data | None, data_dir: Path | None = None, read: Mapping[str, str | None] = {}
) -> Data:
    """Return the declaration by which data are read, with the fields of another one that it has too.

    Arguments:
        data: path of a file (or of a folder of images), DataFrame, array, tensor, sparse matrix, AnnData, torch
            dataset, or a tuple (x, y) of arrays or of paths. The ending of a path and the first bytes of its file say
            what reads it.
        declared: declaration of another source, of which separator, encoding, columns, names of arrays and so on are
            taken; None if there is none.
        data_dir: folder in which a relative path is looked for first.
        read: layer and column of labels to read of an AnnData object or file.

    Raises:
        DataError: no source reads the file.
    """
    parts = data if isinstance(data, tuple) else (data,)
    path, *beside = map(str, parts) if all(isinstance(part, str | Path) for part in parts) else [""]
    where = candidate(path, data_dir, Path.exists) if path else Path()
    member: type[Data] = H5ad if is_anndata(data) else TensorSource
    if path:
        member = Data.members.get(_kind_of(where, declared), Data)
        known = ", ".join(sorted(set(ENDINGS.values())))
        refuse(not issubclass(member, FileData), f"{path}: expected a file of rows ({known}); got another.")
        refuse(issubclass(member, Tabular) and not isinstance(declared, Tabular), "data.new.arrays", path=path)
    elif isinstance(declared, Tabular):
        member = FrameSource
    own = {"source"} if issubclass(member, NamedArrays) and isinstance(declared, NamedArrays) else {"source", "mask"}
    shared = (declared.model_fields_set & member.model_fields.keys()) - own if declared else set()
    given = {name: getattr(declared, name) for name in shared}
    given |= {"path": path} if "path" in member.model_fields else {}
    given |= {"stream": True} if where.is_file() and where.stat().st_size > STREAMED_BYTES else {}
    # labels are a column, or a file beside that of the rows
    if "labels" in member.model_fields and (path or isinstance(declared, Npy | Idx)) or member is H5ad:
        given |= read if member is H5ad else {"labels": next(iter(beside), None)}
    return member(**given)


def rows_of(data: Any, source: Data, data_dir: Path | None = None, name: str = "train") -> Rows:
    """Return the rows of data in a file or in Python, read by the declaration that `source_of` returns for them."""
    if isinstance(source, FileData) and source.path:
        with named(source, data_dir):
            return source.read(data_dir, 0)
    if isinstance(source, H5ad):
        return anndata_rows(data, source)
    assert isinstance(source, PassedData)  # noqa: S101 - no other reads objects
    return source.rows_of(data, name)


def _kind_of(path: Path, declared: Data | None) -> str:
    """Return the source that reads a file, by the ending of its name and its first bytes; empty if none does."""
    own = str(getattr(declared, declared.tag)) if isinstance(declared, FileData) else ""
    ending = next((part.lower() for part in reversed(path.suffixes) if part.lower() not in (".gz", ".bz2", ".xz")), "")
    names = ["images"] if path.is_dir() else re.findall(r"\w+", signature(path).rpartition("(")[2])
    names = [ENDINGS[ending]] if ending in ENDINGS else names
    same = isinstance(declared, FileData) and Path(declared.path).suffix == path.suffix != ""
    return own if own and (same or own in names or not names) else next(iter(names), "")
