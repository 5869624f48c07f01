"""Runs side by side: what compares, what is refused, and paired differences against their own formula."""

import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from pvae.analysis import compare, elbos, paired, surgery
from pvae.analysis.pages.comparison.comparison import Comparison
from pvae.analysis.pages.plots import comparisons
from pvae.analysis.pages.report import examine_runs
from pvae.data import Dataset
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.training.fit import fit
from tests.cli_runner import run_cli_json
from tests.pages.test_report import HOSTILE, assert_harmless
from tests.zoo_runs import FEW_ROWS, hasty

TINY = (*FEW_ROWS["digits"], "encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager")


def fitted(name: str, folder: Path, *changes: str) -> Run:
    return fit("vae", *TINY, "train.epochs=2", *changes, f"name={name}", run_dir=folder, progress=False)


@pytest.fixture(scope="module", autouse=True)
def moment() -> Iterator[None]:
    """Comparisons after a moment's work; the pictures of one page are laid out."""
    with hasty(laid_out=False):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root: Path) -> list[Run]:
    changes = {"one": "seed=0", "two": "seed=1", "flow": "latents.z.prior.kind=realnvp", "wide": "latents.z.dim=3"}
    return [fitted(name, root, change) for name, change in changes.items()]


@pytest.fixture(scope="module")
def page(runs: list[Run], root: Path) -> Path:
    with hasty():
        return compare(runs, root / "out", groups=["N", "N", "flow", "wide"], title=HOSTILE[0], evidence_samples=10)


def numbers(page: Path) -> dict:
    return json.loads((page.parent / "report.json").read_text())


def test_a_page_for_several_runs(page: Path, runs: list[Run]):
    seen = assert_harmless(page)
    assert HOSTILE[0] in seen.text
    found = re.findall(r'<h2 id="(\w+)"', page.read_text())
    assert found == [
        "verdict", "overview", "training", "plane", "paired", "surgery", "together", "samples", "declarations",
    ]  # fmt: skip
    said = numbers(page)
    assert set(said["figures"]) == {"one", "two", "flow", "wide"}
    assert set(said["figures"]["one"]) > {"new data, at least", "new data, at most"}
    for run in runs:
        assert said["figures"][run.name]["new data, at least"] == said["surgery"][run.name]["population"]["gain"]
    assert said["declarations"]["seed"] == ["0", "1", "0", "0"]
    assert (page.parent / "tables" / "averages.csv").exists()
    assert len(list((page.parent / "tables").iterdir())) == len(seen.all("table"))


def test_figures_are_those_of_each_run_alone(page: Path, runs: list[Run]):
    said = numbers(page)
    for run in runs:
        alone = surgery(run.pair, run.data.test.x, samples=2, train=run.data.train.x, labels=run.data.test.y)
        assert said["figures"][run.name]["elbo"]["value"] == alone.elbo.value
        assert said["surgery"][run.name]["figures"] == alone.to_dict()["figures"]


def test_paired_differences_are_those_of_a_paired_t_test(page: Path, runs: list[Run]):
    x = runs[0].data.test.x
    a, b = (elbos(run.pair, x, 8, 0).numpy() for run in (runs[2], runs[0]))
    found = numbers(page)["paired"]["runs"]["flow"]["elbo"]
    assert found["value"] == pytest.approx(float((a - b).mean()))
    assert found["value"] / found["standard_error"] == pytest.approx(ttest_rel(a, b).statistic)


def test_a_run_against_itself_is_nothing():
    values = torch.linspace(-3, 2, 9)
    same, better = paired(values, values, values, values), paired(values + 1, values)
    assert (same.elbo.value, same.elbo.standard_error, same.wins.value) == (0.0, 0.0, 0.5)
    assert better.elbo.value == pytest.approx(1.0)
    assert (better.log_p, better.wins.value) == (None, 1.0)


