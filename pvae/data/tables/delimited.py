"""Reader of delimited text files (CSV): the header, then chunks of records, checked before pandas parses them.

pandas alone would pad a record that has too few cells, accept a quote in the middle of a cell as a character, and
miscount lines after quoted line feeds; therefore records and cells are counted here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pvae.data.tables.cells import CellDecoder, Numbers, require_named_once
from pvae.errors import DataError

if TYPE_CHECKING:
    import pandas

    from pvae.data.tables.cells import Cells

TEXT_PIECE_BYTES = 2**22
MAX_HEADER_BYTES = 2**20
MAX_RECORD_BYTES = 2**24
QUOTE, NEWLINE = ord('"'), ord("\n")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextHeader:
    """Header of a text table: its column names, and its size in bytes and in lines."""

    names: list[str]
    bytes: int
    lines: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Chunk of complete records of a text table, each with as many cells as the header.

    Arguments:
        text: UTF-8 without NUL, lines ended by a line feed, without empty lines if there are several columns.
        lines: line of the file, counted from 1, on which each record begins.
    """

    text: bytes
    lines: NDArray[np.int64]


def read_header(path: Path, separator: str) -> TextHeader:
    """Return the header of a text table: the column names in its first record, and the header's size.

    Raises:
        DataError: the file is empty or not text; the record is too long, or names a column twice.
    """
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES + 1)
    if not start.removeprefix(BOM).strip():
        raise DataError(f"{path}: expected a line of column names; got an empty file.")
    marks = np.frombuffer(start, np.uint8)
    ends = np.flatnonzero((marks == NEWLINE) & ~_quoted(marks))
    if not len(ends) and len(start) > MAX_HEADER_BYTES:
        raise DataError(f"{path}, line 1: expected column names in at most {MAX_HEADER_BYTES >> 20} MiB; got more.")
    size = int(ends[0]) + 1 if len(ends) else len(start)
    text = _decoded(start[:size], path, 1).removeprefix("\ufeff").rstrip("\r\n")
    try:
        names = next(csv.reader(StringIO(text, newline=""), delimiter=separator), [])
    except csv.Error as error:
        raise DataError(f"{path}, line 1: expected column names; got {error}.") from error
    require_named_once(names, f"{path}, line 1")
    return TextHeader(names, size, start[:size].count(b"\n"))


def read_pieces(path: Path, header: TextHeader, separator: str) -> Iterator[Piece]:
    """Yield the records after the header in chunks of about `TEXT_PIECE_BYTES`.

    Raises:
        DataError: text that is not UTF-8, a NUL, a record whose number of cells differs from the header's, a quote in
            the middle of a cell or never closed, or a record that is too long; the message gives the line.
    """
    width, line, rest = len(header.names), header.lines + 1, b""
    with path.open("rb") as file:
        file.seek(header.bytes)
        while (block := file.read(TEXT_PIECE_BYTES)) or rest:
            whole, rest = _split(rest + (block or b"\n"), path, line)  # a last line may lack its end
            if not whole and not block:
                raise DataError(f"{path}, line {line}: expected a closing quote; got the end of the file.")
            if whole:
                text = _cleaned(whole, path, line)
                yield _piece(text, width, ord(separator), path, line)
                line += text.count(b"\n")


def _split(block: bytes, path: Path, line: int) -> tuple[bytes, bytes]:
    """Return the bytes of the complete records in a block, and the remaining bytes of an incomplete record."""
    marks = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((marks == NEWLINE) & ~_quoted(marks)) if b'"' in block else None
    size = block.rfind(b"\n") + 1 if ends is None else int(ends[-1]) + 1 if len(ends) else 0
    if len(block) - size > MAX_RECORD_BYTES:
        raise DataError(
            f"{path}, line {_line(block, size, line)}: expected a record of at most "
            f"{MAX_RECORD_BYTES >> 20} MiB; got a longer one. Close its quotes."
        )
    return block[:size], block[size:]


def _line(text: bytes, place: int, first: int) -> int:
    """Return the line number of the byte at `place`, when the text begins on line `first`."""
    return first + text.count(b"\n", 0, place)


