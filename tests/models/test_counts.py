"""Counts: sizes and dispersions against closed forms, and the same density as a tensor and as columns of a table."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr"

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import scipy.stats
import torch

import pvae
from pvae.analysis import compare, evidence, sample
from pvae.analysis.samples.probe import groups
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.models.likelihoods.base import Likelihood

FEATURES = 20
NETWORK = {"kind": "mlp", "hidden": [16]}


def counts(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of three kinds of cells with sizes of their own, `(n, 20)`, and the kinds, `(n,)`."""
    rng = np.random.default_rng(seed)
    shares = np.random.default_rng(0).dirichlet(np.ones(FEATURES), 3)
    kind, size = rng.integers(0, 3, n), rng.lognormal(4, 0.5, n)
    return rng.poisson(shares[kind] * size[:, None]).astype(np.float32), kind


def declared(likelihood: dict[str, Any], **more: Any) -> Experiment:
    raw: dict[str, Any] = {
        "data": {"source": "tensor"},
        "latents": {"z": {"dim": 2}},
        "encoder": {"network": NETWORK},
        "decoder": {"network": NETWORK, "likelihood": likelihood},
        "train": {"epochs": 1, "engine": "eager"},
        **more,
    }
    return Experiment.from_dict(raw)


def built(**table: Any) -> Any:
    likelihood: Any = Likelihood.parse(table)
    return likelihood.within({"batch": (3,)}).build((5,)).double()


def test_poisson_counts_of_a_size_are_a_multinomial_of_a_poisson_sum():
    module = built(kind="poisson", size="library")
    h, size = torch.randn(7, 5).double(), torch.full((7, 1), 40.0).double()
    fn = module(h, {"library": size})
    x = fn.sample()
    total = x.sum(-1).numpy()
    want = scipy.stats.multinomial.logpmf(x.numpy(), total, h.softmax(-1).numpy()) + scipy.stats.poisson.logpmf(
        total, 40
    )
    np.testing.assert_allclose(fn.log_prob(x), want, rtol=1e-9)
    np.testing.assert_allclose(fn.mean.sum(-1), 40)


