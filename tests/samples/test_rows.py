"""Rows through a fitted run: blocks with noise of their own, new data, ids, files of commands, two processes."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, operator, union-attr"

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch

import pvae
from pvae.analysis import encode, score
from pvae.analysis.samples import running as rows
from pvae.analysis.samples.running import RowBlocks
from pvae.runs.run import Run
from pvae.util import group, seeds
from tests.cli_runner import TINY
from tests.samples import models
from tests.samples.models import command

ROOT = Path(__file__).parents[2]
ENDINGS = (".csv", ".parquet", ".npz", ".h5ad")
ROWS = 300
TABLE = pd.DataFrame(
    {
        "customer": [f"{i:04}é" for i in range(ROWS)],
        "size": np.exp(np.random.default_rng(0).normal(size=ROWS)),
        "kind": np.random.default_rng(1).choice(["a", "b", "c"], ROWS),
        "bought": np.random.default_rng(2).choice(["no", "yes"], ROWS),
    }
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a table with ids and labels in words, whose file is gone."""
    folder = tmp_path_factory.mktemp("table")
    TABLE.to_csv(folder / "table.csv", index=False)
    data: dict[str, Any] = {"source": "csv", "path": str(folder / "table.csv"), "id": "customer", "label": "bought"}
    data["columns"] = {"size": {"type": "continuous", "transform": "log"}, "kind": {"type": "categorical"}}
    data["columns"]["kind"]["levels"] = ["a", "b", "c"]
    raw = {"name": "table", "data": data, "latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "columns"}}
    plan = pvae.Experiment.from_dict(raw).with_overrides(*TINY, "train.epochs=1")
    run = pvae.fit(plan, run_dir=folder / "runs", progress=False)
    shutil.copytree(run.path, folder / "elsewhere" / "table" / run.path.name)
    (folder / "table.csv").rename(folder / "new.csv")
    return Run.load("table", root=folder / "elsewhere")


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, pd.DataFrame]:
    """A run on a table with missing cells, and its rows."""
    rng, cells = np.random.default_rng(3), TABLE[["customer", "size", "kind"]].assign(visits=0.0)
    cells["visits"] = rng.poisson(3, ROWS).astype(float)
    for name in ("size", "kind", "visits"):
        cells.loc[rng.random(ROWS) < 0.2, name] = None
    types: dict[str, Any] = {"size": {"type": "continuous", "transform": "log"}, "visits": {"type": "count"}}
    types |= {"kind": {"type": "categorical", "levels": ["a", "b", "c"]}}
    data = {"source": "frame", "id": "customer", "columns": {n: {**t, "missing": "mask"} for n, t in types.items()}}
    raw = {"name": "messy", "data": data, "latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "columns"}}
    plan = pvae.Experiment.from_dict(raw).with_overrides(*TINY, "train.epochs=1")
    run = pvae.fit(plan, data=cells, run_dir=tmp_path_factory.mktemp("messy"), progress=False)
    run.score(cells[:1], samples=20)  # keeps the scores of the validation rows, of which the run alone knows nothing
    return run, cells


def test_blocks_have_noise_of_their_own(digits: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_ROWS", 100)
    split = digits.data.train
    found = digits.encode(split, seed=3)
    assert torch.equal(found["z"][:100], encode(digits, split.x[:100], seed=3)["z"])
    noise = (found["z"] - found.latents["z"].loc) / found.latents["z"].scale
    assert abs(np.corrcoef(noise[:100].flatten(), noise[100:200].flatten())[0, 1]) < 4 / np.sqrt(300)
    torch.testing.assert_close(digits.encode(split, mean=True)["z"], encode(digits, split.x, mean=True)["z"])
    alone = RowBlocks(encode, digits, split, torch.arange(len(split)), seed=3)[3]
    assert torch.equal(alone["z"], found["z"][300:400])
    # processes exchange tensors by name, in no order
    monkeypatch.setattr(group, "dealt", lambda n, work: [dict(reversed(work(i).items())) for i in range(n)])
    parts = list(RowBlocks(encode, digits, split, seed=3).parts())
    assert torch.equal(torch.cat([part["latents/z"] for part in parts]), found["z"])
    assert [*parts[0]] == [*found.tensors()]


def test_all_rows_share_the_global_latents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "BLOCK_ROWS", 10)
    pyro.clear_param_store()
    module = models.Global()
    pair = pvae.Pair(module.model, module.guide)
    run = pvae.fit(pair, "train.epochs=1", data=models.rows(100, 1), run_dir=tmp_path, progress=False)
    found = run.reconstruct(run.data.train)
    assert float((found.x - found.latents["z"]).std()) < 1e-5


def test_frames_have_ids_words_and_units(table: Run) -> None:
    new = TABLE.iloc[::-1].drop(columns="bought")
    found = table.to("cpu").reconstruct(new, mean=False).to_frame()
    assert found.index.tolist() == new["customer"].tolist()
    assert found.index.name == "id"
    assert found["row"].tolist() == list(range(ROWS))
    assert found.columns.tolist() == ["row", "split", "size", "kind", "log_p", "z0", "z1"]
    assert (found["size"] > 0).all()
    assert set(found["kind"]) <= {"a", "b", "c"}
    assert table.sample(5).to_frame().columns[:2].tolist() == ["size", "kind"]
    with pytest.raises(pvae.errors.DataError, match="kind"):
        table.encode(TABLE.drop(columns="kind"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_commands_write_new_rows_without_the_data_of_the_fit(ending: str, table: Run, tmp_path: Path) -> None:
    folder, out = table.path.parents[1], tmp_path / f"codes{ending}"
    line = f"encode table --data {folder.parent / 'new.csv'} --rows 50 --out {out} --json"
    record = command(folder, line)
    assert record[ending[1:]] == str(out)
    assert record["rows"] == 50
    chosen = seeds.subset(ROWS, 50, 0)
    split = table.rows(folder.parent / "new.csv")
    wanted = RowBlocks(encode, table, split, chosen).whole()
    ids, words = TABLE["customer"][chosen.numpy()].tolist(), TABLE["bought"][chosen.numpy()].tolist()
    if ending == ".npz":
        with np.load(out, allow_pickle=False) as file:
            np.testing.assert_array_equal(file["latents/z"], wanted["z"])
            assert (file["id"].tolist(), file["label"].tolist()) == (ids, words)
            np.testing.assert_array_equal(file["row"], chosen)
        return
    if ending == ".h5ad":
        found = anndata.read_h5ad(out)
        np.testing.assert_array_equal(found.obsm["X_pvae"], wanted["z"])
        assert (found.obs_names.tolist(), found.obs["label"].tolist()) == (ids, words)
        return
    found = pd.read_parquet(out) if ending == ".parquet" else pd.read_csv(out)
    np.testing.assert_array_equal(found[["z0", "z1"]].astype(np.float32), wanted["z"])
    assert (found["id"].tolist(), found["label"].tolist()) == (ids, words)
    assert found["split"].unique().tolist() == ["new"]


def test_commands_on_all_rows_name_their_splits(digits: Run, folder: Path, tmp_path: Path) -> None:
    command(folder, f"encode digits --split all --mean --out {tmp_path / 'all.csv'}")
    found, data = pd.read_csv(tmp_path / "all.csv"), digits.data
    assert found["row"].is_monotonic_increasing
    for split in data.splits:
        part = found[found["split"] == split.name]
        assert part["row"].tolist() == split.numbers.tolist()
        z = encode(digits, split.x, mean=True)["z"]
        np.testing.assert_allclose(part[["z0", "z1", "z2"]], z, rtol=1e-4, atol=1e-5)
        assert part["label"].astype(str).tolist() == split.words.tolist()


def test_cells_keep_their_file(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(2, (60, 5)).astype(np.float32)
    names = pd.Index([f"cell{i}" for i in range(60)], dtype=object)  # anndata 0.12 writes no text of pandas 3
    genes = pd.DataFrame(index=pd.Index(list("abcde"), dtype=object))
    cells = anndata.AnnData(counts, obs=pd.DataFrame({"batch": np.arange(60)}, index=names), var=genes)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    raw = {"name": "cells", "data": {"source": "h5ad", "path": str(tmp_path / "cells.h5ad")}}
    raw |= {"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "poisson"}}
    plan = pvae.Experiment.from_dict(raw).with_overrides(*TINY, "train.epochs=1")
    run = pvae.fit(plan, run_dir=tmp_path / "runs", progress=False)
    out = tmp_path / "made.h5ad"
    command(tmp_path / "runs", f"reconstruct cells --data {tmp_path / 'cells.h5ad'} --out {out}")
    found, made = anndata.read_h5ad(out), run.reconstruct(run.data.whole())
    np.testing.assert_array_equal(np.asarray(found.X), counts)
    assert found.obs["batch"].tolist() == list(range(60))
    assert found.obs_names.tolist() == names.tolist()
    np.testing.assert_allclose(found.layers["pvae_x"], made.x, rtol=1e-5)
    np.testing.assert_allclose(found.obs["pvae_log_p"], made.log_p, rtol=1e-5)


def test_commands_refuse_endings_and_folders(folder: Path, tmp_path: Path) -> None:
    assert "ends in .csv, .parquet" in command(folder, f"encode digits --out {tmp_path / 'codes.xlsx'}", code=2)
    assert "expected to be written" in command(folder, f"encode digits --out {tmp_path}/missing/codes.csv", code=73)
    assert not list(tmp_path.iterdir())


def test_shown_results_of_new_data_need_none_of_the_fit(table: Run) -> None:
    folder = table.path.parents[1]
    for name in ("encode", "reconstruct"):
        record = command(folder, f"{name} table --data {folder.parent / 'new.csv'} --rows 20 --json")
        assert record["npz"].endswith(f"{name}-new.npz")
        assert len(record["png"]) == 1


def by_processes(count: int, *arguments: str) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "pvae"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, *arguments], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_two_processes_write_the_file_of_one(ending: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3 * rows.BLOCK_ROWS + 7, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    raw = {"name": "long", "data": {"source": "npy", "path": str(tmp_path / "x.npy")}, "latents": {"z": {"dim": 2}}}
    plan = pvae.Experiment.from_dict({**raw, "decoder": {"likelihood": "normal"}})
    pvae.fit(plan.with_overrides(*TINY, "train.epochs=1"), run_dir=tmp_path / "runs", progress=False)
    files = [tmp_path / f"{count}{ending}" for count in (1, 2)]
    for count, file in enumerate(files, 1):
        where = ["--data", str(tmp_path / "x.npy"), "--run-dir", str(tmp_path / "runs"), "--out", str(file)]
        by_processes(count, "encode", "long", *where)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_scores_and_imputations_of_new_rows(ending: str, messy: tuple[Run, pd.DataFrame], tmp_path: Path) -> None:
    """Observed cells leave as they came, missing ones filled; scores are those of `score`."""
    run, cells = messy
    cells.to_csv(tmp_path / "new.csv", index=False)
    for name in ("score", "impute"):
        line = f"{name} messy --data {tmp_path / 'new.csv'} --samples 20 --out {tmp_path / name}{ending}"
        command(run.path.parents[1], line)
    if ending in (".npz", ".h5ad"):
        return
    read = pd.read_csv if ending == ".csv" else pd.read_parquet
    filled, scores = read(tmp_path / f"impute{ending}"), read(tmp_path / f"score{ending}")
    x = run.rows(cells).x
    np.testing.assert_allclose(scores["log_p"], score(run, x, samples=20).log_p, rtol=1e-5)
    assert {"elements size", "elements kind", "p_value", "khat", "ess"} <= set(scores)
    assert not filled[["size", "kind", "visits"]].isna().any().any()
    for name in ("size", "kind", "visits"):
        seen = cells[name].notna()
        assert (filled[f"missing {name}"] == ~seen).all()
        for column in (name, f"draw 0 {name}", f"draw 9 {name}"):
            if name == "kind":
                assert filled.loc[seen, column].tolist() == cells.loc[seen, name].tolist()
            else:
                np.testing.assert_allclose(filled.loc[seen, column], cells.loc[seen, name], rtol=1e-5)
    gone = filled[filled["missing size"]]
    assert ((gone["lower size"] <= gone["size"]) & (gone["size"] <= gone["upper size"])).all()


def test_masks_are_of_the_rows_of_their_block(digits: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_ROWS", 7)
    split = digits.data.test
    mask = torch.zeros(len(split), 1, 8, 8, dtype=torch.bool)
    mask[:10, :, 4:] = True
    found = digits.impute(split, mask=mask, draws=1, samples=5, sweeps=0)
    assert torch.equal(found.missing, mask)
    assert torch.equal(found.x[~mask], split.x[~mask])
