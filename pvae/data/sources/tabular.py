"""Data sources of tables with mixed column types: CSV files, Parquet files and pandas DataFrames."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pvae.component import Names
from pvae.data.rows import cache, files, prepare
from pvae.data.rows.columns import Column
from pvae.data.rows.rows import PARTLY_LABELLED, Rows, in_order, joined
from pvae.data.sources import base, python
from pvae.data.tables import cells, side
from pvae.data.tables.readers import TextTable, brief, parquet_pieces, text_pieces
from pvae.errors import DataError, refuse

DECODED_FIELDS = set("source columns label id na decimal thousands separator encoding header side".split())
"""Fields of a declaration on which the decoded numbers of a table depend."""


class Tabular(base.Data):
    """Base of the tabular sources: x (n, columns) has one number for every declared column, NaN for a missing value."""

    scale: prepare.Scale = "raw"
    """Always `raw`: columns have transforms of their own; `binarize` and `shape` cannot be set either."""
    columns: dict[str, Column] = Field(min_length=1)
    """Type of every column, by its name in the table; columns that are not declared are left out of x."""
    label: str | None = None
    """Name of the column that contains the labels, which is not part of x; None for data without labels."""
    id: str | None = None
    """Name of the column with the name of each row, which is kept as text and is not part of x; names may repeat."""
    missing: Literal["error"] = "error"
    """Always `error`: each column says for itself, by a `missing` of its own."""
    na: Names = cells.NA
    """Strings that mean a missing value."""
    decimal: Literal[".", ","] = "."
    """Decimal mark of numbers that are written as text."""
    thousands: Literal["", ",", ".", " ", "'", "\u00a0", "\u202f"] = ""
    """Mark between groups of three digits in numbers that are written as text; empty for none."""

    def decoder(self, origin: str) -> cells.CellDecoder:
        """Return the converter of this table's cells; `origin` names the table in messages."""
        spelling = cells.Spelling(self.decimal, self.thousands)
        return cells.CellDecoder(self.columns, self.label, self.na, origin, spelling, self.id, self.side)

    @model_validator(mode="after")
    def _a_table(self) -> Self:
        for name, value in {"scale": "raw", "binarize": "none", "shape": None, "largest": None}.items():
            refuse((own := getattr(self, name, value)) != value, "data.tabular.scaled", ValueError, name=name, own=own)
        refuse(self.decimal == self.thousands, "data.tabular.marks", ValueError, mark=self.decimal)
        refuse(self.label in self.columns, "data.tabular.label", ValueError, label=self.label)
        for name, column in self.columns.items():
            refuse(getattr(column, "text", None), "data.tabular.text", ValueError, name=name)
            refuse(odd := sorted(set(column.words) & set(self.na)), "data.tabular.na", ValueError, name=name, odd=odd)
        return self


class TableFile(Tabular, base.FileData):
    """Base of the tables in files, which are decoded once into the cache."""

    @abstractmethod
    def pieces(self, path: Path, decoder: cells.CellDecoder) -> Iterator[cells.Numbers]:
        """Yield the rows of the file as numbers, chunk by chunk.

        Raises:
            DataError: a value is not allowed (the message gives line or row, and column), or the file is damaged.
        """

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return the rows (n, columns) of the file with random splits.

        Raises:
            DataError: see `pieces`.
        """
        path = files.located(self.path, data_dir)
        declared = self.model_dump(include=DECODED_FIELDS)
        key = {"path": str(path.resolve()), "version": files.version_of(path), **declared}
        key |= {"partly_labelled": True} if PARTLY_LABELLED.get() else {}
        kept = cache.decoded(key, lambda writer: self._decode(writer, path))
        more: dict[str, Any] = {"table": self.columns, "notes": tuple(kept.notes["notes"]), "ids": kept.texts("id")}
        y = None
        if self.label is not None:
            y, more["label_names"] = in_order(kept.arrays["y"][:], kept.notes["labels"])
        if self.side:
            more["side"] = side.beside_rows(kept.arrays["side"][:], self.side, str(path), kept.notes["words"])
        return self.to_rows(files.held(kept.arrays["x"], self.stream, str(path)), y, str(path), **more)

    def _decode(self, writer: cache.Writer, path: Path) -> None:
        decoder = self.decoder(str(path))
        rows = 0
        for found in self.pieces(path, decoder):
            for name, part in found.items():
                (writer.append_texts if name == "id" else writer.append)(name, part)
            rows += len(found["x"])
        refuse(not rows, f"{path}: expected rows below the names of the columns; got none.")
        writer.notes |= {"labels": list(decoder.labels), "notes": decoder.notes, "words": decoder.words}


class CSV(TableFile):
    """Table in a delimited text file, plain or compressed (gzip, bzip2, xz), decoded once into the cache."""

    source: Literal["csv"] = "csv"
    separator: Literal[",", ";", "\t", "|"] = ","
    """Character between two cells."""
    encoding: str = "utf-8"
    """Encoding of the text, by the names that Python gives them, such as `cp1252` or `utf-16`."""
    header: bool = True
    """True if the first line has the names of the columns; without it they are named `c1`, `c2`, ... by place."""

    @field_validator("encoding")
    @classmethod
    def _a_text_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except (LookupError, ValueError):
            raise ValueError(f"an encoding of text that Python knows, such as utf-8; got {value!r}") from None
        return value

    def pieces(self, path: Path, decoder: cells.CellDecoder) -> Iterator[cells.Numbers]:
        return text_pieces(TextTable(path, self.separator, self.encoding, self.header), decoder)


class Parquet(TableFile):
    """Table in a Parquet file, decoded once into the cache; needs pyarrow."""

    source: Literal["parquet"] = "parquet"

    def pieces(self, path: Path, decoder: cells.CellDecoder) -> Iterator[cells.Numbers]:
        return parquet_pieces(path, decoder)


class FrameSource(Tabular, python.PassedData):
    """Source of a pandas DataFrame passed in Python: `pvae.fit(experiment, data=frame)`, or `Dataset.from_frame`."""

    source: Literal["frame"] = "frame"

    def rows_of(self, data: Any, name: str = "data") -> Rows:
        """Return the rows (n, columns) of a DataFrame with random splits.

        Raises:
            DataError: a column is absent, or a value is not allowed; the message gives its row and column.
        """
        import pandas

        refuse(not isinstance(data, pandas.DataFrame), f"data: expected a pandas DataFrame; got {type(data).__name__}.")
        if self.id is not None and self.id not in data and self.id == data.index.name:
            data = data.reset_index()
        names = [str(name) for name in data.columns]
        decoder = self.decoder("data")
        decoder.require_columns(names)
        refuse(not len(data), "data: expected a DataFrame with rows; got none.")
        try:
            found = decoder.decode(data.set_axis(names, axis=1), lambda row: f"row {row}")
        except (TypeError, ValueError) as error:  # cells that are lists or the like
            raise DataError(f"data: expected numbers and words; got something else: {brief(error)}.") from error
        y, words = in_order(found["y"], list(decoder.labels)) if "y" in found else (None, None)
        more: dict[str, Any] = {"label_names": words, "notes": decoder.notes, "table": self.columns}
        if self.side:
            more["side"] = side.beside_rows(found["side"], self.side, "data", decoder.words)
        return joined({"train": (found["x"], y)}, self.split_seed, "data", ids=found.get("id"), **more)
