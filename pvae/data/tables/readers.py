"""Readers of tables: delimited text files (CSV), checked before pandas parses them, and Parquet files.

pandas alone would pad a record that has too few cells, accept a quote in the middle of a cell as a character, and
miscount lines after quoted line feeds; therefore records and cells are counted here. Parquet needs pyarrow.
"""

import bz2
import codecs
import csv
import gzip
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pandas

from pvae.data.tables.cells import CellDecoder, Numbers, Spelling, require_named_once, shown
from pvae.errors import DataError, refuse, require_extra

TEXT_PIECE_BYTES = 2**22
MAX_HEADER_BYTES = 2**20
MAX_RECORD_BYTES = 2**24
QUOTE, NEWLINE = ord('"'), ord("\n")
BOM = b"\xef\xbb\xbf"
PACKED: Mapping[bytes, ModuleType] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
"""Module that opens a compressed file, by the bytes with which the file starts."""
BATCH_ROWS = 2**14
"""Largest number of rows of a Parquet file that are read at once."""


class Piece(NamedTuple):
    """Chunk of complete records of a text table, each with as many cells as the header.

    The text is UTF-8 without NUL, its lines end in a line feed, and it has no empty lines if there are several columns;
    `lines` has the line of the file, counted from 1, on which each record begins.
    """

    text: bytes
    lines: np.typing.NDArray[np.int64]


class TextTable:
    """Delimited text file, whose header (its first record, the names of the columns) is read when it is opened.

    Arguments:
        path: the file, plain or compressed with gzip, bzip2 or xz.
        separator: character between two cells.
        encoding: encoding of the text.
        header: False for a file without column names, whose columns are then c1, c2, ...

    Raises:
        DataError: the file is empty or not text; the header is too long, or names a column twice.
    """

    def __init__(self, path: Path, separator: str, encoding: str = "utf-8", header: bool = True) -> None:
        self.path, self.separator, self.encoding = path, separator, encoding
        with opened_text(self.path, self.encoding) as file:
            start = file.read(MAX_HEADER_BYTES + 1)
        refuse(not start.removeprefix(BOM).strip(), f"{path}: expected a line of column names; got an empty file.")
        marks = np.frombuffer(start, np.uint8)
        ends = np.flatnonzero((marks == NEWLINE) & ~_quoted(marks))
        if not len(ends) and len(start) > MAX_HEADER_BYTES:
            raise self._wrong(1, f"expected column names in at most {MAX_HEADER_BYTES >> 20} MiB; got more")
        self.header = start[: int(ends[0]) + 1] if len(ends) else start
        text = self._decoded(self.header, 1).removeprefix("\ufeff").rstrip("\r\n")
        try:
            self.names: list[str] = next(csv.reader(StringIO(text, newline=""), delimiter=separator), [])
        except csv.Error as error:
            raise self._wrong(1, f"expected column names; got {error}") from error
        if not header:
            self.header = BOM if start.startswith(BOM) else b""
            self.names = [f"c{i + 1}" for i in range(len(self.names))]
        require_named_once(self.names, f"{path}, line 1")

    def pieces(self) -> Iterator[Piece]:
        """Yield the records after the header in chunks of about `TEXT_PIECE_BYTES`.

        Raises:
            DataError: text that is not UTF-8, a NUL, a record whose number of cells differs from the header's, a quote
                in the middle of a cell or never closed, or a record that is too long; the message gives the line.
        """
        line, rest = self.header.count(b"\n") + 1, b""
        with opened_text(self.path, self.encoding) as file:
            block = file.read(len(self.header) + TEXT_PIECE_BYTES)[len(self.header) :]
            while block or rest:
                text = (rest + (block or b"\n")).replace(b"\r\n", b"\n")  # a last line may lack its end
                marks = np.frombuffer(text, np.uint8)
                inside = _quoted(marks) if b'"' in text else np.zeros(1, bool)
                ends = np.flatnonzero((marks == NEWLINE) & ~inside)
                size = int(ends[-1]) + 1 if len(ends) else 0
                if len(text) - size > MAX_RECORD_BYTES:
                    most = f"expected a record of at most {MAX_RECORD_BYTES >> 20} MiB"
                    raise self._wrong(_line(text, size, line), f"{most}; got a longer one. Close its quotes")
                if not size and not block:
                    raise self._wrong(line, "expected a closing quote; got the end of the file")
                if size:
                    yield self._piece(text[:size], ends, line)
                    line = _line(text, size, line)
                rest, block = text[size:], file.read(TEXT_PIECE_BYTES)

    def _piece(self, text: bytes, ends: np.typing.NDArray[np.int64], line: int) -> Piece:
        """Return a chunk of records that end at `ends`, after checking its text, its quotes and the number of cells."""
        self._decoded(text, line)
        if b"\r" in text:
            at = _line(text, text.index(b"\r"), line)
            raise self._wrong(at, "expected lines that end in a line feed; got a carriage return alone")
        marks, width = np.frombuffer(text, np.uint8), len(self.names)
        separators, lines = marks == ord(self.separator), line + np.arange(len(ends))
        if b'"' in text:
            inside = _quoted(marks)
            opening = np.flatnonzero((marks == QUOTE) & inside)
            before = np.where(opening > 0, marks[opening - 1], NEWLINE)
            stray = opening[~np.isin(before, (ord(self.separator), NEWLINE, QUOTE))]
            if len(stray):
                at = _line(text, stray[0], line)
                raise self._wrong(at, "expected quotes around a whole cell; got one in the middle. Double it")
            separators &= ~inside
            lines[1:] = line + np.cumsum(marks == NEWLINE)[ends[:-1]]
        cells = np.diff(np.cumsum(separators, dtype=np.int32)[ends], prepend=0) + 1
        starts = np.concatenate([[0], ends[:-1] + 1])
        empty = (starts == ends) & (width > 1)
        wrong = np.flatnonzero((cells != width) & ~empty)
        if len(wrong):
            raise self._wrong(lines[wrong[0]], f"expected {width} cells, as the header has; got {cells[wrong[0]]}")
        if empty.any():
            text = b"".join(text[a : b + 1] for a, b, gone in zip(starts, ends, empty, strict=True) if not gone)
        return Piece(text, lines[~empty])

    def _decoded(self, text: bytes, line: int) -> str:
        problem, at = "expected text; got a NUL byte", text.find(b"\0")
        if at < 0:
            try:
                return text.decode()
            except UnicodeDecodeError as error:
                problem, at = f"expected UTF-8; got the byte 0x{text[error.start]:02x}", error.start
        raise self._wrong(_line(text, at, line), f"{problem}. Set data.encoding, or save it as UTF-8")

    def _wrong(self, line: int, problem: str) -> DataError:
        return DataError(f"{self.path}, line {line}: {problem}.")

    def frame(self, piece: Piece, na: Sequence[str], kinds: Mapping[str, str]) -> pandas.DataFrame:
        """Return the columns named in `kinds` of a chunk of records as a data frame, each with the given dtype.

        Raises:
            DataError: the number of records that pandas finds differs from the number counted.
            ValueError: a cell of a numeric column is not a number.
        """
        frame = pandas.read_csv(
            BytesIO(piece.text), sep=self.separator, header=None, names=self.names, usecols=list(kinds),
            dtype=dict(kinds), na_values=list(na), keep_default_na=False, index_col=False, engine="c",
            encoding="utf-8", skip_blank_lines=False, quotechar='"',
        )  # fmt: skip
        refuse(len(frame) != len(piece.lines), "data.tables.records", lines=piece.lines, found=len(frame))
        return frame


