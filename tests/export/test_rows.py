"""Rows that leave pvae: every format read back by its own library, names of columns, memory, failures."""

import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch

from pvae.analysis.export import rows
from pvae.analysis.export.rows import Origin, Part, write
from pvae.data import Dataset
from pvae.errors import DeclarationError, MissingExtraError, OutputError

N = 50
LATENTS = {"latents/z": (3,), "log_q/z": (), "scale/z": (3,)}
FRAME = pd.DataFrame(
    {"size": np.exp(np.random.default_rng(0).normal(size=40)), "kind": ["a", "b"] * 20, "visits": [1, 2, 3, 4] * 10}
)
COLUMNS = {
    "size": {"type": "continuous", "transform": "log"},
    "kind": {"type": "categorical", "levels": ["a", "b"]},
    "visits": {"type": "count"},
}


def part_of(shapes: dict[str, tuple[int, ...]], n: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(n, *tail, generator=generator) for key, tail in shapes.items()}


def in_parts(whole: Part, size: int = 20) -> list[dict[str, torch.Tensor]]:
    return [{key: t[i : i + size] for key, t in whole.items()} for i in range(0, N, size)]


@pytest.fixture
def origin() -> Origin:
    ids = np.array([f"c\u00e9ll,{i}" for i in range(N)])
    splits, labels = np.array(["train", "test"] * (N // 2)), np.array(["T-shirt", "=1+1"] * (N // 2))
    return Origin({"id": ids, "row": np.arange(N) * 2, "split": splits, "label": labels})


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_tables_read_back_are_the_frame(ending: str, origin: Origin, tmp_path: Path) -> None:
    whole = part_of(LATENTS)
    path = tmp_path / f"codes{ending}"
    write(path, in_parts(whole), origin)
    found = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
    names = ["z0", "z1", "z2", "log_q_z", "scale_z0", "scale_z1", "scale_z2"]
    assert list(found.columns) == ["id", "row", "split", "label", *names]
    pd.testing.assert_frame_equal(found[names].astype(np.float32), next(origin.frames([whole]))[names])
    for name, values in origin.columns.items():
        assert found[name].tolist() == values.tolist()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if ending == ".parquet":
        assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3


def test_npz_read_back_is_the_arrays(origin: Origin, tmp_path: Path) -> None:
    whole = part_of(LATENTS)
    write(tmp_path / "codes.npz", in_parts(whole), origin)
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as file:
        assert set(file) == {*whole, "id", "row", "split", "label"}
        for key, t in whole.items():
            np.testing.assert_array_equal(file[key], t)
        for key, values in origin.columns.items():
            np.testing.assert_array_equal(file[key], values)


def test_h5ad_read_back_has_latents_scores_and_layers(origin: Origin, tmp_path: Path) -> None:
    whole = part_of({**LATENTS, "x": (2, 2)})
    write(tmp_path / "codes.h5ad", in_parts(whole), origin)
    found = anndata.read_h5ad(tmp_path / "codes.h5ad")
    assert found.obs_names.tolist() == origin.columns["id"].tolist()
    assert found.obs["label"].tolist() == origin.columns["label"].tolist()
    np.testing.assert_array_equal(found.obsm["X_pvae"], whole["latents/z"])
    np.testing.assert_array_equal(found.obs["pvae_log_q_z"], whole["log_q/z"])
    np.testing.assert_array_equal(found.obsm["pvae_scale_z"], whole["scale/z"])
    np.testing.assert_array_equal(found.layers["pvae_x"], whole["x"].flatten(1))


def test_h5ad_of_codes_alone_has_no_variables(origin: Origin, tmp_path: Path) -> None:
    write(tmp_path / "codes.h5ad", in_parts(part_of(LATENTS)), origin)
    found = anndata.read_h5ad(tmp_path / "codes.h5ad")
    assert found.n_vars == 0
    assert "X_pvae" in found.obsm


@pytest.mark.parametrize("few", [False, True])
def test_h5ad_keeps_all_of_the_file_that_the_rows_are_from(few: bool, tmp_path: Path) -> None:
    names = pd.Index([f"cell{i}" for i in range(N)], dtype=object)  # anndata 0.12 writes no text of pandas 3
    given = anndata.AnnData(
        np.random.default_rng(0).poisson(2, (N, 4)).astype(np.float32),
        obs=pd.DataFrame({"batch": np.arange(N), "pvae_elbo": 0.0}, index=names),
        var=pd.DataFrame(index=pd.Index(list("abcd"), dtype=object)),
        uns={"about": "counts"},
        obsm={"X_pca": np.ones((N, 2))},
    )
    given.write_h5ad(tmp_path / "cells.h5ad")
    at = np.arange(0, N, 5) if few else np.arange(N)
    whole = part_of({"latents/z": (3,), "elbo": (), "x": (4,)}, len(at))
    origin = Origin({"id": names[at].to_numpy().astype(str), "row": at, "label": np.full(len(at), "other")})
    write(tmp_path / "codes.h5ad", [whole], origin, tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "codes.h5ad")
    np.testing.assert_array_equal(found.X, given.X)
    assert found.obs_names.tolist() == names.tolist()
    assert found.obs.columns.tolist() == ["batch", "pvae_elbo"]
    assert found.uns["about"] == "counts"
    assert set(found.obsm) == {"X_pca", "X_pvae"}
    for values, t in (
        (found.obsm["X_pvae"], "latents/z"),
        (found.obs["pvae_elbo"], "elbo"),
        (found.layers["pvae_x"], "x"),
    ):
        values = np.asarray(values)
        np.testing.assert_array_equal(values[at], whole[t])
        assert np.isnan(np.delete(values, at, 0)).all()


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".h5ad"])
def test_rows_of_a_table_leave_in_its_units_and_words(ending: str, tmp_path: Path) -> None:
    data = Dataset.from_frame(FRAME, COLUMNS)
    x = torch.cat([split.x for split in data.splits])
    # counts of which the first part is whole and the second is not
    x[20:, 2] += 0.25
    origin = Origin({"row": np.arange(40)}, data.table)
    parts = [{"x": x[i : i + 20], "elements": x[i : i + 20], "latents/z": x[i : i + 20]} for i in (0, 20)]
    path = tmp_path / f"made{ending}"
    write(path, parts, origin)
    assert data.table is not None
    wanted = data.table.to_frame(x)
    if ending == ".h5ad":
        layer = anndata.read_h5ad(path)[:, "size"].layers["pvae_x"]
        np.testing.assert_allclose(layer[:, 0], wanted["size"], rtol=1e-6)
        return
    found = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
    names = ["elements size", "elements kind", "elements visits", "z0", "z1", "z2"]
    assert list(found.columns) == ["row", "size", "kind", "visits", *names]
    np.testing.assert_allclose(found["size"], wanted["size"], rtol=1e-6)
    assert found["kind"].tolist() == wanted["kind"].tolist()
    np.testing.assert_allclose(found["visits"], wanted["visits"])


