"""Data in Python objects: torch data sets, sparse matrices, AnnData and its like."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.utils.data import DataLoader, Dataset as TorchDataset, IterableDataset, Subset, TensorDataset

import pvae
from pvae.data import Dataset, Npy, TensorSource, load
from pvae.data.rows.cache import cache_folder
from pvae.data.rows.files import Index, SparseRows
from pvae.data.sources.python import Spool
from pvae.errors import DataError, StorageError
from pvae.runs.run import Run
from tests.data.writers import FLOATS, NAMES, RNG, ROWS, SMALL, Y, assert_same, npy, refused


class Counting(IterableDataset[Any]):
    """An iterable data set that counts how often it was gone through."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.times = items, 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return iter(self.items)


def listed(items: list[Any]) -> TorchDataset[Any]:
    """Return a map-style data set."""
    return Subset(items, range(len(items)))  # type: ignore[arg-type]


XT, YT = torch.from_numpy(FLOATS), torch.from_numpy(Y)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(XT, YT),
        listed([(x, int(y)) for x, y in zip(FLOATS, Y, strict=True)]),
        Counting([[x.tolist(), y] for x, y in zip(XT, YT, strict=True)]),
        Counting([{"x": x, "y": y[None]} for x, y in zip(XT, YT, strict=True)]),
    ],
)
def test_torch_datasets(dataset: TorchDataset[Any], stream: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pvae.data.sources.python.PIECE_BYTES", 1000)  # several blocks
    data, wanted = Dataset.from_torch(dataset, stream=stream, label_names=NAMES), Dataset.from_tensors(FLOATS, Y)
    assert_same(data, wanted)
    assert data.label_names == NAMES
    assert not isinstance(dataset, Counting) or dataset.times <= 2  # once for each value of `stream`


def test_torch_datasets_without_labels_and_with_splits():
    bare, single = Dataset.from_torch(listed(list(XT))), Dataset.from_torch(TensorDataset(XT))
    assert bare.fingerprint == single.fingerprint == Dataset.from_tensors(FLOATS).fingerprint
    for stream in (False, True):
        data = Dataset.from_torch(listed(list(XT)), test=listed(list(XT[:7] + 1)), stream=stream)
        assert [len(split) for split in data.splits] == [54, 6, 7]
        assert torch.equal(data.test.x, XT[:7] + 1)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (DataLoader(TensorDataset(XT)), "train: expected a dataset; got a DataLoader, which batches it. Pass its .da"),
        (listed([]), "train: expected a dataset of at least one item; got none"),
        (listed([XT[0], XT[1, :3]]), r"item 1: expected \(5,\) float32, as item 0; got \(3,\) float32"),
        (listed([XT[0], XT[1].double()]), r"item 1: expected \(5,\) float32, as item 0; got \(5,\) float64"),
        (listed([(x, 1, 2) for x in XT]), r"item 0: expected x, \(x, y\) or a mapping; got 3 values. Wrap"),
        (listed([{"image": x} for x in XT]), 'item 0: expected "x" and perhaps "y"; got image'),
        (listed([(XT[0], 1), (XT[1], None)]), "a label with every item or with none; got 1 with 2 items"),
        (listed([(x, 0.5) for x in XT]), "expected integers; got 0.5 in row 0"),
        (listed([(x, x) for x in XT]), r"one for each of 60 rows; got shape \(60, 5\)"),
        (listed([x / 0 for x in XT]), "expected finite numbers; got .*inf in row 0"),
        (listed(list("abc" * 9)), "expected real numbers"),
        (TorchDataset(), "expected a torch Dataset with a length, or an IterableDataset"),
    ],
)
def test_broken_torch_datasets(dataset: Any, match: str):
    for stream in (False, True):
        refused(match, Dataset.from_torch, dataset, stream=stream)


def test_torch_datasets_larger_than_memory(monkeypatch: pytest.MonkeyPatch):
    """FAULTS 45 (data)."""
    monkeypatch.setattr("pvae.util.memory.total_memory", lambda: 1000)
    with pytest.raises(DataError, match="got .60, 5. float32, which need .* Pass stream=True to Dataset.from_torch"):
        Dataset.from_torch(TensorDataset(XT))
    refused(r"train: expected rows that fit .* Pass a torch Dataset and stream=True", Dataset.from_tensors, XT)
    assert len(Dataset.from_torch(TensorDataset(XT), stream=True).train) == 48


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_spool_leaves_nothing_behind():
    gc.collect()  # what other tests have left
    before = open_files()
    data = Dataset.from_torch(TensorDataset(XT), stream=True, declared=TensorSource(shape=(5, 1)))
    assert list(cache_folder().iterdir()) == []
    assert open_files() > before
    assert torch.equal(data.train.rows[:2], data.train.x[:2])
    del data
    gc.collect()
    assert open_files() == before


class Full:
    """A file on a full disk."""

    def write(self, content: Any) -> int:
        raise OSError(28, "No space left on device")

    def close(self) -> None: ...


def test_a_spool_on_a_full_disk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(StorageError, match="expected room for the rows; got .*No space left"):
        Dataset.from_torch(TensorDataset(XT), stream=True)


COUNTS = RNG.poisson(0.3, (ROWS, 7))

GROUPS = pd.Categorical(np.take(["cow", "ant", "bee"], Y), categories=["cow", "ant", "bee", "none"])


def annotated(x: Any, **layers: Any) -> Any:
    obs = pd.DataFrame({"group": GROUPS, "number": Y, "name": np.take(NAMES, Y), "score": Y / 2})
    obs["gap"] = obs["group"].where(obs["number"] > 0)
    return SimpleNamespace(X=x, obs=obs, layers=layers)