@contextmanager
def opened_text(path: Path, encoding: str) -> Iterator[IO[bytes] | codecs.StreamRecoder]:
    """Open a text file as a stream of UTF-8, decompressed if it is compressed with gzip, bzip2 or xz.

    Text of another encoding is read by characters, without its byte order mark.

    Raises:
        DataError: the compressed content is damaged, or the text is not in the declared encoding.
    """
    with path.open("rb") as plain:
        unpack = next((module for magic, module in PACKED.items() if plain.peek(6).startswith(magic)), None)
        file = cast("IO[bytes]", plain if unpack is None else unpack.open(plain))
        try:
            yield file if codecs.lookup(encoding).name == "utf-8" else codecs.EncodedFile(file, "utf-8", encoding)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: expected a whole compressed file; got {error}.") from error
        except UnicodeError as error:
            raise DataError(f"{path}: expected text in {encoding}; got {error}.") from error


def _line(text: bytes, place: int, first: int) -> int:
    """Return the line number of the byte at `place`, when the text begins on line `first`."""
    return first + text.count(b"\n", 0, place)


def _quoted(marks: np.typing.NDArray[np.uint8]) -> np.typing.NDArray[np.bool_]:
    """Return True for each byte inside quotes, including the opening quote."""
    return np.cumsum(marks == QUOTE, dtype=np.int32) % 2 == 1


def text_pieces(table: TextTable, decoder: CellDecoder) -> Iterator[Numbers]:
    """Yield the rows of a text table as numbers, in chunks of about `TEXT_PIECE_BYTES` of text.

    Raises:
        DataError: a value is not allowed; the message gives its line and column. See also `TextTable`.
    """
    decoder.require_columns(table.names)
    return (_numbers(piece, table, decoder) for piece in table.pieces())  # no piece is kept while the next is read


def _numbers(piece: Piece, table: TextTable, decoder: CellDecoder) -> Numbers:
    words = dict.fromkeys(decoder.names, "str")
    numbers = dict.fromkeys(decoder.plain_numbers if decoder.spelling == Spelling() else (), "float64")
    try:
        frame = table.frame(piece, decoder.na, words | numbers)
    except (ValueError, OverflowError):  # some cell is no number: the decoder reads the same cells as text
        frame = table.frame(piece, decoder.na, words)
    return decoder.decode(frame, lambda row: f"line {piece.lines[row]}")


def opened_parquet(path: Path) -> Any:
    """Return an open `pyarrow.parquet.ParquetFile`, without reading its rows.

    Raises:
        DataError: the file is damaged or not a Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    require_extra("pyarrow", "parquet", f"{path}: expected pyarrow, which reads Parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a Parquet file; got a broken or foreign one: {brief(error)}.") from error


def parquet_pieces(path: Path, decoder: CellDecoder) -> Iterator[Numbers]:
    """Yield the rows of a Parquet file as numbers, in batches of at most `BATCH_ROWS`.

    Raises:
        DataError: a value is not allowed (the message gives its row and column), or the file is damaged.
        MissingExtraError: pyarrow is not installed.
    """
    file = opened_parquet(path)
    decoder.require_columns(list(file.schema_arrow.names))
    from pyarrow import ArrowException

    start = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=decoder.names):
            frame = batch.select(decoder.names).replace_schema_metadata().to_pandas(strings_to_categorical=True)
            yield decoder.decode(frame, lambda row, first=start: f"row {first + row}")  # type: ignore[misc]
            start += len(frame)
    except (ArrowException, OSError, TypeError, ValueError) as error:
        broken = isinstance(error, ArrowException | OSError)  # some are a TypeError or ValueError too
        raise DataError.of("data.readers.parquet", path=path, broken=broken, error=brief(error)) from error


def brief(error: Exception) -> str:
    """Return the first line of another library's error message, quoted."""
    return shown((str(error).splitlines() or [type(error).__name__])[0])