def test_no_two_columns_have_one_name() -> None:
    found = next(
        Origin({"row": np.arange(N)}).frames([part_of({"latents/z": (12,), "latents/z1": (), "latents/row": ()})])
    )
    assert found.columns.is_unique
    assert found.columns[:2].tolist() == ["row_", "z_0"]
    alone = next(Origin().frames([part_of({"latents/z1": (2,), "x": (2, 2)})]))
    assert alone.columns.tolist() == ["z1_0", "z1_1", "x0_0", "x0_1", "x1_0", "x1_1"]


def test_results_without_an_entry_a_row_have_no_frame() -> None:
    with pytest.raises(DeclarationError, match=r"one entry a row; got a \[2\], b \[3\]. Save it as .npz"):
        next(Origin().frames([{"a": torch.zeros(2), "b": torch.zeros(3)}]))


def failing(problem: BaseException) -> Iterator[Part]:
    yield part_of(LATENTS, 20)
    raise problem


@pytest.mark.parametrize("ending", rows.WRITERS)
@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("no")], ids=["Ctrl-C", "error"])
def test_failures_leave_what_stood_there(ending: str, problem: BaseException, origin: Origin, tmp_path: Path) -> None:
    path = tmp_path / f"codes{ending}"
    path.write_text("before")
    with pytest.raises(type(problem)):
        write(path, failing(problem), origin)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_refusals(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked() -> Iterator[Part]:
        raise AssertionError
        yield {}

    with pytest.raises(DeclarationError, match=r"ends in .csv, .parquet, .npz, .h5ad; got '.xlsx'"):
        write(tmp_path / "codes.xlsx", unasked(), origin)
    with pytest.raises(OutputError, match="expected to be written; got No such file"):
        write(tmp_path / "missing" / "codes.csv", unasked(), origin)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Exception, match="a device, link or folder"):
        write(tmp_path / "folder.csv", unasked(), origin)
    monkeypatch.setattr("pvae.errors.find_spec", lambda _name: None)
    with pytest.raises(
        MissingExtraError, match=r"pyarrow; it is not installed. Run `pip install 'pvae-pyro\[parquet\]'"
    ):
        write(tmp_path / "codes.parquet", unasked(), origin)


@pytest.mark.parametrize("ending", [".npz", ".h5ad"])
def test_many_rows_take_little_memory(ending: str, tmp_path: Path) -> None:
    """40 MB in 200 parts, of which one at a time is in memory."""
    made = part_of({"latents/z": (500,)}, 100)
    parts = ({"latents/z": made["latents/z"] + i} for i in range(200))
    write(tmp_path / f"first{ending}", [made], Origin({"row": np.arange(100)}))  # imports
    tracemalloc.start()
    write(tmp_path / f"codes{ending}", parts, Origin({"row": np.arange(20_000)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20  # NumPy copies 16 MiB of a file at a time
    if ending == ".h5ad":
        with h5py.File(tmp_path / "codes.h5ad") as file:
            assert file["obsm/X_pvae"][-1, 0] == made["latents/z"][-1, 0] + 199


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_parts_of_a_table_are_forgotten(ending: str, tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def parts() -> Iterator[Part]:
        for _ in range(20):
            part = part_of(LATENTS, 10)
            alive.update(part.values())
            assert len(alive) <= 2 * len(LATENTS)
            yield part

    pool = pyarrow.total_allocated_bytes()
    write(tmp_path / f"codes{ending}", parts(), Origin({"row": np.arange(200)}))
    assert pyarrow.total_allocated_bytes() - pool < 2**20
