"""The published tables: their declared files are sound, and the page says what the tables say."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest

import pvae
from pvae.experiment.experiment import Experiment
from pvae.util.seeds import subset
from tests.zoo_runs import FEW_ROWS

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
DECLARED = sorted(str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.toml"))
SCRIPTS = Path(__file__).parents[1] / "soak"
PUBLISHED = RESULTS / "published"
ROWS = sorted(p.stem for p in PUBLISHED.glob("*.toml"))
CONTINUOUS = [row for row in ROWS if not row.endswith(("bernoulli", "gumbel"))]


@pytest.fixture(scope="module")
def measure() -> SimpleNamespace:
    """The script that writes the tables."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "measure.py")))


@pytest.mark.parametrize("name", DECLARED)
def test_declared_files_are_sound(name: str) -> None:
    experiment = Experiment.load(RESULTS / name)
    assert Experiment.from_toml(experiment.to_toml()) == experiment


@pytest.mark.parametrize("row", CONTINUOUS)
def test_networks_are_those_of_the_published_rows(row: str) -> None:
    """Gated 784-300-300, heads of 40 + 40, gated 40-300-300, linear 784: numbers counted by hand."""
    experiment = Experiment.load(PUBLISHED / f"{row}.toml")
    assert experiment.name == row
    assert experiment.data.binarize == "dynamic"
    pair = experiment.build((784,))
    gated = {(a, b): 2 * (a * b + b) for a, b in ((784, 300), (300, 300), (40, 300), (600, 300))}
    heads, pixels = 300 * 80 + 80, 300 * 784 + 784
    named = [item for item in pair.named_parameters() if "prior" not in item[0]]
    count = {part: sum(p.numel() for name, p in named if name.startswith(part)) for part in ("guide.", "model.")}
    both = gated[784, 300] + gated[40, 300] + gated[600, 300] + heads
    one = gated[784, 300] + gated[300, 300] + heads
    assert count["guide."] == (one + both if row.endswith("hvae") else one)
    decoder = 2 * gated[40, 300] + gated[600, 300] if row.endswith("hvae") else gated[40, 300] + gated[300, 300]
    assert count["model."] == decoder + pixels


def test_the_page_says_what_the_table_says(measure: SimpleNamespace) -> None:
    """Every table of the page is printed from `published.csv`, of runs whose files are there."""
    frame = pandas.read_csv(RESULTS / "published.csv")
    assert set(frame["run"]) <= set(ROWS)
    page = (RESULTS / "README.md").read_text()
    for table in measure.pages(frame):
        assert table in page, table


def test_figures_of_the_table_belong_together() -> None:
    """ELBO = reconstruction - I_q - marginal KL; log p(x) above it; gains are differences of log p(x)."""
    frame = pandas.read_csv(RESULTS / "published.csv")
    for _, row in frame.iterrows():
        for split in ("train", "test"):
            kl = row[f"{split}_kl"]
            assert row[f"{split}_reconstruction"] - kl == pytest.approx(row[f"{split}_elbo"], abs=1e-3)
            assert row[f"{split}_gap"] > 0
            if not row.get(f"{split}_marginal_kl_upper", math.nan) > 0:  # known but between bounds on two levels
                assert row[f"{split}_mutual_information"] + row[f"{split}_marginal_kl"] == pytest.approx(kl, abs=1e-3)
        assert row["test_iwae"] > row["test_elbo"]
        assert row["samples"] >= (5000 if row["run"] in CONTINUOUS else 1000)
        assert row["test_evidence_rows"] == 10_000
        first = frame[frame["fingerprint"] == row["fingerprint"]].iloc[0]
        if row["run"] != first["run"]:
            assert row["test_iwae"] - first["test_iwae"] == pytest.approx(row["gain"], abs=1e-3)