@pytest.fixture
def backed(tmp_path: Path) -> Iterator[h5py.Dataset]:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        yield file.create_dataset("x", data=COUNTS)


def test_annotated_matrices_dense_sparse_and_backed(backed: h5py.Dataset):
    declared = TensorSource(shape=(7, 1))
    wanted = Dataset.from_tensors(COUNTS, Y, declared=declared)
    for x in (COUNTS, torch.from_numpy(COUNTS), sparse.csr_matrix(COUNTS), sparse.csc_array(COUNTS), backed):
        data = Dataset.from_anndata(annotated(x), labels="group", declared=declared)
        assert_same(data, wanted)
        assert data.label_names == ("cow", "ant", "bee", "none")


def test_rows_far_apart_in_a_backed_matrix(backed: h5py.Dataset):
    from pvae.data.sources.python import Sliced

    for index in (np.array([0, 59]), np.array([3, 4, 6]), np.array([], int), slice(5, 9)):
        assert np.array_equal(Sliced(backed).read(index), COUNTS[index])


def test_layers_and_other_columns():
    adata = annotated(None, raw=sparse.csr_matrix(COUNTS))
    assert Dataset.from_anndata(adata, layer="raw", labels="number").label_names is None
    named = Dataset.from_anndata(adata, layer="raw", labels="name")
    assert named.label_names == NAMES
    assert torch.equal(named.train.y, Dataset.from_tensors(COUNTS, Y).train.y)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Dataset.from_anndata(annotated(None)), "X: expected a matrix; got none. Name a layer"),
        (lambda: Dataset.from_anndata(annotated(COUNTS, raw=1), layer="rwa"), "got 'rwa' .did you mean 'raw'"),
        (lambda: Dataset.from_anndata(annotated(COUNTS), labels="grp"), "column of obs, group, .* got 'grp' .did you"),
        (lambda: Dataset.from_anndata(annotated(COUNTS), labels="gap"), "label for every row; got none for 20. Drop"),
        (lambda: Dataset.from_anndata(annotated(COUNTS), labels="score"), "categories, names or integers; got float64"),
        (lambda: Dataset.from_anndata(annotated(sparse.csr_matrix((0, 7)))), r"at least one row; got shape \(0, 7\)"),
        (lambda: Dataset.from_anndata(annotated(COUNTS[1:]), labels="group"), r"one for each of 59 rows; got shape"),
        (lambda: Dataset.from_tensors(sparse.coo_array(COUNTS[0])), r"matrix \(rows, features\); got shape \(7,\)"),
    ],
)
def test_broken_annotated_matrices(call: Callable[[], Dataset], match: str):
    """FAULTS 24, 25."""
    refused(match, call)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_sparse_values_that_are_not_finite(value: float):
    """FAULTS 19."""
    dense = COUNTS.astype(float)
    dense[5, 3] = value
    with pytest.raises(DataError, match="X: expected finite numbers; got .* in row 5, column 3"):
        Dataset.from_anndata(annotated(sparse.csr_matrix(dense)))


def test_a_backed_file_that_was_closed(tmp_path: Path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = Dataset.from_anndata(annotated(file.create_dataset("x", data=COUNTS)))
    with pytest.raises(DataError, match="Expected the rows of an open file; got"):
        data.train.rows[:2]


class Watched(SparseRows):
    """Sparse rows that know how many values were ever dense at once."""

    largest = 0

    def read(self, index: Index) -> Any:
        rows = super().read(index)
        Watched.largest = max(Watched.largest, rows.size)
        return rows


def test_a_fit_on_sparse_counts_never_makes_them_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pvae.data.rows.rows.CHUNK_ELEMENTS", 2**16)
    counts = sparse.random_array((3000, 200), density=0.05, rng=np.random.default_rng(0), data_sampler=None)
    data = Dataset.of(Watched(counts))
    overrides = (*SMALL, "train.batch_size=500", "data={source='tensor'}", "decoder.likelihood.kind=normal")
    run = pvae.fit("vae", *overrides, data=data, run_dir=tmp_path, device="cpu", progress=False)
    assert np.isfinite(run.metrics["elbo"]).all()
    assert 0 < Watched.largest <= 2**17 < counts.shape[0] * counts.shape[1]


def test_fit_and_load_take_whatever_holds_data(tmp_path: Path):
    """A tensor, an array, torch's data set, AnnData, a `Dataset`: the same run, opened again with any of them."""
    x = COUNTS.astype(np.float32)
    holders = {
        "tensor": torch.from_numpy(x),
        "array": x,
        "torch": TensorDataset(torch.from_numpy(x)),
        "anndata": annotated(x),
        "dataset": Dataset.from_tensors(x),
    }
    overrides = (*SMALL, "data={source='tensor'}", "decoder.likelihood.kind=normal")
    for name, data in holders.items():
        run = pvae.fit("vae", *overrides, name=name, data=data, run_dir=tmp_path, device="cpu", progress=False)
        assert run.data.fingerprint == holders["dataset"].fingerprint
    for data in holders.values():
        assert Run.load(run.path, data=data).data.fingerprint == run.data.fingerprint


def test_spools_and_files_are_reshaped_in_place(tmp_path: Path):
    data = Dataset.from_torch(TensorDataset(XT), stream=True, declared=TensorSource(shape=(1, 5)))
    assert data.train.rows[:3].shape == (3, 1, 5)
    assert isinstance(data.train.rows.blocks.rows.x, Spool)  # type: ignore[union-attr]
    path = npy(tmp_path / "x.npy", FLOATS)
    assert torch.equal(load(Npy(path=path, stream=True, shape=(1, 5))).train.x, data.train.x)
