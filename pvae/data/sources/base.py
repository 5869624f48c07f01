"""The declared data sources: which rows, which splits, which transforms. Importing this needs only pydantic.

A new source is one final class with ``source: Literal["name"] = "name"`` and a ``read`` that returns `Rows`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, final, get_args

from pydantic import Field, field_validator, model_validator

from pvae.component import Component, Ints, Names, Section, Table
from pvae.data.rows.columns import Column
from pvae.errors import DataError, near

if TYPE_CHECKING:
    from pvae.data.rows.rows import Rows

Range = Annotated[tuple[int, int], Field(strict=False)]
"""Rows ``[start, stop)`` of a source; a list of two integers is accepted."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of `numpy.random.RandomState`."""

Side = Annotated[int, Field(gt=0, le=2**13)]
"""Pixels along one side of an image."""

Binarize = Literal["none", "threshold", "static", "dynamic"]
Scale = Literal["unit", "raw", "standardise"]
Density = Literal["moons", "rings", "pinwheel", "checkerboard", "eight_gaussians", "spiral"]


class Splits(Section):
    """Row ranges of the three splits; what is not declared is the source's own."""

    train: Range | None = None
    """Rows to fit."""
    validation: Range | None = None
    """Rows that choose the weights and stop the fit."""
    test: Range | None = None
    """Rows that are reported."""

    @property
    def declared(self) -> dict[str, tuple[int, int]]:
        """The ranges that are declared, by split."""
        ranges = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in ranges.items() if rows is not None}


class Data(Component):
    """Where the data come from and how they are prepared."""

    tag: ClassVar[str] = "source"

    binarize: Binarize = "none"
    """`threshold`: x > 0.5; `static`: one Bernoulli draw; `dynamic`: the training split is drawn anew each batch."""
    scale: Scale = "unit"
    """`unit`: divide by the largest level; `raw`: as stored; `standardise`: by training mean and deviation."""
    shape: Ints | None = None
    """Reshape each row, for example `[1, 28, 28]`."""
    splits: Table[Splits] = Splits()
    """Row ranges, `train = [0, 50000]` and so on."""

    @property
    def table(self) -> Mapping[str, Column]:
        """The columns of a table, in the order of x; none for other data."""
        return {}

    @abstractmethod
    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """The rows of the source, with its own splits.

        Arguments:
            data_dir: where to look for files first.
            seed: the experiment's, for a source that simulates its data; a stored source gives the same rows for
                every seed, so that runs of different seeds are compared on one data set.

        Raises:
            DataError: the data are missing or broken.
        """


@final
class Digits(Data):
    """1797 digits of 8 x 8 pixels, levels 0 to 16, from scikit-learn: always there."""

    source: Literal["digits"] = "digits"

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (1797, 1, 8, 8); train [0, 1000), validation [1000, 1350), test [1350, 1797)."""
        from pvae.data.sources.collections import read_digits

        return read_digits()


@final
class FashionMNIST(Data):
    """Fashion-MNIST: 70 000 images (1, 28, 28) of clothes in ten classes.

    References: Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), https://arxiv.org/abs/1708.07747
    """

    source: Literal["fashion_mnist"] = "fashion_mnist"

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (70000, 1, 28, 28); train [0, 50000), validation [50000, 60000), test [60000, 70000)."""
        from pvae.data.sources.collections import FASHION_MNIST, read_collection

        return read_collection(FASHION_MNIST, data_dir)


@final
class MNIST(Data):
    """MNIST: 70 000 handwritten digits (1, 28, 28).

    References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
    """

    source: Literal["mnist"] = "mnist"

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (70000, 1, 28, 28); train [0, 50000), validation [50000, 60000), test [60000, 70000)."""
        from pvae.data.sources.collections import MNIST_FILES, read_collection

        return read_collection(MNIST_FILES, data_dir)


class FileData(Data):
    """What sources that read the user's own files share.

    Without declared splits the rows are permuted with `split_seed`: 80 % train, 10 % validation, 10 % test.
    """

    path: str
    """The file or folder; a relative path is sought in the data folder, then in the working directory."""
    scale: Scale = "raw"
    """`unit` needs `largest`, or unsigned bytes (255)."""
    largest: Annotated[float, Field(gt=0)] | None = None
    """The largest level, for `scale = "unit"`."""
    split_seed: Seed = 0
    """Seed of the permutation."""
    stream: bool = False
    """Leave the rows on the disk and read them in shuffled blocks: for data larger than memory."""


@final
class Npz(FileData):
    """Arrays of a NumPy archive: `x` (n, ...), or `x_train`, `x_test` and possibly `x_validation`.

    Object arrays are refused: reading them could run code.

    Without declared splits the rows are permuted with `split_seed` (what the archive splits already stays as it is).
    """

    source: Literal["npz"] = "npz"
    x: str = "x"
    """Key of the rows, or its stem before `_train`."""
    y: str | None = None
    """Key of integer labels, or its stem; none are read by default."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, ...) of the archive."""
        from pvae.data.sources.archives import read_npz

        return read_npz(self, data_dir)


@final
class Npy(FileData):
    """One array of a `.npy` file, (n, ...); with `stream` it is mapped, whatever its size.

    Object arrays are refused: reading them could run code.
    """

    source: Literal["npy"] = "npy"
    labels: str | None = None
    """A second `.npy` file, of integer labels; none are read by default."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, ...) of the array."""
        from pvae.data.sources.archives import read_npy

        return read_npy(self, data_dir)