@pytest.mark.slow
def test_a_run_is_measured_once(
    measure: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs get a row each, the second its paired gain; asked again, none is measured again."""
    network = {"network": {"kind": "mlp", "hidden": [8]}}
    spec = {"latents": {"z": {"dim": 2}}, "encoder": network, "decoder": network, "data": {"source": "digits"}}
    experiment = Experiment.from_dict(spec).with_overrides(
        *FEW_ROWS["digits"], "data.binarize=dynamic", "train.engine=eager"
    )
    for name, epochs in (("short", 1), ("long", 6)):
        changed = experiment.with_overrides(f"name={name}", f"train.epochs={epochs}")
        pvae.fit(changed, run_dir=tmp_path / "runs", device="cpu", progress=False)
    out = tmp_path / "table.csv"
    options = ["--samples", "5", "--rows", "50", "--train-rows", "60", "--train-evidence", "40", "--draws", "60"]
    command = ["measure.py", str(out), "short", "long", "--root", str(tmp_path / "runs"), *options]
    monkeypatch.setattr("sys.argv", command)
    measure.main()
    frame = pandas.read_csv(out)
    assert list(frame["run"]) == ["short", "long"]
    assert pandas.isna(frame["gain"][0])
    assert frame["gain"][1] == pytest.approx(frame["test_iwae"][1] - frame["test_iwae"][0], abs=1e-3)
    assert frame["epochs"].tolist() == [1, 6]
    written = out.read_bytes()
    capsys.readouterr()
    measure.main()
    assert capsys.readouterr().out.count("measured already") == 2
    assert out.read_bytes() == written
    monkeypatch.setattr("sys.argv", ["measure.py", str(out)])
    measure.main()
    assert "| long |" in capsys.readouterr().out
    frame[:1].to_csv(out, index=False)
    next(tmp_path.glob("runs/short/*/analysis/log_p_50_5.safetensors")).unlink()
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        measure.main()
    assert "long: expected" in (told := capsys.readouterr().err)
    assert "which measuring short wrote; got none. Name a new table." in told
    next(tmp_path.glob("runs/long/*/status.json")).write_text('{"state": "interrupted", "epoch": 1}')
    with pytest.raises(SystemExit):
        measure.main()
    assert "long: expected a run that is finished; it is interrupted" in capsys.readouterr().err


@pytest.fixture(scope="module")
def new_data() -> SimpleNamespace:
    """The script of the table of what a better prior wins on new data."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "measure_new_data.py")))


def test_the_page_says_what_the_table_of_new_data_says(new_data: SimpleNamespace) -> None:
    """Five refits of each run, none above the upper end of the interval of the run that it froze."""
    frame = pandas.read_csv(RESULTS / "new_data.csv")
    assert new_data.page(frame) in (RESULTS / "README.md").read_text()
    runs = frame[frame["parent"].isna()]
    assert set(runs["run"]) == {"fashion_normal", "mnist_normal"}
    for _, run in runs.iterrows():
        won = frame[frame["parent"] == f"{run['run']}/{run['id']}"]
        assert len(won) == 5
        assert run["kl"] - run["log_n"] < run["marginal_kl"]
        assert run["new_gain"] < run["new_gain_upper"] < run["marginal_kl"]
        assert (won["gained"] - 2 * won["gained_error"] < run["new_gain_upper"]).all()
        # Each refitted prior is a stated one: none wins more than the lower end.
        best = won.nlargest(1, "gained").iloc[0]
        assert best["gained"] < run["new_gain"] + 3 * math.hypot(run["new_gain_error"], best["gained_error"])


def test_new_data_are_measured_with_a_run_and_its_refits(
    new_data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"network": {"kind": "mlp", "hidden": [8]}}
    spec = {"latents": {"z": {"dim": 2}}, "encoder": network, "decoder": network, "data": {"source": "digits"}}
    small = Experiment.from_dict({**spec, "name": "small"}).with_overrides(
        *FEW_ROWS["digits"], "data.binarize=static", "train.epochs=1", "train.engine=eager"
    )
    run = pvae.fit(small, run_dir=tmp_path / "runs", device="cpu", progress=False)
    child = pvae.refit(run, "latents.z.prior.kind=aggregated", progress=False)
    out = tmp_path / "table.csv"
    monkeypatch.setattr("pvae.analysis.population.kernels.FLOW_STEPS", 20)
    monkeypatch.setattr("sys.argv", ["", str(out), "small", "small_refit", "--root", str(run.path.parent.parent)])
    new_data.main()
    frame = pandas.read_csv(out)
    assert list(frame["prior"]) == ["standard_normal", "aggregated"]
    expected = pvae.analysis.gain(run.pair, child.pair, run.data.test.x[subset(len(run.data.test), 10_000, 0)]).gained
    assert frame["gained"][1] == pytest.approx(expected.value, abs=1e-4)
    assert frame["kl"][0] == pytest.approx(frame["mutual_information"][0] + frame["marginal_kl"][0], abs=2e-4)
    written = out.read_bytes()
    new_data.main()
    assert out.read_bytes() == written
    assert f"refit {expected.value:.2f}" in capsys.readouterr().out


def test_imputation_is_no_worse_than_by_trees() -> None:
    """The page says what the table says: within one standard error of iterative imputation with trees, or better."""
    frame = pandas.read_csv(RESULTS / "imputation.csv")
    script = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "measure_imputation.py")))
    assert script.page(frame) in (RESULTS / "README.md").read_text()
    for _, rows in frame.groupby("data"):
        by_mask = rows.pivot_table(index="mask", columns="method", values="rmse")
        won = by_mask["iterative, extra trees"] - by_mask["pvae"]
        assert len(won) == 5
        assert float(won.mean()) > -float(won.std()) / math.sqrt(5)
