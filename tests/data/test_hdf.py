"""HDF5, MATLAB and AnnData files: axes, splits, sparse matrices, old formats, and what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
import scipy.io
import torch
from scipy import sparse

from pvae.data import H5ad, Hdf5, Mat, load
from pvae.data.rows.files import FileArray, Stored
from pvae.data.sources.hdf import CsrRows
from tests.data.writers import FLOATS, NAMES, RNG, ROWS, Y, h5ad, hdf5, matlab, refused

IMAGES = RNG.randint(0, 256, (ROWS, 4, 5, 3)).astype(np.uint8)
COUNTS = sparse.csr_array(RNG.poisson(0.3, (ROWS, 7)).astype(np.float32))
LAST = np.moveaxis(IMAGES, 0, -1)


def every(rows: Any) -> np.ndarray:
    return np.asarray(rows.x[:])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["5", "7.3", "hdf5"])
@pytest.mark.parametrize("axis", ["first", "last"])
def test_rows_along_the_first_or_the_last_axis(tmp_path, version, axis, stream):
    x = IMAGES if axis == "first" else LAST
    path = tmp_path / "x.mat"
    if version == "5":
        scipy.io.savemat(path, {"X": x, "y": Y}, do_compression=True)
    else:
        (matlab if version == "7.3" else hdf5)(path, X=x, y=Y)
    source = (Hdf5 if version == "hdf5" else Mat)(path=str(path), y="y", rows=axis, stream=stream)
    rows = source.read(None, 0)
    assert isinstance(rows.x, Stored) == stream
    assert np.array_equal(every(rows), IMAGES)
    assert np.array_equal(rows.y, Y)


def test_splits_and_what_is_not_read(tmp_path):
    path = hdf5(tmp_path / "x.h5", train_images=IMAGES, val_images=IMAGES[:9], other=FLOATS, **{"deep/x": FLOATS})
    data = load(Hdf5(path=path))
    assert len(data.validation) == 9
    assert "x.h5: arrays that are not read: deep/x, other" in data.notes


def test_words_of_matlab_are_labels(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"x": FLOATS, "y": np.take(NAMES, Y)})
    assert load(Mat(path=str(tmp_path / "x.mat"), y="y")).label_names == NAMES


def test_sparse_matrices_of_matlab(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"x": COUNTS.tocsc()})
    assert np.array_equal(every(Mat(path=str(tmp_path / "x.mat")).read(None, 0)), COUNTS.toarray())


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("stream", [False, True])
def test_cells_dense_and_sparse(tmp_path, form, stream):
    x = COUNTS.toarray() if form == "dense" else COUNTS.asformat(form)
    obs = pandas.DataFrame({"kind": pandas.Categorical(np.take(NAMES, Y), categories=NAMES[::-1])})
    path = h5ad(tmp_path / "x.h5ad", FLOATS, obs, raw=x)
    rows = H5ad(path=path, layer="raw", labels="kind", stream=stream).read(None, 0)
    assert np.array_equal(every(rows), COUNTS.toarray())
    for index in (slice(5, 9), np.array([0, 59]), np.array([3, 4, 6]), np.array([], int)):
        assert np.array_equal(rows.x[index], COUNTS.toarray()[index])
    assert rows.label_names == NAMES[::-1]  # an order of the file's own
    assert np.array_equal(np.take(rows.label_names, rows.y), np.take(NAMES, Y))
    assert rows.notes == ("x.h5ad: matrices that are not read: X",)


def old_obs(path: Path, how: str) -> None:
    """Write the column `kind` as older versions of AnnData did."""
    with h5py.File(path, "r+") as file:
        words = [name.encode() for name in NAMES]
        del file["obs"]
        if how == "0.7":
            file["obs/__categories/kind"] = words
            file["obs/kind"] = Y.astype(np.int8)
            file["obs/kind"].attrs["categories"] = file["obs/__categories/kind"].ref
        else:
            file["obs/kind/values"], file["obs/kind/mask"] = Y, np.zeros(ROWS, bool)


@pytest.mark.parametrize("how", ["0.7", "nullable integers"])
def test_columns_of_older_versions(tmp_path, how):
    path = h5ad(tmp_path / "x.h5ad", FLOATS, pandas.DataFrame({"kind": Y}))
    old_obs(Path(path), how)
    rows = H5ad(path=path, labels="kind").read(None, 0)
    assert np.array_equal(rows.y, Y)
    assert rows.label_names == (NAMES if how.startswith("0") else None)


def linked(path: Path) -> None:
    """Put links of both kinds, and a data set whose values lie in another file, beside the rows."""
    (path.parent / "secret.bin").write_bytes(FLOATS.tobytes())
    hdf5(path.parent / "other.h5", x=FLOATS)
    with h5py.File(path, "w") as file:
        file["there"] = h5py.ExternalLink("other.h5", "x")
        file["soft"] = h5py.SoftLink("/there")
        file.create_dataset(
            "out", FLOATS.shape, FLOATS.dtype, external=[(str(path.parent / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
        )
        layout = h5py.VirtualLayout(FLOATS.shape, FLOATS.dtype)
        layout[:] = h5py.VirtualSource(str(path.parent / "other.h5"), "x", FLOATS.shape)
        file.create_virtual_dataset("virtual", layout)


@pytest.mark.parametrize("name", ["there", "soft", "out", "virtual"])
@pytest.mark.parametrize("source", [Hdf5, Mat])
def test_nothing_outside_the_file_is_read(tmp_path, name, source):
    linked(tmp_path / "x.h5")
    said = "expected data in this file; got (a link|data stored in other files)"
    refused(said, load, source(path=str(tmp_path / "x.h5"), x=name))


@pytest.mark.parametrize("name", ["there", "soft", "out", "virtual"])
def test_no_layer_outside_the_file_is_read(tmp_path, name):
    linked(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file.create_group("layers")
        for key in ("there", "soft", "out", "virtual"):
            file.move(key, f"layers/{key}")
    refused("expected data in this file; got", load, H5ad(path=str(tmp_path / "x.h5"), layer=name))


def garbled(path: Path, size: int) -> str:
    content = bytearray(Path(hdf5(path, x=FLOATS)).read_bytes())
    path.write_bytes(content[:size])
    return str(path)


EMPTY = pandas.DataFrame(index=range(ROWS))

BAD = {
    "no HDF5": (lambda p: p.write_bytes(b"x" * 999), Hdf5, {}, "expected an HDF5 file; got a broken or foreign file"),
    "cut": (lambda p: garbled(p, 1500), Hdf5, {}, "expected an HDF5 file; got a broken or foreign file"),
    "no MATLAB": (lambda p: p.write_bytes(b"x" * 999), Mat, {}, "expected a MATLAB file .*; got a broken or foreign"),
    "words": (lambda p: hdf5(p, x=["a", "b"]), Hdf5, {}, "expected an array of real numbers; got object"),
    "complex": (lambda p: hdf5(p, x=FLOATS * 1j), Hdf5, {}, "expected an array of real numbers; got complex"),
    "no rows": (lambda p: matlab(p, x=np.zeros((3, 0))), Mat, {}, r"at least one row; got shape \(0, 3\)"),
    "cells": (lambda p: scipy.io.savemat(p, {"x": np.array([FLOATS, "a"], object)}), Mat, {}, "got cells or structs"),
    "another name": (lambda p: hdf5(p, xs=FLOATS), Hdf5, {"x": "x"}, "expected an array 'x'; got xs .did you mean"),
    "no layer": (lambda p: h5ad(p, FLOATS, EMPTY), H5ad, {"layer": "raw"}, "expected 'layers/raw'; got X, obs"),
    "no column": (lambda p: h5ad(p, FLOATS, EMPTY.assign(a=Y)), H5ad, {"labels": "b"}, "a column of obs, a; got 'b'"),
    "no matrix": (lambda p: hdf5(p, **{"X/data": FLOATS}), H5ad, {}, "a matrix, dense, CSR or CSC; got a group"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_and_foreign_files_are_refused(tmp_path, name):
    write, source, options, said = BAD[name]
    write(tmp_path / "x.dat")
    refused(said, load, source(path=str(tmp_path / "x.dat"), **options))


def test_a_damaged_heap_of_texts_is_refused_in_time(tmp_path: Path) -> None:
    """A loop of libhdf5 without end, which answers no signal: an object that is empty and has no number."""
    path = tmp_path / "x.h5ad"
    content = bytearray(Path(h5ad(path, COUNTS, EMPTY)).read_bytes())
    first = content.index(b"GCOL") + 16
    content[first : first + 16] = bytes(16)
    path.write_bytes(content)
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        refused("got one with a damaged heap of texts", load, H5ad(path=str(path)))
        os._exit(65)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 65


@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
@pytest.mark.parametrize("stream", [False, True])
def test_damaged_sparse_matrices_are_refused(tmp_path, part, stream):
    path = h5ad(tmp_path / "x.h5ad", COUNTS, pandas.DataFrame())
    with h5py.File(path, "r+") as file:
        values = file["X"][part][...]
        del file["X"][part]
        file["X"][part] = np.append(values[:-1], 10**6) if part == "indices" else values[:-2]
    refused("expected", load, H5ad(path=path, stream=stream))


def test_rows_of_a_sparse_file_are_not_made_dense_at_once(tmp_path, monkeypatch):
    """FAULTS 45 (data)."""
    path = h5ad(tmp_path / "x.h5ad", COUNTS, pandas.DataFrame())
    rows = H5ad(path=path, stream=True).read(None, 0)
    assert isinstance(rows.x, CsrRows)
    read: list[slice] = []
    plain = FileArray.read

    def reading(array: FileArray, index: Any) -> Any:
        read.append(index)
        return plain(array, index)

    monkeypatch.setattr(FileArray, "read", reading)
    assert torch.equal(torch.from_numpy(rows.x[7:9]), torch.from_numpy(COUNTS.toarray()[7:9]))
    assert max(s.stop - s.start for s in read) == COUNTS.indptr[9] - COUNTS.indptr[7]
