"""Data: every source x every law; splits, scaling, binarisation, support, fingerprints."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from pydantic import ValidationError
from torch.distributions import constraints

from pvae.data import (
    CSV,
    MNIST,
    Data,
    Dataset,
    Digits,
    FashionMNIST,
    FrameSource,
    H5ad,
    Hdf5,
    Idx,
    Images,
    Mat,
    Npy,
    Npz,
    Parquet,
    Patches,
    Splits,
    StackedCodes,
    TensorSource,
    Toy,
    load,
)
from pvae.data.rows.rows import shared_rows
from pvae.errors import DataError, DeclarationError
from tests.data.writers import h5ad, hdf5, idx, matlab, npy, npz, pictures, refused, small_arrays
from tests.runs_shared import fit, tiny

RNG = np.random.RandomState(0)
X = RNG.uniform(0.05, 0.95, (40, 4)).astype(np.float32)
Y = np.arange(40) % 3
PIXELS = RNG.randint(0, 256, (40, 2, 3)).astype(np.uint8)
LABELS = ["abc"[label] for label in Y]


@dataclass(frozen=True)
class Row:
    make: Callable[[Path], Data]
    shape: tuple[int, ...]
    sizes: tuple[int, int, int]
    range: tuple[float, float] = (0, 1)


def mnist(folder: Path) -> MNIST:
    np.savez(folder / "mnist.npz", **small_arrays())  # type: ignore[arg-type]
    return MNIST()


COLUMNS = {"columns": {name: {"type": "continuous", "transform": "none"} for name in "abcd"}, "label": "y"}
FRAME = pandas.DataFrame(X, columns=list("abcd")).assign(y=Y)


def table_file(source: type[CSV | Parquet], folder: Path) -> Data:
    path = folder / "table"
    FRAME.to_csv(path, index=False) if source is CSV else FRAME.to_parquet(path)
    return source.model_validate({"path": str(path), **COLUMNS})


@cache
def first_stage() -> tempfile.TemporaryDirectory[str]:
    """The folder of a run whose codes are data."""
    folder = tempfile.TemporaryDirectory()
    fit(tiny(epochs=1), Path(folder.name))
    return folder


TABLE = {
    "digits": Row(lambda _: Digits(), (1, 8, 8), (1000, 350, 447)),
    "patches": Row(lambda _: Patches(size=96), (3, 96, 96), (810, 81, 81)),
    "fashion_mnist": Row(lambda _: FashionMNIST(), (1, 28, 28), (50000, 10000, 10000)),
    "mnist": Row(mnist, (1, 3, 3), (10, 2, 4)),
    "npz": Row(lambda p: Npz(path=npz(p, x=X, y=Y), y="y"), (4,), (32, 4, 4)),
    "tensor": Row(lambda _: TensorSource(), (4,), (32, 4, 4)),
    "npy": Row(lambda p: Npy(path=npy(p / "x.npy", X), labels=npy(p / "y.npy", Y)), (4,), (32, 4, 4)),
    "idx": Row(lambda p: Idx(path=idx(p / "x", X, 0x0D, "f"), labels=idx(p / "y", Y, zipped=True)), (4,), (32, 4, 4)),
    "hdf5": Row(lambda p: Hdf5(path=hdf5(p / "x.h5", x=X, y=Y), y="y"), (4,), (32, 4, 4)),
    "mat": Row(lambda p: Mat(path=matlab(p / "x.mat", x=X, y=Y), y="y"), (4,), (32, 4, 4)),
    "h5ad": Row(lambda p: H5ad(path=h5ad(p / "x.h5ad", X, pandas.DataFrame({"y": Y})), labels="y"), (4,), (32, 4, 4)),
    "images": Row(lambda p: Images(path=pictures(p, PIXELS, LABELS), mode="L"), (1, 2, 3), (32, 4, 4)),
    "csv": Row(partial(table_file, CSV), (4,), (32, 4, 4)),
    "parquet": Row(partial(table_file, Parquet), (4,), (32, 4, 4)),
    "frame": Row(lambda _: FrameSource.model_validate(COLUMNS), (4,), (32, 4, 4)),
    "toy": Row(lambda _: Toy(rows=100), (2,), (100, 10, 10), (-5, 5)),
    "codes": Row(lambda _: StackedCodes(run=f"{first_stage().name}/experiment"), (3,), (1000, 350, 447), (-5, 5)),
}


def loaded(name: str, folder: Path, **changes: Any) -> Dataset:
    data = TABLE[name].make(folder).model_copy(update=changes)
    if isinstance(data, TensorSource):
        return Dataset.from_tensors(X, Y, declared=data)
    if isinstance(data, FrameSource):
        return Dataset.from_frame(FRAME, declared=data)
    return load(data, data_dir=folder)


def test_the_table_holds_every_source():
    ours = {name for name, member in Data.members.items() if member.__module__.startswith("pvae.")}
    assert set(TABLE) == ours


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("small_mnist")
def test_shapes_types_and_ranges(name: str, tmp_path: Path):
    data, row = loaded(name, tmp_path), TABLE[name]
    assert data.source == name
    assert data.shape == row.shape
    assert tuple(len(split) for split in data.splits) == row.sizes
    for split in data.splits:
        assert split.x.shape == (len(split), *row.shape)
        assert split.x.dtype == torch.float32
        assert split.y is not None
        assert split.y.dtype == torch.int64
        assert split.y.shape == (len(split),)
        assert split.raw is None
        assert row.range[0] <= float(split.x.min()) < float(split.x.max()) <= row.range[1]


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("fashion_mnist", "patches", "toy", "codes")])
@pytest.mark.parametrize("binarize", ["threshold", "static", "dynamic"])
@pytest.mark.usefixtures("small_mnist")
def test_binarised_data_are_zeros_and_ones_and_the_same_each_time(name: str, binarize: str, tmp_path: Path):
    one, other = (loaded(name, tmp_path, binarize=binarize) for _ in range(2))
    one.require_support(constraints.boolean, "")
    assert one.fingerprint == other.fingerprint != loaded(name, tmp_path).fingerprint
    assert (one.train.raw is not None) == (binarize == "dynamic")
    assert one.validation.raw is None


@pytest.mark.parametrize("name", TABLE)
def test_declarations_round_trip(name: str, tmp_path: Path):
    data = TABLE[name].make(tmp_path)
    assert Data.parse(data.model_dump()) == data
    assert Data.parse(data.model_dump(mode="json", exclude_none=True)) == data


def test_the_source_of_contributing_reads_its_file(tmp_path: Path):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:] if "(FileData)" in block)
    np.savetxt(tmp_path / "x.txt", np.column_stack([X, Y]), header="four numbers and a label")
    declared = {"source": "text", "path": "x.txt", "label": True}
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": "example"})
        data = load(Data.parse(declared), data_dir=tmp_path)
        assert data.fingerprint == load(Npz(path=npz(tmp_path, x=X.astype(np.float64), y=Y), y="y")).fingerprint
        (tmp_path / "x.txt").write_text("1 2\n3 four\n")
        refused("x.txt: expected rows of numbers; got .*four", load, Data.parse(declared), data_dir=tmp_path)
    finally:
        Data.members.pop("text", None)


def test_fixed_draws_follow_the_protocol_on_any_source():
    x = load(Digits()).validation.x.double().numpy(), load(Digits()).test.x.double().numpy()
    published = np.random.RandomState(777)
    data = load(Digits(binarize="dynamic"))
    assert np.array_equal(data.validation.x.numpy(), published.binomial(1, x[0]))
    assert np.array_equal(data.test.x.numpy(), published.binomial(1, x[1]))


def test_dynamic_draws_differ_and_follow_torch_s_seed():
    train = load(Digits(binarize="dynamic")).train
    index = torch.arange(100)
    torch.manual_seed(3)
    first, second = train.draw(index), train.draw(index)
    torch.manual_seed(3)
    assert torch.equal(train.draw(index), first)
    assert not torch.equal(first, second)
    assert train.raw is not None
    mean = torch.stack([train.draw(index) for _ in range(400)]).mean(0)
    # 6400 means of 400 draws, standard error at most .025: beyond .15 (6 of them) with probability below 1e-4
    assert float((mean - train.raw[index]).abs().max()) < 0.15


def test_static_draws_stay():
    data = load(Digits(binarize="static"))
    index = torch.tensor([5, 3])
    assert torch.equal(data.train.draw(index), data.train.x[index])


def test_the_seed_of_a_run_does_not_change_the_data():
    one, other = (load(Digits(binarize="dynamic"), seed=seed).fingerprint for seed in (0, 1))
    assert one == other


def test_standardise_by_the_training_split():
    data = Dataset.from_tensors(X, declared=TensorSource(scale="standardise"))
    assert torch.allclose(data.train.x.mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(data.train.x.std(0, correction=0), torch.ones(4), atol=1e-6)
    assert not torch.allclose(data.test.x.mean(0), torch.zeros(4), atol=1e-3)


def test_standardise_names_the_constant_column():
    """FAULTS 24."""
    x = X.copy()
    x[:, 2] = 0.1
    refused(r"column 2 is constant \(1 such", Dataset.from_tensors, x, declared=TensorSource(scale="standardise"))


def test_unit_divides_by_the_largest_level(tmp_path: Path):
    levels = RNG.randint(0, 256, (20, 3)).astype(np.uint8)
    path = npz(tmp_path, x=levels, f=levels.astype(float))
    unit, raw = load(Npz(path=path, scale="unit")), load(Npz(path=path))
    assert torch.allclose(unit.train.x * 255, raw.train.x)
    assert torch.allclose(load(Npz(path=path, x="f", scale="unit", largest=510.0)).train.x * 2, unit.train.x)


def test_notes_say_where_rows_are_read_from_unless_they_are_x(tmp_path: Path):
    assert load(Npz(path=npz(tmp_path, x=X, y=Y), y="y")).notes == ()
    notes = load(Npz(path=npz(tmp_path, images=X, y=Y), y="y")).notes
    assert [note.partition(": ")[2] for note in notes] == ["rows are read from images"]


def test_shape_reshapes_each_row():
    assert load(Digits(shape=(64,))).train.x.shape == (1000, 64)
    assert Dataset.from_tensors(X[:, 0], declared=TensorSource(shape=(1,))).train.x.shape == (32, 1)


def test_declared_splits():
    data = load(Digits(splits=Splits(train=(100, 700), test=(1700, 1797))))
    assert [len(split) for split in data.splits] == [600, 350, 97]
    assert torch.equal(data.train.x, load(Digits()).train.x[100:700])


def test_splits_parse_from_lists_and_stay_strict():
    assert Digits.model_validate({"splits": {"train": [0, 10]}}).splits.train == (0, 10)
    with pytest.raises(ValidationError):
        Digits.model_validate({"splits": {"train": [0, "10"]}})


def test_seeded_permutation_of_an_archive(tmp_path: Path):
    path = npz(tmp_path, x=X)
    one, again, other = (load(Npz(path=path, split_seed=seed)) for seed in (0, 0, 1))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    together = torch.cat([split.x for split in one.splits])
    assert torch.equal(together.sort(0).values, torch.from_numpy(X).sort(0).values)


def test_split_by_name():
    data = load(Digits())
    assert data.split("test") is data.test
    refused("got 'tets' .did you mean 'test'", data.split, "tets", error=DeclarationError)


def test_to_moves_every_tensor():
    moved = load(Digits(binarize="dynamic")).to("meta")
    assert moved.train.raw is not None
    assert {moved.train.x.device.type, moved.train.raw.device.type, moved.test.x.device.type} == {"meta"}


def test_tensors_are_copied_and_become_float32():
    x = torch.rand(30, 2, dtype=torch.float64)
    data = Dataset.from_tensors(x, validation=x[:5] + 1, test=(x[:4] + 2))
    before = data.train.x.clone()
    x.zero_()
    assert torch.equal(data.train.x, before)
    assert [len(split) for split in data.splits] == [30, 5, 4]
    assert data.train.x.dtype == torch.float32
    assert Dataset.from_tensors(torch.rand(20, 2, dtype=torch.bfloat16)).train.x.dtype == torch.float32


def test_a_missing_split_is_a_tenth_of_train():
    data = Dataset.from_tensors(X, Y, test=(X[:3] / 2, Y[:3]), label_names=("a", "b", "c"))
    assert [len(split) for split in data.splits] == [36, 4, 3]
    assert data.label_names == ("a", "b", "c")


def of_x(**declared: Any) -> Dataset:
    return Dataset.from_tensors(X, declared=TensorSource(**declared))


BROKEN: list[tuple[Callable[[], Dataset], str]] = [
    (lambda: Dataset.from_tensors(torch.empty(0, 3)), "at least one row"),
    (lambda: Dataset.from_tensors(X, validation=X[:0]), "validation: expected an array .* at least one row"),
    (lambda: Dataset.from_tensors(X[:2]), "at least 3 rows to split; got 2"),
    (lambda: Dataset.from_tensors(X[:1], validation=X[:2], test=X[:3]), "all 4 are constant over its 1 rows"),
    (lambda: Dataset.from_tensors(np.ones((20, 3))), "all 3 are constant"),
    (lambda: Dataset.from_tensors(X, Y[:-1]), r"one for each of 40 rows; got shape \(39,\)"),
    (lambda: Dataset.from_tensors(X, Y + 0.5), "expected integers; got [0-9.]*5 in row 0"),
    (lambda: Dataset.from_tensors(X, Y, test=X), "some in train and none in test"),
    (lambda: Dataset.from_tensors(X, test=X[:, :2]), r"test: expected rows of shape \(4,\), as in train; got \(2,"),
    (lambda: Dataset.from_tensors(X[:, 0]), r"Set shape = \[1\]"),
    (lambda: Dataset.from_tensors(["a", "b"]), "expected real numbers"),
    (lambda: Dataset.from_tensors([[1.0], [1.0, 2.0]]), "train: expected an array"),
    (lambda: Dataset.from_tensors(torch.zeros(9, 2, dtype=torch.complex64)), "expected real numbers"),
    (lambda: load(TensorSource()), "Pass data="),
    (lambda: of_x(scale="unit"), "or unsigned bytes; got float32"),
    (lambda: of_x(scale="standardise", binarize="static"), r"got -\d"),
    (lambda: of_x(splits=Splits(train=(0, 10))), "validation, test missing"),
    (lambda: load(Digits(shape=(7, 9))), r"expected 64 values.*\[7, 9\], which is 63"),
    (lambda: load(Digits(splits=Splits(train=(5, 5)))), r"splits.train: expected start < stop; got \[5, 5\], which is"),
    (lambda: load(Digits(splits=Splits(test=(1700, 1798)))), r"splits.test: expected rows in \[0, 1797\]; got \[1700"),
    (lambda: load(Digits(splits=Splits(train=(-3, 10)))), r"splits.train: expected rows in"),
    (lambda: load(Digits(splits=Splits(train=(0, 1200)))),
     r"\[0, 1200\] and validation = \[1000, 1350\] \(the source's own\). Declare both"),
    (lambda: load(Digits(splits=Splits(validation=(0, 10), train=(9, 20)))),
     r"train = \[9, 20\] and validation = \[0, 10\]"),
    (lambda: load(Digits(scale="raw", binarize="threshold")),
     r'values in \[0, 1\]; got 1[56] in validation. Use scale = "unit"'),
]  # fmt: skip


@pytest.mark.parametrize(("call", "match"), BROKEN)
def test_broken_tensors(call: Callable[[], Dataset], match: str):
    """FAULTS 20, 24 and 25."""
    refused(match, call)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite(value: float):
    """FAULTS 19."""
    x = X.astype(np.float64)
    x[7, 2] = x[9, 1] = value
    refused(r"test: expected finite .* in row 7, column 2 \(2 such", Dataset.from_tensors, X, test=x)
    refused(r"row 7, column \(1, 0\)", Dataset.from_tensors, x.reshape(40, 2, 2))


def test_rows_shared_between_splits_are_noted():
    """FAULTS 25."""
    data = Dataset.from_tensors(X, validation=X[:5] + 1, test=np.concatenate([X[:3], X[:2] + 2]))
    assert data.notes == ("3 of 5 rows of test also occur in train",)
    parts = {"train": np.array([0, 1]), "test": np.array([2, 3])}
    assert shared_rows(np.array([[1.0], [2.0], [2.0], [3.0]]), parts, "test") == 1


def test_constant_features_are_noted():
    """FAULTS 24."""
    assert "3 of 64 features are constant in train" in load(Digits()).notes


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (constraints.unit_interval, 1.5),
        (constraints.boolean, 0.5),
        (constraints.nonnegative_integer, -1.0),
        (constraints.independent(constraints.unit_interval, 1), 2.0),
    ],
)
def test_support_names_the_first_value_outside(constraint: constraints.Constraint, value: float):
    """FAULTS 20."""
    x = np.tile([[0.0, 1.0], [1.0, 0.0]], (15, 1))
    bad = x.copy()
    bad[11, 1] = value
    Dataset.from_tensors(x).require_support(constraint, "")
    with pytest.raises(DataError, match=rf"test, row 11, element \(1,\): expected .*; got {value:g}. Use a hint"):
        Dataset.from_tensors(x, test=bad).require_support(constraint, "Use a hint")


def test_support_of_raw_pixels():
    """FAULTS 20."""
    with pytest.raises(DataError, match=r"train, row 0, element \(0, 0, 2\): expected .*0.0.*1.0.*; got 5"):
        load(Digits(scale="raw")).require_support(constraints.unit_interval, 'Set data.scale = "unit".')


def test_another_process_imports_no_torch_with_the_package_and_finds_the_same_fingerprint():
    code = """
import sys, pvae.data, pvae.data.rows.columns
print([m for m in ("torch", "numpy") if m in sys.modules])
print(pvae.data.load(pvae.data.Digits(binarize="dynamic")).fingerprint)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["[]", load(Digits(binarize="dynamic")).fingerprint]


def test_fingerprint_changes_with_one_value():
    def fingerprint(x: np.ndarray = X, y: np.ndarray = Y, **declared: Any) -> str:
        return Dataset.from_tensors(x, y, declared=TensorSource(**declared)).fingerprint

    pixel, label = X.copy(), Y.copy()
    pixel[39, 3] += 1e-3
    label[0] = 2
    prints = [fingerprint(), fingerprint(pixel), fingerprint(y=label), fingerprint(shape=(2, 2))]
    assert len(set(prints)) == 4
    assert fingerprint() == prints[0]


def test_every_public_name_is_there():
    import pvae.data as room

    assert dir(room) == sorted(room.__all__)
    assert all(getattr(room, name).__name__ == name for name in room.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Datset'"):
        room.Datset  # noqa: B018
