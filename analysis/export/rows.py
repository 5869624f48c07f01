"""Rows that leave pvae: named tensors beside the number, id, split and label of every row; data frames and files."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import pandas
import torch

from pvae.analysis.export.sites import numpy_of
from pvae.data.new import FittedTransforms
from pvae.data.split import Split
from pvae.errors import misdeclared, require_extra
from pvae.util import Record, field, follows
from pvae.util.files import replaced

Part = Mapping[str, torch.Tensor]
"""Results of consecutive rows: tensors `(m, ...)` by key."""


class Origin(Record, eq=False):
    """Origin of rows: the columns that stand before their results in a data frame or file.

    Arguments:
        columns: those known of `id`, `row` (number in the source), `split` and `label` (its word), `(n,)` each.
        table: transforms of the data of the fit, which give rows of a table its units and words; or None.
    """

    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    table: FittedTransforms | None = None

    @classmethod
    def of(cls, split: Split, chosen: torch.Tensor, table: FittedTransforms | None = None) -> Self:
        """Return the origin of the rows of a split at the positions `chosen` `(m,)`."""
        found = {"id": split.ids, "row": split.numbers, "split": split.splits, "label": split.words}
        return cls({key: v[chosen.numpy()] for key, v in found.items() if v is not None}, table)

    def frames(self, parts: Iterable[Part]) -> Iterator[pandas.DataFrame]:
        """Yield results of consecutive rows as data frames with a column for every number of a row.

        The columns of a latent `z` are `z0`, `z1`, ...; of a further tensor of it, such as `scale/z`, `scale_z0`, ...
        A table's columns have their own names, units and words.

        Raises:
            DeclarationError: the tensors of a part have different numbers of rows, or there are none.
        """
        start = 0
        for part in parts:
            misdeclared(len({t.shape[:1] for t in part.values()}) != 1, "analysis.rows.lengths", part=part)
            stop, shown = start + len(next(iter(part.values()))), self.shown(part)
            own = {key: values[start:stop] for key, values in self.columns.items()}
            rest = (
                of.to_frame(t) if of else pandas.DataFrame(numpy_of(t).reshape(len(t), -1)) for t, of in shown.values()
            )
            found = pandas.concat([pandas.DataFrame(own), *rest], axis=1)
            tails = {key: tuple(t.shape[1:]) for key, (t, _) in shown.items()}
            tries = ([*(key + "_" * i for key in own), *self._names(tails, "_" * i)] for i in count())
            found.columns = pandas.Index(next(names for names in tries if len({*names}) == len(names)))
            yield found
            start = stop

    def shown(self, part: Part) -> dict[str, tuple[torch.Tensor, FittedTransforms | None]]:
        """Return the tensors of a part, each with the table that it has rows of, if it has.

        Of a table draws are shown one by one, and no moments (`mean`, `std`) of transformed values.
        """
        if not self.names:
            return {key: (t, None) for key, t in part.items()}
        draws = {f"draw {k}": (t, self.table) for k, t in enumerate(part["draws"].unbind(1) if "draws" in part else ())}
        kept = {key: t for key, t in part.items() if key not in ("draws", "mean", "std")}
        return {key: (t, self.table if key in ("x", "lower", "upper") else None) for key, t in kept.items()} | draws

    @property
    def names(self) -> list[str]:
        """Names of the columns of the table; none for other data."""
        return [*self.table.columns] if self.table else []

    def _names(self, tails: Mapping[str, tuple[int, ...]], gap: str) -> Iterator[str]:
        """Yield a name for every number of a row, in order, given the shape of a row of each tensor."""
        for key, tail in tails.items():
            stem = _stem(key)
            joint = gap or ("_" if stem[-1:].isdigit() else "")
            if self.names and tail == (len(self.names),) and "/" not in key:  # a number for each column
                yield from (column if key == "x" else f"{key} {column}" for column in self.names)
            else:
                yield from (stem + joint + "_".join(map(str, at)) if at else stem for at in np.ndindex(*tail))


def _stem(key: str) -> str:
    return key.removeprefix("latents/").replace("/", "_")


# ---------------------------------------------------------------------- files


def write(path: Path, parts: Iterable[Part], origin: Origin, like: Path | None = None) -> None:
    """Write rows part by part to a file in the format of its ending, which replaces what stood there at the end.

    CSV and Parquet are written as `Origin.frames` shows them, npz as the arrays that `parts` consist of. In h5ad the
    latents are `.obsm["X_pvae"]`, rows of data layers `pvae_<key>`, single numbers columns `pvae_<key>` of `.obs`. Of a
    table, the moments of transformed values (`mean`, `std`) are in npz alone, where all values are transformed ones.

    Arguments:
        path: the file; .csv, .parquet, .npz or .h5ad.
        parts: results of consecutive rows; processes that torchrun started beside the first only go through them.
        origin: where all the rows come from.
        like: .h5ad file that the rows were read from; its `X`, `.obs` and all else is kept.

    Raises:
        DeclarationError: no format has that ending; MissingExtraError: its package is not installed.
        OutputError: no file can be created there; StorageError: the disk is full. What stood there is unchanged.
    """
    misdeclared(path.suffix not in WRITERS, "analysis.rows.ending", path=path, endings=WRITERS)
    if path.suffix == ".parquet":
        require_extra("pyarrow", "parquet", f"{path}: expected the package pyarrow")
    if follows():
        for _ in parts:
            pass
        return
    with replaced(path) as temporary:
        WRITERS[path.suffix](temporary, parts, origin, like)


def _csv(path: Path, parts: Iterable[Part], origin: Origin, _like: Path | None) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        for number, frame in enumerate(origin.frames(parts)):
            frame.to_csv(file, header=number == 0, index=False)


def _parquet(path: Path, parts: Iterable[Part], origin: Origin, _like: Path | None) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    with ExitStack() as stack:
        writer: Any = None
        for frame in origin.frames(parts):
            if len(counts := frame.columns[frame.dtypes == "Int64"]):  # of which a later part may have means
                frame = frame.astype(dict.fromkeys(counts, "Float64"))
            table = pyarrow.Table.from_pandas(frame, preserve_index=False)
            writer = writer or stack.enter_context(ParquetWriter(path, table.schema))
            writer.write_table(table.cast(writer.schema))


def _npz(path: Path, parts: Iterable[Part], origin: Origin, _like: Path | None) -> None:
    with _spooled(path, parts) as arrays, path.open("wb") as file:
        named: dict[str, Any] = {**origin.columns, **arrays}
        np.savez(file, **named)


def _h5ad(path: Path, parts: Iterable[Part], origin: Origin, like: Path | None) -> None:
    import h5py

    if like is not None:
        shutil.copyfile(like, path)
    shown = ({k: torch.from_numpy(of.values(t)) if of else t for k, (t, of) in origin.shown(p).items()} for p in parts)
    with _spooled(path, shown) as arrays, h5py.File(path, "a") as file:
        count = len(next(iter(arrays.values())))
        rows = origin.columns.get("row", np.arange(count))
        if like is None:
            width = prod(arrays["x"].shape[1:]) if "x" in arrays else 0
            names = np.array(origin.names or [*map(str, range(width))], np.str_)
            obs = {"_index": origin.columns.get("id", rows).astype(np.str_), **origin.columns}
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            for room, columns in (("obs", obs), ("var", {"_index": names})):
                about = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
                file.create_group(room).attrs.update({**about, "column-order": [*columns][1:]})
                for name, values in columns.items():
                    _put(file[room], name, values)
        whole, width = (len(file[room][file[room].attrs["_index"]]) for room in ("obs", "var"))
        several = sum(key.startswith("latents/") for key in arrays) > 1
        for key, array in arrays.items():
            room, name = _place(key, array, width, several)
            values = array if room == "obs" else array.reshape(count, -1)
            if whole != count:  # of the other rows it is not known
                some, values = values, np.full((whole, *values.shape[1:]), np.nan)
                values[rows] = some
            if room not in file:
                file.create_group(room).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            if room == "obs":
                file[room].attrs["column-order"] = [*dict.fromkeys([*file[room].attrs["column-order"], name])]
            _put(file[room], name, values)


def _put(group: Any, name: str, values: np.ndarray) -> None:
    """Write an array into a group of an h5ad file, in place of what had its name."""
    import h5py

    is_text = values.dtype.kind == "U"
    if name in group:
        del group[name]
    made = group.create_dataset(name, data=values.astype(h5py.string_dtype()) if is_text else values)
    made.attrs.update({"encoding-type": "string-array" if is_text else "array", "encoding-version": "0.2.0"})


def _place(key: str, values: np.ndarray, width: int, several: bool) -> tuple[str, str]:
    """Return the group and the name of an array in an h5ad file of `width` variables."""
    if key.startswith("latents/"):
        return "obsm", f"X_pvae_{_stem(key)}" if several else "X_pvae"
    wide = "layers" if prod(values.shape[1:]) == width and "/" not in key else "obsm"
    return "obs" if values.ndim == 1 else wide, f"pvae_{_stem(key)}"


@contextmanager
def _spooled(path: Path, parts: Iterable[Part]) -> Iterator[dict[str, np.ndarray]]:
    """Context with the arrays `(n, ...)` of all parts by key, which lie on the disk beside a file, not in memory."""
    with TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as folder, ExitStack() as stack:
        files: dict[str, tuple[Any, np.ndarray]] = {}
        for part in parts:
            for key, t in part.items():
                values = np.ascontiguousarray(numpy_of(t))
                if key not in files:
                    files[key] = stack.enter_context(Path(folder, str(len(files))).open("w+b")), values[:0]
                values.tofile(files[key][0])
        found = {}
        for key, (file, like) in files.items():
            file.flush()
            found[key] = np.asarray(np.memmap(file, like.dtype, "r")).reshape(-1, *like.shape[1:])
        yield found


WRITERS = {".csv": _csv, ".parquet": _parquet, ".npz": _npz, ".h5ad": _h5ad}
"""Function that writes rows in the format of each ending."""
