"""Searches: their ranges, trials shared by several workers, pruning, figures, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import pvae
from pvae.analysis.pages.study import validation_figure
from pvae.errors import DataError, DeclarationError, MissingExtraError
from pvae.experiment.experiment import Experiment
from pvae.runs.rundir import RunDirectory
from pvae.studies.cases import Declared
from pvae.studies.search import Searching
from pvae.studies.sweep import Measure
from pvae.studies.tasks import Task, work
from tests.cli_runner import run_cli
from tests.studies.test_study import MIXTURE, NORMAL, TABLE, problems

pytest.importorskip("optuna")
RANGES = {
    "latents": {"z": {"dim": {"low": 2, "high": 9, "log": True}}},
    "train.optimizer.lr": {"low": 1e-3, "high": 0.05, "log": True},
}
CHOICES = {"latents": {"z": {"prior": [NORMAL, MIXTURE]}}}


def declared(folder: Path, **settings: Any) -> Path:
    """A study file with a search of few rows."""
    file = folder / "tiny.toml"
    data = {**TABLE["data"], "splits": {"train": [0, 200], "validation": [1000, 1100], "test": [1300, 1350]}}
    paths = {} if {"ranges", "choices"} & settings.keys() else {"ranges": RANGES, "choices": CHOICES}
    search = {"trials": 4, "measure": {"rows": 50, "evidence": 5}, **paths, **settings}
    file.write_text(tomli_w.dumps({**TABLE, "data": data, "search": search}))
    return file


def opened(file: Path) -> Searching:
    found = Declared.load(file)
    assert found.search is not None
    return Searching(found.search, found.base, found.name, file.parent / "runs")


def order(of: Searching, number: int) -> dict[str, Any]:
    """Order for the worker of a trial."""
    setting: dict[str, Any] = {
        "run_dir": str(of.root), "data_dir": None, "device": "cpu", "threads": 1, "measure": {}, "allow_changes": False,
    }  # fmt: skip
    return {**Task((), search=of, number=number).order(setting, {}), "log": str(of.root / f"{number}.log")}


def test_ranges_are_tables_or_choices_at_dotted_paths(tmp_path):
    found = Declared.load(declared(tmp_path))
    assert found.cases == ()
    assert found.search is not None
    dim = found.search.ranges["latents.z.dim"]
    assert (dim.low, dim.high, dim.log) == (2, 9, True)
    assert found.search.choices == {"latents.z.prior": (NORMAL, MIXTURE)}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"ranges": {"latents.z.dim": {"low": 8, "high": 2}}}, "ranges.latents.z.dim: expected low < high; got 8"),
    "log": ({"ranges": {"train.optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "expected 0 < low < high; got"),
    "one end": ({"ranges": {"latents.z.dim": {"low": 8}}}, "ranges.latents.z.dim.high: expected"),
    "word": ({"ranges": {"latents.z.dim": {"low": 2, "hihg": 8}}}, "ranges.latents.z.dim.hihg"),
    "no range": ({"ranges": {"latents.z.dim": 8}}, "ranges.latents.z.dim: expected a valid dictionary"),
    "no choice": ({"choices": {"latents.z.dim": 8}}, "choices.latents.z.dim: expected a"),
    "none": ({"ranges": {}}, "search: expected ranges or choices; got neither."),
    "twice": ({"ranges": RANGES, "choices": {"latents.z.dim": [2]}}, "'latents.z.dim' of search.ranges"),
    "path": ({"choices": {"train.epoch": [1, 2]}}, "train.epoch: expected one of"),
    "value": (
        {"choices": {"latents.z.dim": [2, -1]}},
        "case 'latents.z.dim=-1': latents.z.dim: expected greater than 0; got -1.",
    ),
    "seed": ({"choices": {"seed": [1, 2]}}, "got 'seed'. Every trial has the file's seed."),
    "figure": ({"figure": "elbow"}, "search.figure: expected 'elbo', 'iwae', 'new_gain_upper' or 'bits_per_dimension'"),
    "trials": ({"trials": 0}, "search.trials: expected greater than or equal to 1; got 0."),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_search_is_named_before_anything_runs(tmp_path, case):
    changes, expected = BAD[case]
    with pytest.raises(DeclarationError) as caught:
        Declared.load(declared(tmp_path, **changes))
    assert expected in str(caught.value)
    assert "[sweep]" not in problems(tmp_path, {"sead": [1]})


def test_the_package_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("pvae.errors.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pvae-pyro\[search\]'"):
        pvae.study(declared(tmp_path), run_dir=tmp_path / "runs", progress=False)


def test_trials_are_recorded_once_and_a_dead_workers_is_gone_on_with(tmp_path):
    """A worker that died leaves its trial and its run; the next one resumes both, with the same values."""
    torch.set_num_threads(1)
    search = opened(declared(tmp_path, trials=3))
    trial = search.open(1)
    values = search.values(trial)
    again = opened(tmp_path / "tiny.toml").open(1)  # after the death of its process
    assert (again.number, search.values(again)) == (trial.number, values) == (0, values)
    assert search.open(0).number == 1
    search.root.mkdir(exist_ok=True)
    for number in range(3):
        work(order(search, number))
    assert [row["state"] for row in search.history()] == ["complete"] * 3
    for row in search.history():
        run = RunDirectory(Path(row["run"]))
        assert Experiment.from_toml(run.spec_text).latents["z"].dim == row["latents.z.dim"]
        assert row["value"] == max(m["elbo"] for m in run.metrics_rows() if m["split"] == "validation")
    out, _ = run_cli(
        "study", str(tmp_path / "tiny.toml"), "--run-dir", str(search.root), "--json", "--out", str(tmp_path / "page")
    )
    assert len(json.loads(out)["trials"]) == 3
    page = (tmp_path / "page" / "index.html").read_text()
    assert "is the best: elbo" in page
    assert "importance" in page


def test_a_trial_that_cannot_be_fitted_is_recorded_as_failed(tmp_path):
    search = opened(declared(tmp_path, choices={"train.optimizer.lr": [1e30]}, trials=1))
    search.root.mkdir()
    work(order(search, 0))
    (row,) = search.history()
    assert (row["state"], row["value"]) == ("fail", None)
    assert "not finite" in row["error"]


def test_a_poor_trial_is_pruned_by_its_validation_figures(tmp_path, monkeypatch):
    """It stops with a checkpoint, is recorded, and its run stays as it is."""
    file = declared(tmp_path, choices={"train.optimizer.lr": [0.01, 1e-9]}, trials=1)
    file.write_text(file.read_text().replace("epochs = 2", "epochs = 1000000"))
    search = opened(file)
    search.root.mkdir()
    monkeypatch.setattr("optuna.pruners.MedianPruner.prune", lambda _self, _study, trial: trial.last_step > 2)
    work(order(search, 0))
    (row,) = search.history()
    assert (row["state"], row["value"]) == ("pruned", None)
    (run,) = (search.root / "tiny-trial").iterdir()
    assert RunDirectory(run).status()["state"] == "interrupted"


def test_figures_are_of_validation_rows(tmp_path):
    run = pvae.fit(Experiment.from_dict(TABLE), run_dir=tmp_path, device="cpu", progress=False)
    measure = Measure(rows=60, evidence=20)
    found = {name: validation_figure(run, name, measure) for name in ("elbo", "iwae", "bits_per_dimension")}
    assert found["iwae"] > found["elbo"] - 0.3  # of other rows
    x = run.data.validation.rows[pvae.util.seeds.subset(len(run.data.validation), 60, 0)]
    wanted = pvae.analysis.surgery(run.pair, x).bits_per_dimension
    assert wanted is not None
    assert found["bits_per_dimension"] == wanted.value
    assert validation_figure(run, "new_gain_upper", Measure()) >= 0
    rows = [row["elbo"] for row in run.files.metrics_rows() if row["split"] == "validation"]
    assert found["elbo"] == rows[run.checkpoint.state["best_epoch"] - 1]
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="expected a model with a finite elbo"):
        validation_figure(run, "elbo", measure)


@pytest.mark.slow
def test_twenty_trials_by_two_searches_at_once_of_which_one_is_killed(tmp_path):
    """20 are recorded, none twice, and the best is within 0.2 nats of the best of a grid."""
    ranges = {"train.optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True}}
    file = declared(tmp_path, ranges=ranges, trials=20, pruner="none")
    command = [sys.executable, "-P", "-m", "pvae", "study", str(file), "--device=cpu", "--jobs=1", "--no-page"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    search = opened(file)
    while sum(row["state"] == "complete" for row in search.history()) < 5:
        time.sleep(0.2)
        assert all(each.poll() is None for each in both)
    both[0].kill()
    both[0].communicate()
    _, said = both[1].communicate(timeout=1200)
    assert both[1].returncode == 0, said
    rows = search.history()
    assert [(row["trial"], row["state"]) for row in rows] == [(number, "complete") for number in range(20)]
    assert len({row["run"] for row in rows}) == len(list((tmp_path / "runs" / "tiny-trial").iterdir())) == 20
    base = Experiment.from_dict({**search.base, "name": "grid"})
    grid = [
        validation_figure(
            pvae.fit(base, f"train.optimizer.lr={1e-4 * 1000 ** (i / 7)}", run_dir=tmp_path / "grid", progress=False),
            "elbo", Measure(),
        )
        for i in range(8)
    ]  # fmt: skip
    assert max(row["value"] for row in rows) > max(grid) - 0.2
