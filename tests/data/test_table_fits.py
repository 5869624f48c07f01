"""Fits of tables: declarations, the pair, missing values, and a real table of all types of columns."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr, operator, index"

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from pydantic import ValidationError

import pvae
from pvae.data import Dataset
from pvae.data.sources.tabular import FrameSource
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss
from tests.cli_runner import run_cli
from tests.data.test_tables import AB, MIXED, Raw, masked, mixed
from tests.data.writers import refused

NETWORK = {"kind": "mlp", "hidden": [16]}


def experiment(columns: Raw = MIXED, likelihood: Any = "columns", **more: Any) -> Experiment:
    raw: Raw = {
        "data": {"source": "frame", "columns": columns},
        "latents": {"z": {"dim": 2}},
        "encoder": {"network": NETWORK},
        "decoder": {"network": NETWORK, "likelihood": likelihood},
        **more,
    }
    return Experiment.from_dict(raw)


def column(**raw: Any) -> Raw:
    return {"columns": {"a": raw}}


def table(**more: Any) -> Raw:
    return {"data": {"source": "frame", "columns": AB, **more}}


REFUSED: dict[str, tuple[Raw, str]] = {
    "no table": ({"data": "digits"}, "decoder.likelihood: expected another likelihood, unless the data are a"),
    "mixed columns": ({"columns": AB, "likelihood": "normal"}, "likelihood: expected columns, because 'b' is categ"),
    "holes": (column(type="continuous", missing="mask") | {"likelihood": "normal"}, "because values of 'a' may be m"),
    "unknown type": (column(type="contnuous"), r"data.columns.a.type: expected one of .*\(did you mean 'continuous'"),
    "unknown key": (column(type="count", transfrom="log"), "data.columns.a.transfrom: expected one of"),
    "no columns": ({"columns": {}}, "data.columns"),
    "no levels": ({"columns": {"a": "categorical"}}, "data.columns.a.levels: expected a value; got none"),
    "one level": (column(type="categorical", levels=["x"]), "data.columns.a.levels"),
    "levels that look alike": (column(type="categorical", levels=["1", 1]), "levels that differ as they are written"),
    "a level that is missing": (column(type="categorical", levels=["NA", "EU"]), r"not in na, .*got \['NA'\]"),
    "scaled": (table(scale="unit"), "no scale in a table"),
    "binarised": (table(binarize="static"), "no binarize in a table"),
    "shaped": (table(shape=[2]), "no shape in a table"),
    "labelled by a column of x": (table(label="b"), "a label that is no part of x"),
}


def test_declarations_round_trip() -> None:
    made = experiment()
    assert Experiment.from_toml(made.to_toml()) == made
    assert list(Experiment.from_toml(made.to_toml()).data.table) == list(MIXED)


@pytest.mark.parametrize("case", REFUSED, ids=list(REFUSED))
def test_unsound_tables_are_refused_with_a_path(case: str) -> None:
    raw, match = REFUSED[case]
    refused(match, experiment, **raw, error=DeclarationError)


@pytest.mark.parametrize(
    ("column", "likelihood"), [("continuous", "normal"), ("count", "poisson"), ("count", "negative_binomial"),
                               ("binary", "bernoulli"), ("continuous", "multivariate_normal")]
)  # fmt: skip
def test_a_table_of_one_kind_may_have_that_likelihood(column: str, likelihood: str) -> None:
    pair = experiment({"a": column, "b": column}, likelihood).build((2,))
    assert type(pair.guide.reader).__name__ == ("CountsReader" if column == "count" else "NoneType")
    assert not pair.check(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))


def test_a_pair_of_other_columns_is_refused() -> None:
    with pytest.raises(DeclarationError, match=r"likelihood: expected rows of the 6 columns .*; got shape \[3\]"):
        experiment().build((3,))
    with pytest.raises(ValidationError):
        FrameSource.model_validate({"columns": None})


def test_the_guide_reads_levels_as_one_hots_and_holes_as_such() -> None:
    pair = experiment().build((6,))
    x = torch.tensor([[1.5, -1.0, 7.0, 1.0, 2.0, 0.25], [0.5, math.nan, math.nan, 0.0, math.nan, math.nan]])
    seen = [[1.5, -1.0, 0.25, math.log(8), 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]  # fmt: skip
    torch.testing.assert_close(pair.guide.reader(x), torch.tensor(seen))
    assert pair.guide.reader.output == (12,)


def test_gradients_are_finite_and_export_gives_the_same_numbers() -> None:
    made = experiment()
    data = Dataset.from_frame(mixed(), MIXED)
    pair, x = made.build((6,)), data.train.x[:64]
    assert x.isnan().any()
    assert not pair.check(x)
    loss = Loss(made.objective, pair)
    torch.manual_seed(0)
    value, figures = loss(x)
    value.backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    with pyro.validation_enabled(False):
        exported = torch.export.export(loss, (x,), strict=False).module()
    torch.manual_seed(0)
    torch.testing.assert_close(exported(x)[1], figures)


def test_evidence_with_holes_is_that_of_the_observed_columns() -> None:
    """log p(x, z) - log p(z | x) is the marginal normal of what is there, at any z, for a linear decoder."""
    columns = {f"c{i}": masked({"type": "continuous", "transform": "none"}) for i in range(5)}
    network = {"kind": "mlp", "hidden": []}
    pair = experiment(columns, decoder={"network": network, "likelihood": "columns"}).build((5,)).double()
    model = pair.model
    with torch.no_grad():
        model.decoder.likelihood.families["normal"].log_scale.copy_(torch.linspace(-1, 0.5, 5))
        zero = torch.zeros(1, 2, dtype=torch.float64)
        b = model.decoder({"z": zero}).mean[0]
        w = torch.stack([model.decoder({"z": e[None]}).mean[0] - b for e in torch.eye(2, dtype=torch.float64)], 1)
        scale = torch.linspace(-1, 0.5, 5, dtype=torch.float64).exp()
        x = torch.randn(6, 5, dtype=torch.float64)
        x[0, 2], x[1, 0:3], x[2, :4], x[3, :] = (torch.nan,) * 4
        z = torch.randn(6, 2, dtype=torch.float64)
        pair.adopt(x)
        nodes = pair.model_trace(x, {"z": z}).nodes
        joint = nodes["z"]["fn"].log_prob(z) + nodes["x"]["fn"].log_prob(x)
    for i in range(6):
        there = ~x[i].isnan()
        a, s, y = w[there].numpy(), scale[there].numpy(), (x[i] - b)[there].numpy()
        precision = np.eye(2) + a.T @ (a / s[:, None] ** 2)
        posterior = scipy.stats.multivariate_normal(
            np.linalg.solve(precision, a.T @ (y / s**2)), np.linalg.inv(precision)
        )
        covariance = a @ a.T + np.diag(s**2)
        want = scipy.stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y) if len(y) else 0.0
        assert float(joint[i]) - posterior.logpdf(z[i].numpy()) == pytest.approx(float(want), abs=1e-9)


def cancer() -> tuple[pandas.DataFrame, Raw]:
    """569 tumours: ten measures, the diagnosis as words, and the size as one of three."""
    from sklearn.datasets import load_breast_cancer

    frame = load_breast_cancer(as_frame=True).frame
    columns = [name for name in frame.columns if name.startswith("mean")]
    made = frame[columns].copy()
    made["diagnosis"] = np.where(frame["target"] == 1, "benign", "malignant")
    made["worst"] = pandas.cut(frame["worst area"], 3, labels=["small", "middle", "large"]).astype(str)
    made["points"] = np.rint(100 * frame["worst concave points"])
    raw: Raw = {name: masked({"type": "continuous"}) for name in columns}
    raw["mean area"] = masked({"type": "continuous", "transform": "log"})
    raw["diagnosis"] = {"type": "binary", "values": ["benign", "malignant"]}
    raw["worst"] = {"type": "categorical", "levels": ["small", "middle", "large"]}
    raw["points"] = {"type": "count", "likelihood": "negative_binomial"}
    return made, raw


def independent_nats(train: np.ndarray, test: np.ndarray) -> float:
    """Mean log density of test rows, columns independent: normals, then a coin, levels, and a Poisson or better."""
    total = scipy.stats.norm.logpdf(test[:, :10], train[:, :10].mean(0), train[:, :10].std(0)).sum(1)
    total = total + scipy.stats.bernoulli.logpmf(test[:, 10], train[:, 10].mean())
    total = total + np.log(np.bincount(train[:, 11].astype(int), minlength=3) / len(train))[test[:, 11].astype(int)]
    mean, variance = train[:, 12].mean(), train[:, 12].var()
    p = min(mean / variance, 1 - 1e-9)
    total = total + scipy.stats.nbinom.logpmf(test[:, 12], mean * p / (1 - p), p)
    return float(total.mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on a real table of all types, kept as a file beside it."""
    folder = tmp_path_factory.mktemp("cancer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        frame, columns = cancer()
        frame.to_csv(folder / "cancer.csv", index=False)
        raw: Raw = {
            "name": "cancer",
            "data": {"source": "csv", "path": str(folder / "cancer.csv"), "columns": columns},
            "latents": {"z": {"dim": 4}},
            "encoder": {"network": {"kind": "mlp", "hidden": [64]}},
            "decoder": {"network": {"kind": "mlp", "hidden": [64]}, "likelihood": "columns"},
            "train": {"epochs": 60, "batch_size": 100, "engine": "eager", "optimizer": {"kind": "adam", "lr": 5e-3}},
        }
        yield pvae.fit(Experiment.from_dict(raw), run_dir=folder / "runs", device="cpu", progress=False)


def test_a_fit_of_a_real_table_beats_independent_columns(run: Any) -> None:
    """The ELBO of unseen rows, a lower bound, is far above what columns by themselves give."""
    alone = independent_nats(run.data.train.x.double().numpy(), run.data.test.x.double().numpy())
    found = pvae.analysis.surgery(run.pair, run.data.test.x, samples=8).elbo.value
    assert found > alone + 5, (found, alone)


def test_hidden_entries_are_found_again(run: Any) -> None:
    """The model's mean of entries that were hidden from it is nearer to them than the column's mean."""
    x = run.data.test.x.clone()
    hidden = torch.rand(len(x), 10, generator=torch.Generator().manual_seed(1)) < 0.2
    holed = x.clone()
    holed[:, :10][hidden] = torch.nan
    guesses = [pvae.analysis.reconstruct(run, holed, seed=seed).x[:, :10] for seed in range(10)]
    error = (torch.stack(guesses).mean(0) - x[:, :10])[hidden].square().mean()
    plain = x[:, :10][hidden].square().mean()  # columns are standardised: their mean is 0
    assert error < 0.5 * plain, (error, plain)


def test_commands_run_on_a_table(run: Any, tmp_path: Path) -> None:
    where = ["--run-dir", str(run.path.parent.parent), "--json"]
    out, _ = run_cli("sample", str(run.path), "-n", "20", "--out", str(tmp_path / "s"), *where)
    made = pandas.read_csv(json.loads(out)["csv"][0])
    assert list(made.columns) == list(run.data.table.columns)
    assert set(made["diagnosis"]) <= {"benign", "malignant"}
    assert set(made["worst"]) <= {"small", "middle", "large"}
    assert made["mean area"].between(50, 5000).all()
    assert (made["points"] % 1 == 0).all()
    out, _ = run_cli("reconstruct", str(run.path), "--rows", "5", "--out", str(tmp_path / "r"), *where)
    assert len(pandas.read_csv(json.loads(out)["csv"][0])) == 5
    run_cli("surgery", str(run.path), *where)


@pytest.mark.slow
def test_a_report_of_a_table(run: Any) -> None:
    """Its fast twins: the commands above, which make what a report shows."""
    run_cli("report", str(run.path), "--run-dir", str(run.path.parent.parent))
    assert "ELBO" in (run.path / "report" / "index.html").read_text()


def test_a_run_on_a_frame_is_opened_with_the_frame_again(tmp_path: Path) -> None:
    frame = mixed(120)
    train = {"epochs": 2, "batch_size": 30, "engine": "eager"}
    made = pvae.fit(experiment(train=train), data=frame, run_dir=tmp_path, device="cpu", progress=False)
    again = pvae.Run.load(made.path, data=frame)
    means = [run.pair.guide.posterior("z", run.data.test.x).mean for run in (again, made)]
    assert torch.equal(*means)
    with pytest.raises(DataError, match="expected the tensors of the fit|Pass data="):
        _ = pvae.Run.load(made.path).data
    with pytest.raises(DataError, match="fitted on other data"):
        _ = pvae.Run.load(made.path, data=mixed(121)).data


def test_no_cell_is_computed_and_numbers_stay_numbers(tmp_path: Path) -> None:
    """FAULTS 39: in the names of columns and in their words; negative numbers and levels stay numbers."""
    columns: Raw = {
        "=1+1": {"type": "continuous"},
        "word": {"type": "binary", "values": ["=cmd|' /C calc'!A0", "@sum"]},
        "+c": {"type": "categorical", "levels": [-1, -2]},
    }
    path = tmp_path / "hostile.csv"
    frame = pandas.DataFrame(
        {"=1+1": np.arange(-20.0, 20), "word": ["=cmd|' /C calc'!A0", "@sum"] * 20, "+c": [-1, -2] * 20}
    )
    frame.to_csv(path, index=False)
    data = {"source": "csv", "path": str(path), "columns": columns}
    made = experiment(data=data, train={"epochs": 1, "engine": "eager"})
    run = pvae.fit(made, run_dir=tmp_path / "runs", device="cpu", progress=False)
    run_cli("reconstruct", str(run.path), "--draw", "--out", str(tmp_path / "made"))
    head, *rows = csv.reader((tmp_path / "made.csv").read_text().splitlines())
    assert head == ["'=1+1", "word", "'+c"]
    assert any(float(row[0]) < 0 for row in rows)
    assert {row[1] for row in rows} <= {"'=cmd|' /C calc'!A0", "'@sum"}
    assert {row[2] for row in rows} <= {"-1", "-2"}