def test_pairing_cancels_what_is_hard_for_both():
    generator = torch.Generator().manual_seed(0)
    hard = 10 * torch.randn(2000, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    found = paired(hard + 0.05 + noise[0], hard + noise[1])
    assert found.elbo.standard_error == pytest.approx(math.sqrt(0.02 / 2000), rel=0.1)
    assert abs(found.elbo.value - 0.05) < 4 * found.elbo.standard_error


@pytest.mark.parametrize("rows", [(3, 4), (1, 1)])
def test_other_rows_do_not_pair(rows: tuple[int, int]):
    with pytest.raises(DataError, match="same two or more data"):
        paired(torch.zeros(rows[0]), torch.zeros(rows[1]))
    with pytest.raises(DataError, match="bounds on the same data"):
        paired(torch.zeros(3), torch.zeros(3), torch.zeros(2), torch.zeros(1))


def test_the_mean_of_elbos_is_the_surgery(runs: list[Run]):
    pair, x = runs[0].pair, runs[0].data.test.x
    found, whole = elbos(pair, x, 8, 0), surgery(pair, x, samples=8, seed=0)
    assert found.shape == (len(x),)
    assert float(found.mean()) == pytest.approx(whole.elbo.value, abs=5 * whole.elbo.standard_error)


def test_two_comparisons_are_byte_identical(runs: list[Run], tmp_path: Path):
    pages = [compare([Run.load(run.path) for run in runs[:2]], tmp_path / name, evidence_samples=5) for name in "ab"]
    first, second = ({p.relative_to(page.parent): p.read_bytes() for p in page.parent.rglob("*.*")} for page in pages)
    assert first == second


def test_a_page_speaks_of_cases_with_seeds_as_repeats(page: Path, runs: list[Run]):
    """Means over seeds by hand, with their errors; the collapse of one run is an alert; one colour a case."""
    said = numbers(page)
    (best,) = [s["text"] for s in said["verdict"] if "highest" in s["text"]]
    assert "seeds" in best
    assert not re.search(r"\b(one|two)\b", best)
    alerts = [s["text"] for s in said["verdict"] if s["alert"]]
    collapse = [name for name, exam in Comparison(runs[:2], evidence_samples=2).exams.items() if exam.collapse.alerts]
    told = [text for text in alerts if text.startswith(f"N, {len(collapse)} of 2 runs: z")]
    assert len(told) == bool(collapse)
    with (page.parent / "tables" / "averages.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    pair = [said["figures"][name]["elbo"]["value"] for name in ("one", "two")]
    assert float(rows["N"]["elbo"]) == pytest.approx(np.mean(pair))
    assert float(rows["N"]["elbo error"]) == pytest.approx(np.std(pair, ddof=1) / math.sqrt(2))
    found = Comparison(runs, groups=["N", "N", "flow", "wide"], evidence_samples=2)
    assert found.cases == {"one": (0, "N"), "two": (0, ""), "flow": (1, "flow"), "wide": (2, "wide")}
    curves = comparisons.overlaid(["N", "", "flow"], [exam.metrics for exam in [*found.exams.values()][:3]], [0, 0, 1])
    first, second, third = (line.get_color() for line in curves.axes[0].lines[:3])
    assert first == second != third
    assert [text.get_text() for text in curves.legends[0].texts] == ["N", "flow"]


def test_the_verdict_knows_a_tie(runs: list[Run], tmp_path: Path):
    found = Comparison([runs[0], fitted("again", tmp_path)], evidence_samples=5)
    told: list[int] = []
    said = [s.text for s in examine_runs(found, "t", "", lambda done, _total, _what: told.append(done)).verdict]
    assert any("these data do not show which is better" in text for text in said)
    (new,) = [text for text in said if "better prior wins on new data" in text]
    assert "nats with that of one" in new
    assert "nats with that of again" in new
    assert told == sorted(told)
    assert len(set(told)) > 20


def test_many_runs_stand_below_each_other(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["pvae.analysis.pages.comparison.sections"], "COLUMN_RUNS", 1)
    path = compare(runs[:2], tmp_path, evidence_samples=2)
    head = (path.parent / "tables" / "overview.csv").read_text().splitlines()
    assert head[0].startswith("run,elbo,elbo error")
    assert [line.split(",")[0] for line in head[1:]] == ["one", "two"]


@pytest.mark.parametrize(
    "change", ["data.binarize=threshold", "data.splits.train=[0, 900]"], ids=["another binarisation", "other rows"]
)
def test_elbos_of_other_data_are_not_compared(runs: list[Run], change: str, tmp_path: Path):
    other = fitted("other", tmp_path / "runs", change)
    with pytest.raises(DataError, match="Expected runs on the same data, prepared alike") as caught:
        compare([runs[0], other], tmp_path / "out")
    assert "other" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_run_is_no_comparison(runs: list[Run], tmp_path: Path):
    for given in ([], runs[:1], [runs[0], Run.load(runs[0].path)]):
        with pytest.raises(DataError, match="two or more runs"):
            compare(given, tmp_path)
    with pytest.raises(DataError, match="a group for each"):
        compare(runs[:2], tmp_path, groups=["a"])


def test_a_model_without_a_likelihood_stands_beside_one_that_has(tmp_path: Path):
    x = torch.from_numpy(np.random.default_rng(0).random((300, 1, 4, 4), dtype=np.float32))
    small = ("train.epochs=1", "train.engine=eager", "data.source=tensor")
    given: dict[str, Any] = {"data": Dataset.from_tensors(x), "run_dir": tmp_path, "progress": False}
    path = compare([fit(kind, *small, **given) for kind in ("gan", "vae_normal")], tmp_path / "out", evidence_samples=2)
    said = numbers(path)
    found = said["figures"]
    assert "elbo" not in found["gan"]
    assert found["gan"]["two-sample accuracy"]["value"] >= 0
    assert found["vae_normal"]["elbo"] == said["surgery"]["vae_normal"]["figures"]["elbo"]
    assert "gan" not in said["surgery"]


def test_the_command_prints_one_json_document(runs: list[Run], tmp_path: Path):
    """FAULTS 42."""
    out = tmp_path / "out"
    found = run_cli_json("compare", *(str(run.path) for run in runs[:2]), "--evidence-samples", "5", "--out", str(out))
    assert found["file"] == str(out / "index.html")
    assert set(found["figures"]) == {"one", "two"}


def test_one_run_without_a_bound_makes_all_compare_their_elbos(runs: list[Run]):
    found = Comparison(runs[:3], evidence_samples=5)
    found.exams["flow"].__dict__["evidence"] = None
    assert not found.log_p
    assert all(pair.log_p is None for pair in found.against("one").values())
    assert found.best == max(found.elbos, key=lambda name: float(found.elbos[name].mean()))
