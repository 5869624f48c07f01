"""Rate and distortion: surgery's own figures, refusals of what does not compare, the figure, the command line."""

import csv
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from torch import Tensor, nn

import pvae
from pvae.analysis import rate_distortion, surgery
from pvae.analysis.pages.plots import base, comparisons
from pvae.data.dataset import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from tests.cli_runner import run_cli

SMALL = ["encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager", "train.epochs=1"]
TOY = {
    "data": {"source": "toy", "density": "moons", "rows": 300},
    "latents": {"z": {"dim": 2}},
    "decoder": {"likelihood": {"kind": "normal"}},
}


def fitted(folder: Path, name: str, *overrides: str) -> Run:
    experiment = Experiment.from_dict({"name": name, **TOY}).with_overrides(*SMALL, *overrides)
    return pvae.fit(experiment, run_dir=folder, device="cpu", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on the same data, and one each on other rows and conditioned on the label."""
    where = tmp_path_factory.mktemp("runs")
    fitted(where, "vae")
    fitted(where, "wide", "latents.z.dim=4")
    fitted(where, "autoencoder", "latents.z.posterior.kind=delta")
    fitted(where, "noisy", "data.noise=0.3")
    fitted(where, "conditional", "covariates.y.codes=2", "decoder.given=['z', 'y']")
    return where


def runs(folder: Path, *names: str) -> list[Run]:
    return [Run.load(name, root=folder) for name in names]


def test_figures_are_surgerys_own(folder: Path) -> None:
    names = ("vae", "wide", "autoencoder")
    opened = runs(folder, *names)
    found = rate_distortion(opened, samples=2, seed=3)
    table = found.to_frame()
    assert table["run"].tolist() == list(names)
    for run, row in zip(opened, table.itertuples(), strict=True):
        own = surgery(run.pair, run.data.test.x, samples=2, seed=3)
        assert (row.rate, row.rate_error) == (own.kl.value, own.kl.standard_error)
        assert (row.distortion, row.distortion_error) == (-own.reconstruction.value, own.reconstruction.standard_error)
        assert (row.elbo, row.elbo_error) == (own.total.value, own.total.standard_error)
        assert row.n == len(run.data.test)
    np.testing.assert_allclose(table["elbo"], -(table["rate"] + table["distortion"]), atol=1e-10)
    assert len(set(table["rate"])) == 3


def test_rows_and_seed_are_those_of_every_run(folder: Path) -> None:
    opened = runs(folder, "vae", "wide")
    first = rate_distortion(opened, "train", rows=20, seed=1).to_frame()
    assert first["n"].tolist() == [20, 20]
    assert first.equals(rate_distortion(opened, "train", rows=20, seed=1).to_frame())
    other = rate_distortion(opened, "train", rows=20, seed=2).to_frame()
    assert (first["distortion"] != other["distortion"]).all()
    with pytest.raises(DeclarationError, match="did you mean 'test'"):
        rate_distortion(opened, "tests")


class Global(nn.Module):
    """A scale for all data beside z."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w + z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.at, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))


def test_global_latents_share_their_rate(tmp_path: Path) -> None:
    module = Global()
    run = pvae.fit(
        Pair(module.model, module.guide), "train.epochs=1", data=Dataset.from_tensors(torch.randn(40, 2)),
        run_dir=tmp_path, progress=False,
    )  # fmt: skip
    found = rate_distortion([run], "train", samples=3)
    (row,) = found.rows
    own = found.surgeries[row["run"]]
    assert own.global_kl is not None
    assert row["rate"] == pytest.approx(own.kl.value + own.global_kl.value)
    assert abs(own.global_kl.value) > 1e-4
    assert row["elbo"] == pytest.approx(-(row["rate"] + row["distortion"]), abs=1e-10)


@pytest.mark.parametrize(
    ("name", "why"), [("noisy", "fingerprint"), ("conditional", r"covariates none and y \(2 values\)")]
)
def test_runs_that_do_not_compare_are_refused(folder: Path, name: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        rate_distortion(runs(folder, "vae", "wide", name))
    assert "vae (" in str(caught.value)
    assert f"{name} (" in str(caught.value)


def test_other_binarisation_and_splits_are_refused(tmp_path: Path) -> None:
    made = [
        pvae.fit("vae", *SMALL, "latents.z.dim=2", *overrides, name=name, run_dir=tmp_path, progress=False)
        for name, overrides in {
            "dynamic": [],
            "threshold": ["data.binarize=threshold"],
            "fewer": ["data.splits.test=[1400, 1500]", "data.splits.train=[0, 1000]"],
        }.items()
    ]
    with pytest.raises(DataError, match="data.binarize dynamic and threshold"):
        rate_distortion(made[:2])
    with pytest.raises(DataError, match="data.splits the source's own and .*test 1400 .. 1500"):
        rate_distortion([made[0], made[2]])
    with pytest.raises(DataError, match="at least one run"):
        rate_distortion([])


def test_a_run_counts_once_and_equal_names_get_their_ids(folder: Path, tmp_path: Path) -> None:
    first, again, other = *runs(folder, "vae", "vae"), fitted(tmp_path, "vae", "seed=1")
    names = rate_distortion([first, again, other]).to_frame()["run"].tolist()
    assert names == [f"vae/{first.path.name}", f"vae/{other.path.name}"]


def test_progress_counts_the_draws_of_all_runs(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    rate_distortion(runs(folder, "vae", "wide"), samples=2, on_progress=lambda *step: told.append(step))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ---------------------------------------------------------------------- the figure


def labels_of(names: list[str], points: np.ndarray) -> tuple[list[Annotation], Figure]:
    errors = {"rate_error": 0.1, "distortion_error": 0.1}
    known = zip(names, points.tolist(), strict=True)
    made = comparisons.rate_distortion([{"run": name, "rate": x, "distortion": y, **errors} for name, (x, y) in known])
    made.draw_without_rendering()
    return [text for text in made.axes[0].texts if isinstance(text, Annotation)], made


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
def test_labels_of_twelve_runs_stand_clear(spread: float) -> None:
    generator = np.random.default_rng(0)
    points = np.array([[20.0, 70.0]]) + spread * generator.uniform(0, 20, (12, 2))
    names = [f"run number {i}" for i in range(12)]
    found, made = labels_of(names, points)
    shown = {text.get_text(): Text.get_window_extent(text) for text in found}
    assert set(names) <= set(shown)
    assert not [pair for pair in combinations(shown, 2) if shown[pair[0]].overlaps(shown[pair[1]])]
    frame = made.axes[0].get_window_extent()
    assert all(frame.x0 <= shown[name].x0 and shown[name].x1 <= frame.x1 for name in names)
    assert base.png(made).startswith(b"\x89PNG")


def test_lines_are_of_equal_elbo() -> None:
    found, made = labels_of(["a", "b"], np.array([[2.0, 30.0], [12.0, 25.0]]))
    lines = [line for line in made.axes[0].lines if line.get_linestyle() == "--"]
    assert len(lines) >= 3
    for line in lines:
        totals = np.asarray(line.get_xdata()) + np.asarray(line.get_ydata())
        assert totals[0] == pytest.approx(totals[1])
    totals_of = {round(-float(np.asarray(line.get_xdata())[0] + np.asarray(line.get_ydata())[0]), 3) for line in lines}
    levels = {float(text.get_text().replace("−", "-")) for text in found if text.get_text()[-1].isdigit()}
    assert levels <= totals_of
    assert levels


def test_one_run_of_one_row_has_a_figure_and_no_error(folder: Path) -> None:
    found = rate_distortion(runs(folder, "vae"), rows=1)
    assert math.isnan(found.rows[0]["rate_error"])
    assert found.to_dict()["runs"][0]["rate_error"] is None
    assert base.png(found.figure()).startswith(b"\x89PNG")


# ---------------------------------------------------------------------- the command line


def command(folder: Path, *arguments: str, code: int = 0) -> str:
    out, error = run_cli("rate-distortion", *arguments, "--run-dir", str(folder), code=code)
    return error if code else out


def test_cli_writes_a_table_and_a_picture(folder: Path, tmp_path: Path) -> None:
    out = command(folder, "vae", "wide", "--out", str(tmp_path / "plane"))
    assert "rate" in out
    assert f"csv: {tmp_path / 'plane.csv'}" in out
    expected = rate_distortion(runs(folder, "vae", "wide"))
    with (tmp_path / "plane.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["vae", "wide"]
    assert [float(row["rate"]) for row in rows] == pytest.approx([row["rate"] for row in expected.rows])
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(command(folder, "vae", "wide", "--json", "--out", str(tmp_path / "again")))
    assert {key: record[key] for key in ("unit", "split", "runs")} == expected.to_dict()
    assert record["png"] == str(tmp_path / "again.png")


def test_cli_refuses_what_does_not_compare(folder: Path, tmp_path: Path) -> None:
    err = command(folder, "vae", "noisy", "--out", str(tmp_path / "plane"), code=65)
    assert "do not compare" in err or "figures compare" in err
    assert not list(tmp_path.iterdir())
