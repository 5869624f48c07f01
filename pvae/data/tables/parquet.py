"""Reader of Parquet files in batches of rows; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pvae.data.tables.cells import CellDecoder, Numbers, shown
from pvae.errors import DataError, MissingExtraError

BATCH_ROWS = 2**14


def opened_parquet(path: Path) -> Any:
    """Return an open `pyarrow.parquet.ParquetFile`, without reading its rows.

    Raises:
        DataError: the file is damaged or not a Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtraError(
            f"{path}: expected pyarrow, which reads Parquet; it is not installed. "
            "Run `pip install 'pvae-pyro[parquet]'`."
        ) from None
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
        if isinstance(error, ArrowException | OSError):  # some of Arrow's own errors are a TypeError or ValueError too
            raise DataError(f"{path}: expected a whole Parquet file; got a broken one: {brief(error)}.") from error
        raise DataError(f"{path}: expected numbers and words; got something else: {brief(error)}.") from error


def brief(error: Exception) -> str:
    """Return the first line of another library's error message, quoted."""
    return shown((str(error).splitlines() or [type(error).__name__])[0])