def _quoted(marks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return True for each byte inside quotes, including the opening quote."""
    return np.cumsum(marks == QUOTE, dtype=np.int32) % 2 == 1


def _cleaned(text: bytes, path: Path, line: int) -> bytes:
    """Return text with all line ends converted to line feeds; refuse NUL, invalid UTF-8 and lone carriage returns."""
    _decoded(text, path, line)
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    if b"\r" in text:
        at = _line(text, text.index(b"\r"), line)
        raise DataError(f"{path}, line {at}: expected lines that end in a line feed; got a carriage return alone.")
    return text


def _decoded(text: bytes, path: Path, line: int) -> str:
    if b"\0" in text:
        at = _line(text, text.index(b"\0"), line)
        raise DataError(f"{path}, line {at}: expected text; got a NUL byte. Save it as UTF-8.")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        at = _line(text, error.start, line)
        raise DataError(
            f"{path}, line {at}: expected UTF-8; got the byte 0x{text[error.start]:02x}. Save it as UTF-8."
        ) from None


def _piece(text: bytes, width: int, separator: int, path: Path, line: int) -> Piece:
    """Return a chunk of records with their line numbers; refuse records whose number of cells is not `width`."""
    marks = np.frombuffer(text, np.uint8)
    newlines, separators = marks == NEWLINE, marks == separator
    before = None
    if b'"' in text:
        inside = _quoted(marks)
        _refuse_stray(marks, inside, separator, path, line)
        before = np.cumsum(newlines)
        newlines, separators = newlines & ~inside, separators & ~inside
    ends = np.flatnonzero(newlines)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines = line + (np.arange(len(ends)) if before is None else np.concatenate([[0], before[ends[:-1]]]))
    cells = np.diff(np.cumsum(separators, dtype=np.int32)[ends], prepend=0) + 1
    empty = (starts == ends) if width > 1 else np.zeros(len(ends), bool)
    wrong = np.flatnonzero((cells != width) & ~empty)
    if len(wrong):
        raise DataError(
            f"{path}, line {lines[wrong[0]]}: expected {width} cells, as the header has; got {cells[wrong[0]]}."
        )
    if empty.any():
        text = b"".join(text[a : b + 1] for a, b, gone in zip(starts, ends, empty, strict=True) if not gone)
    return Piece(text, lines[~empty])


def _refuse_stray(marks: NDArray[np.uint8], inside: NDArray[np.bool_], separator: int, path: Path, line: int) -> None:
    """Refuse quotes in the middle of a cell: an opening quote must follow a separator, a line feed or a quote."""
    opening = np.flatnonzero((marks == QUOTE) & inside)
    before = np.where(opening > 0, marks[opening - 1], NEWLINE)
    stray = opening[(before != separator) & (before != NEWLINE) & (before != QUOTE)]
    if len(stray):
        at = line + int((marks[: stray[0]] == NEWLINE).sum())
        raise DataError(f"{path}, line {at}: expected quotes around a whole cell; got one in the middle. Double it.")


def text_pieces(path: Path, separator: str, decoder: CellDecoder) -> Iterator[Numbers]:
    """Yield the rows of a text table as numbers, in chunks of about `TEXT_PIECE_BYTES` of text.

    Raises:
        DataError: a value is not allowed; the message gives its line and column. See also `read_pieces`.
    """
    header = read_header(path, separator)
    decoder.require_columns(header.names)
    pieces = read_pieces(path, header, separator)
    return (_numbers(piece, header, separator, decoder) for piece in pieces)  # no piece is kept while the next is read


def _numbers(piece: Piece, header: TextHeader, separator: str, decoder: CellDecoder) -> Numbers:
    words = dict.fromkeys(decoder.names, "str")
    numbers = {name: "float64" for name, column in decoder.columns.items() if not column.words}
    try:
        frame = text_frame(piece, header, separator, decoder.na, words | numbers)
    except (ValueError, OverflowError):  # some cell is no number: the same cells as text show which
        frame = text_frame(piece, header, separator, decoder.na, words)
        frame = frame.assign(**{name: _numeric(frame[name]) for name in numbers})
    return decoder.decode(frame, lambda row: f"line {piece.lines[row]}")


def text_frame(
    piece: Piece, header: TextHeader, separator: str, na: Sequence[str], kinds: Mapping[str, str]
) -> pandas.DataFrame:
    """Return the columns named in `kinds` of a chunk of records as a data frame, each with the given dtype.

    Raises:
        DataError: the number of records that pandas finds differs from the number counted.
        ValueError: a cell of a numeric column is not a number.
    """
    import pandas

    frame = pandas.read_csv(
        BytesIO(piece.text), sep=separator, header=None, names=header.names, usecols=list(kinds), dtype=dict(kinds),
        na_values=list(na), keep_default_na=False, index_col=False, engine="c", encoding="utf-8",
        skip_blank_lines=False, quotechar='"',
    )  # fmt: skip
    if len(frame) != len(piece.lines):
        where = f"lines {piece.lines[0]} to {piece.lines[-1]}"
        raise DataError(f"Expected {len(piece.lines)} records in {where}; got {len(frame)}. Check its quotes.")
    return frame


def _numeric(cells: Cells) -> Cells:
    """Return text cells converted to numbers; a cell that is not a number stays text, to be shown in the message."""
    import pandas

    return pandas.to_numeric(cells, errors="coerce").astype(object).where(lambda found: found.notna(), cells)