@final
class Idx(FileData):
    """An IDX file, as MNIST's: numbers of any of its six types in any dimensions, plain or gzipped.

    References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
    """

    source: Literal["idx"] = "idx"
    labels: str | None = None
    """A second IDX file, of integer labels; none are read by default."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, ...) of the file."""
        from pvae.data.sources.idx import read

        return read(self, data_dir)


@final
class Images(FileData):
    """A folder of images (PNG, JPEG, BMP, GIF, PPM, TIFF, WebP), its sub-folders among it, in the order of their names.

    They are decoded once into the cache. What cannot be read is skipped and listed in `Dataset.notes`. When every image
    is in a sub-folder, the sub-folders are the labels.
    """

    source: Literal["images"] = "images"
    size: Annotated[tuple[Side, Side], Field(strict=False)] | None = None
    """`[height, width]`, to which images are resized (bilinear, antialiased); by default all must be of one size."""
    mode: Literal["L", "RGB"] = "RGB"
    """One channel of luminance (`L`), or three of colour."""
    scale: Scale = "unit"
    """`unit`: divide by 255."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, channels, height, width), uint8."""
        from pvae.data.sources.images import read

        return read(self, data_dir)


@final
class TensorSource(Data):
    """Tensors passed in Python: `pvae.fit(experiment, data=...)`, or `Dataset.from_tensors`."""

    source: Literal["tensor"] = "tensor"
    scale: Scale = "raw"
    """`unit` needs unsigned bytes."""
    split_seed: Seed = 0
    """Seed of the permutation for splits that are not passed."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Nothing to read.

        Raises:
            DataError: always; the data must be passed.
        """
        raise DataError('Expected tensors for data.source = "tensor"; got none. Pass data=... in Python.')


@final
class Toy(Data):
    """Draws of a density in the plane: pairs (x1, x2), labelled by the part of the figure that they belong to.

    `pvae.data.sources.toys.log_density` and `entropy` give the exact density of four of them.
    """

    source: Literal["toy"] = "toy"
    density: Density = "moons"
    rows: int = Field(default=4000, gt=0)
    """Rows to train; a tenth more validates, another tests."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Deviation of the noise around the figure; by default one that keeps it clear."""
    scale: Scale = "raw"
    """Not `unit`: there is no largest level."""
    data_seed: Seed | Literal["experiment"] = 0
    """Seed of the draws, the same data for every experiment; `experiment`: each seed of a run draws its own."""

    @field_validator("density", mode="before")
    @classmethod
    def _known(cls, density: Any) -> Any:
        known = get_args(Density)
        if density not in known:
            hint = near(density, known) if isinstance(density, str) else ""
            raise ValueError(f"one of {', '.join(known)}; got {density!r}{hint}")
        return density

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (1.2 rows, 2); train [0, rows), then validation, then test."""
        from pvae.data.sources.toys import read_toy

        return read_toy(self.density, self.rows, self.noise, seed if self.data_seed == "experiment" else self.data_seed)


class Tabular(Data):
    """What tables share: x has a number for every declared column, NaN where one is missing."""

    scale: Scale = "raw"
    """Not for tables, whose columns have transforms of their own; nor are `binarize` and `shape`."""
    columns: dict[str, Column] = Field(min_length=1)
    """What every column holds, by its name in the table; columns that are not declared are left out."""
    label: str | None = None
    """A column that is no part of x: the label of every row."""
    na: Names = ("", "NA", "nan")
    """What is written for a missing value."""

    @property
    def table(self) -> Mapping[str, Column]:
        """See `Data.table`."""
        return self.columns

    @model_validator(mode="after")
    def _a_table(self) -> Self:
        usual = {"scale": "raw", "binarize": "none", "shape": None, "largest": None}
        for name, value in usual.items():
            found = getattr(self, name, value)
            if found != value:
                raise ValueError(f"no {name} in a table, whose columns have transforms of their own; got {found!r}")
        if self.label in self.columns:
            raise ValueError(f"a label that is no part of x; got {self.label!r}, which is in columns too")
        for name, column in self.columns.items():
            if lost := sorted(set(column.words) & set(self.na)):
                raise ValueError(f"levels of {name!r} that are not in na, the words for what is missing; got {lost}")
        return self


@final
class CSV(Tabular, FileData):
    """A table of text, UTF-8, with a line of column names: decoded once into the cache."""

    source: Literal["csv"] = "csv"
    separator: Literal[",", ";", "\t", "|"] = ","
    """What stands between two cells."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, columns) of the file."""
        from pvae.data.tables.tables import read_csv

        return read_csv(self, data_dir)


@final
class Parquet(Tabular, FileData):
    """A table in a Parquet file: decoded once into the cache. Needs pyarrow."""

    source: Literal["parquet"] = "parquet"

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Rows (n, columns) of the file.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        from pvae.data.tables.tables import read_parquet

        return read_parquet(self, data_dir)


@final
class FrameSource(Tabular):
    """A pandas DataFrame passed in Python: `pvae.fit(experiment, data=frame)`, or `Dataset.from_frame`."""

    source: Literal["frame"] = "frame"
    split_seed: Seed = 0
    """Seed of the permutation for splits that are not declared."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Nothing to read.

        Raises:
            DataError: always; the data must be passed.
        """
        raise DataError('Expected a DataFrame for data.source = "frame"; got none. Pass data=... in Python.')
