"""Base classes of data sources: the fields of every declaration, and those of sources that read the user's files.

A new source is one final class with ``source: Literal["name"] = "name"`` and a ``read`` that returns `Rows`, in a file
of its own in this folder.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from pvae.component import Component, Ints, Section, Table
from pvae.data.rows import columns, files, prepare, rows
from pvae.errors import DataError
from pvae.util import toml

Range = Annotated[tuple[int, int], Field(strict=False)]
"""Range of rows ``[start, stop)`` of a source; a list of two integers is accepted."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of `numpy.random.RandomState`, in [0, 2^32)."""


class Splits(Section):
    """Declared row ranges of the three splits; a split that is None keeps the source's default rows."""

    train: Range | None = None
    """Row range of the training split."""
    validation: Range | None = None
    """Row range of the validation split, used for early stopping and to select the best weights."""
    test: Range | None = None
    """Row range of the test split, on which results are reported."""

    @property
    def declared(self) -> dict[str, tuple[int, int]]:
        """Declared row ranges by split name; splits that are not declared are absent."""
        return self.model_dump(exclude_none=True)


class Data(Component):
    """Declaration of a data set: its source, and the scaling, binarisation, shape and splits of its rows."""

    tag: ClassVar[str] = "source"

    binarize: prepare.Binarize = "none"
    """`threshold`: x > 0.5; `static`: sampled once; `dynamic`: training data are sampled anew for every batch."""
    scale: prepare.Scale = "unit"
    """`unit`: divide by the largest possible value; `raw`: no scaling; `standardise`: training mean and deviation."""
    shape: Ints | None = None
    """Shape to which each row is reshaped, for example `[1, 28, 28]`."""
    missing: Literal["error", "mask"] = "error"
    """Missing values, NaN: `error` refuses them; `mask` leaves them out of the likelihood, and gives the guide's
    networks 0 in their place and an indicator for every element. Columns of a table have a `missing` of their own."""
    splits: Table[Splits] = Splits()
    """Row ranges of the splits, such as `train = [0, 50000]`."""
    labelled: Annotated[int, Field(gt=0)] | None = None
    """Number of training rows whose labels a fit sees where a latent is `observed`, as many of each class; the other
    labels are hidden from it. All are seen by default."""
    label_seed: Seed | None = None
    """Seed of the choice of the labelled rows, 0 by default."""
    side: dict[str, columns.Column] = {}
    """Values read beside x, by name and type: columns of a table, arrays of an archive, keys of `obs`, entries of a
    dictionary passed in Python. Those that the covariates of an experiment are made of need not be declared here."""

    @property
    def table(self) -> Mapping[str, columns.Column]:
        """Declared columns of a tabular source by name, in the order of x; empty for other sources."""
        return getattr(self, "columns", {})

    @property
    def masked(self) -> bool:
        """True if values may be missing; those of a table's columns are not meant."""
        return self.missing == "mask"

    def with_side(self, side: Mapping[str, columns.Column]) -> Self:
        """Return the declaration with more values beside x; the same without any."""
        return self.model_copy(update={"side": {**self.side, **side}}) if side else self

    @abstractmethod
    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return the stored rows of the source, with its default splits.

        Arguments:
            data_dir: folder in which files are looked for first.
            seed: seed of the experiment, for a source that simulates its data; a stored source gives the same rows
                for every seed, so that runs of different seeds are compared on one data set.

        Raises:
            DataError: the data are missing or damaged.
        """


class FileData(Data):
    """Base of the sources that read the user's own files.

    Without declared splits the rows are permuted with `split_seed`: 80 % train, 10 % validation, 10 % test.
    """

    path: str
    """Path of the file or folder; a relative path is looked for in the data folder, then in the working directory."""
    scale: prepare.Scale = "raw"
    """Scaling of the values; `unit` needs `largest`, or unsigned bytes (divided by 255)."""
    largest: Annotated[float, Field(gt=0)] | None = None
    """Largest possible value, by which `scale = "unit"` divides."""
    split_seed: Seed = 0
    """Seed of the permutation that makes the splits."""
    stream: bool = False
    """Stream the rows from the disk in shuffled blocks, for data larger than memory, instead of loading them."""

    def to_rows(self, x: files.AnyArray, y: np.ndarray | None, name: str, **more: Any) -> rows.Rows:
        """Return the values of a file as rows with random splits: 80 % train, 10 % validation, 10 % test.

        Arguments:
            x: values (n, *shape).
            y: (n,) integer labels, or None.
            name: name of the rows in messages.
            more: additional fields of `Rows`.

        Raises:
            DataError: see `Rows` and `joined`.
        """
        top = self.largest or (255.0 if isinstance(x, prepare.Holed) and x.x.dtype == np.uint8 else None)
        x = x[:] if isinstance(x, prepare.Holed) and not self.stream else x
        return rows.joined({"train": (x, y)}, self.split_seed, name, largest=top, masked=self.masked, **more)


@contextmanager
def named(data: Data, data_dir: Path | None) -> Iterator[None]:
    """Add to a DataError of a source in the context the path of its file, and its kind by its first bytes."""
    try:
        yield
    except DataError as error:
        if not isinstance(data, FileData):
            raise
        kind = signature(files.candidate(data.path, data_dir, Path.is_file))
        is_other = kind and getattr(data, data.tag) not in kind
        said = f"{error} By its first bytes it is {kind}." if is_other else str(error)
        raise DataError(said if Path(data.path).name in said else f"{data.path}: {said}") from error


def signature(path: Path) -> str:
    """Return the kind of a file by its first bytes, with the sources that read it; empty if it is not known."""
    start = b""
    if path.is_file():  # a pipe would be waited for
        with suppress(OSError), path.open("rb") as file:
            start = file.read(8)
    kinds = toml.read(Path(__file__).with_name("signatures.toml")).items()
    return next((kind for magic, kind in kinds if start.hex().startswith(magic)), "")