@pytest.mark.parametrize("kind", ["negative_binomial", "zero_inflated_negative_binomial"])
@pytest.mark.parametrize("dispersion", ["shared", "feature", "decoder", "batch"])
@pytest.mark.parametrize("size", [None, "library", "learned", "depth"])
def test_sizes_and_dispersions_are_scipys(kind: str, dispersion: str, size: str | None):
    module = built(kind=kind, dispersion=dispersion, **({} if size is None else {"size": size}))
    inflated, predicted = kind.startswith("zero"), dispersion == "decoder"
    assert module.inputs == (5 * (1 + predicted + inflated) + (size == "learned"),)
    for p in module.parameters():
        p.data.normal_()
    h = torch.randn(6, *module.inputs).double().requires_grad_()
    batch = torch.arange(6) % 3
    sizes = torch.arange(10.0, 70.0, 10.0).double()[:, None]
    fn = module(h, {"batch": torch.eye(3).double()[batch], "library": sizes, "depth": sizes})
    x = fn.sample()
    score = fn.base_dist.log_prob(x)
    parts = h[:, : h.shape[1] - (size == "learned")].detach().numpy().reshape(6, -1, 5)
    mean = np.exp(parts[:, 0])
    if size is not None:
        total = np.exp(h[:, -1:].detach().numpy()) if size == "learned" else sizes.numpy()
        mean = total * mean / mean.sum(1, keepdims=True)
    log_r = parts[:, 1] if predicted else module.log_count.detach().numpy()
    r = np.exp(log_r[batch] if dispersion == "batch" else log_r)
    want = scipy.stats.nbinom.logpmf(x.numpy(), r, r / (r + mean))
    if inflated:
        gate = 1 / (1 + np.exp(-parts[:, -1]))
        want = np.log(gate * (x.numpy() == 0) + (1 - gate) * np.exp(want))
    np.testing.assert_allclose(score.detach(), want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(fn.mean.detach(), (1 - gate if inflated else 1) * mean, rtol=1e-9)
    score.sum().backward()
    assert (h.grad != 0).all()
    assert all((p.grad != 0).any() for p in module.parameters())


def test_an_empty_row_has_a_finite_density_and_gradient():
    module = built(kind="negative_binomial", size="library")
    h = torch.randn(2, 5).double().requires_grad_()
    score = module(h, {"library": torch.zeros(2, 1).double()}).log_prob(torch.zeros(2, 5).double())
    score.sum().backward()
    assert score.abs().max() < 1e-3
    assert h.grad.isfinite().all()


def pairs(family: str) -> tuple[pvae.Pair, pvae.Pair]:
    """Pairs of the same weights: counts as a tensor, and as columns of a table."""
    columns = {f"g{i}": {"type": "count", "likelihood": family} for i in range(FEATURES)}
    table = declared({"kind": "columns"}, data={"source": "frame", "columns": columns})
    return declared({"kind": family}).build((FEATURES,)), table.build((FEATURES,))


@pytest.mark.parametrize("family", ["poisson", "negative_binomial"])
def test_counts_have_one_density_as_a_tensor_and_as_columns(family: str):
    x = torch.as_tensor(counts()[0])
    found = []
    for pair in pairs(family):
        torch.manual_seed(0)
        found.append(pair.terms(x))
    torch.testing.assert_close(found[0].reconstruction, found[1].reconstruction, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0].kl["z"], found[1].kl["z"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_fit_of_counts_is_one_as_a_tensor_and_as_columns(tmp_path: Path):
    x, _ = counts(600)
    names = [f"g{i}" for i in range(FEATURES)]
    columns = {name: {"type": "count", "likelihood": "negative_binomial"} for name in names}
    table = declared({"kind": "columns"}, data={"source": "frame", "columns": columns})
    tensor = declared({"kind": "negative_binomial"})
    found = []
    for plan, data in ((tensor, x), (table, pandas.DataFrame(x, columns=names))):
        run = pvae.fit(plan, "train.epochs=30", data=data, run_dir=tmp_path, progress=False)
        found.append(evidence(run.pair, run.data.test.rows, samples=100).elbo)
    assert abs(found[0].value - found[1].value) < 3 * (found[0].standard_error + found[1].standard_error) + 0.05


def test_runs_of_earlier_versions_read_counts_as_they_are():
    plan = declared({"kind": "poisson"})
    spec = plan.to_toml()
    assert Experiment.of_run(spec) == plan
    earlier = Experiment.of_run(spec.replace('reads = "log"\n', ""))
    assert earlier.decoder.likelihood.reads == "raw"
    assert earlier.build((3,)).guide.reader is None
    assert plan.build((3,)).guide.reader is not None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pvae.Run:
    plan = declared({"kind": "negative_binomial", "size": "library"}, name="given")
    return pvae.fit(plan, data=counts(), run_dir=tmp_path_factory.mktemp("runs"), progress=False)


def test_the_size_is_an_entry_of_the_row(run: pvae.Run):
    rows = run.data.test.rows
    assert rows.shape[1] == FEATURES + 1
    assert torch.equal(rows[:, -1], rows[:, :-1].sum(1))
    other = run.pair.frame.join(torch.zeros(len(rows), FEATURES), rows)  # other counts, the size that was given
    assert torch.equal(other[:, -1], rows[:, -1])
    again = run.pair.model(rows)
    assert again.shape == (len(rows), FEATURES)


def test_the_size_stands_in_the_formulas(run: pvae.Run):
    found = formulas(run.experiment)
    assert found["model"] == "p(x, z | library) = p(z) p(x | z, library)"
    assert found["guide"].endswith("q(z | x)")


def test_samples_have_sizes_of_training_rows_or_those_given(run: pvae.Run):
    drawn = sample(run, n=50).covariates["library"]
    assert set(drawn.flatten().tolist()) <= set(run.data.train.rows[:, -1].tolist())
    wanted: Any = {"library": 30.0}
    given = sample(run, n=20, mean=True, given=wanted)
    torch.testing.assert_close(given.x.sum(1), torch.full((20,), 30.0), rtol=1e-5, atol=1e-4)
    mean = run.decoder(torch.zeros(2, 2), library=torch.tensor([[10.0], [100.0]])).sum(1)
    torch.testing.assert_close(mean, torch.tensor([10.0, 100.0]))


def test_densities_given_the_size_are_not_compared_with_others(run: pvae.Run, tmp_path: Path):
    other = pvae.fit(
        declared({"kind": "negative_binomial"}, name="whole"), data=counts(), run_dir=tmp_path, progress=False
    )
    with pytest.raises(DataError, match="log density of x given its sum and of x"):
        compare([run, other], tmp_path / "out")


def test_dispersions_differ_between_the_levels_of_a_label(tmp_path: Path):
    x, kind = counts()
    plan = declared({"kind": "negative_binomial", "dispersion": "y", "size": "library"}, covariates={"y": {"codes": 3}})
    found = pvae.fit(plan, data=Dataset.of((x, kind)), run_dir=tmp_path, progress=False)
    assert found.pair.model.decoder.likelihood.log_count.shape == (3, FEATURES)
    assert (found.pair.model.decoder.likelihood.log_count != 1).all()


@pytest.mark.parametrize(
    ("likelihood", "match"),
    [
        ({"size": "batch"}, "decoder.likelihood.size: expected one of library, learned, or the name"),
        ({"size": "y"}, "decoder.likelihood.size"),
        ({"dispersion": "cell"}, "dispersion: expected one of shared, feature, decoder, y, or the name"),
    ],
)  # fmt: skip
def test_an_owner_that_is_no_entry_of_the_row_is_refused(likelihood: dict[str, str], match: str):
    with pytest.raises(DeclarationError, match=match):
        declared(
            {"kind": "negative_binomial", **likelihood},
            covariates={"y": {"codes": 3}},
            decoder={
                "network": NETWORK,
                "given": ["z", "y"],
                "likelihood": {"kind": "negative_binomial", **likelihood},
            },
        )


def test_cells_are_fitted_to_a_layer_with_labels(tmp_path: Path):
    """The zoo entry, from an AnnData object and from its file."""
    x, kind = counts()
    cells, genes = (pandas.Index([f"{i}" for i in range(n)], dtype=object) for n in x.shape)  # no text of pandas 3
    obs = pandas.DataFrame({"kind": kind}, index=cells)
    adata = anndata.AnnData(x + 1, obs, pandas.DataFrame(index=genes), layers={"counts": x})
    adata.write_h5ad(tmp_path / "cells.h5ad")
    few = ("train.epochs=1", "train.engine=eager")
    passed = Dataset.from_anndata(adata, layer="counts", labels="kind")
    file = [f"data={{source='h5ad',path='{tmp_path}/cells.h5ad',layer='counts',labels='kind'}}"]
    one = pvae.fit("cells", *few, data=passed, run_dir=tmp_path / "one", progress=False)
    two = pvae.fit("cells", *few, *file, run_dir=tmp_path / "two", progress=False)
    assert torch.equal(one.data.train.rows, two.data.train.rows)
    assert torch.equal(one.data.train.y, two.data.train.y)
    named = "data={source='tensor',layer='counts',labels='kind'}"
    same = pvae.fit("cells", named, *few, data=adata, run_dir=tmp_path / "four", progress=False)
    assert torch.equal(one.data.train.rows, same.data.train.rows)
    assert torch.equal(one.data.train.y, same.data.train.y)
    with pytest.raises(DataError, match=r"data.layer, data.labels: expected AnnData.*got ndarray"):
        pvae.fit("cells", named, *few, data=x, run_dir=tmp_path / "five", progress=False)
    other = pvae.fit("cells", *few, data=adata, run_dir=tmp_path / "three", progress=False)  # the matrix X, no labels
    assert other.data.train.y is None
    assert groups(two).separated.keys() == {"label"}


def test_a_covariate_holds_the_size(tmp_path: Path):
    x, kind = counts()
    total = {"depth": x.sum(1), "batch": kind}
    given: Any = {"depth": 30.0, "batch": 1}
    covariates: dict[str, Any] = {"depth": {"dim": 1, "of": "depth", "transform": "none"}}
    covariates["batch"] = {"codes": 3, "of": "batch"}
    likelihood = {"kind": "negative_binomial", "size": "depth", "dispersion": "batch"}
    plan = declared(likelihood, covariates=covariates)
    found = pvae.fit(plan, data=x, covariates=total, run_dir=tmp_path, progress=False)
    rows = found.data.train.rows
    assert torch.equal(rows[:, -2], rows[:, :-2].sum(1))
    assert sample(found, n=3, mean=True, given=given).x.sum(1).tolist() == pytest.approx([30.0] * 3, rel=1e-5)
    with pytest.raises(DeclarationError, match="given.depth: expected numbers that are not negative; got -3"):
        sample(found, n=3, given=given | {"depth": -3.0})
    with pytest.raises(DataError, match="expected a value of depth, finite numbers that are not negative; got .*-1"):
        pvae.fit(plan, data=x, covariates=total | {"depth": x.sum(1) * 0 - 1}, run_dir=tmp_path, progress=False)
    covariates["depth"].pop("transform")
    with pytest.raises(DeclarationError, match="with transform = 'none'"):
        declared(likelihood, covariates=covariates)
