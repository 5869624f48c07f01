"""Mixtures by EM: monotone, equal to scikit-learn's and to SVI's, exact resume, remedies, what is refused."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, union-attr"

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.mixture import GaussianMixture
from torch import Tensor

import pvae
from pvae.analysis import evidence, surgery
from pvae.data import Dataset
from pvae.distributions.base import FactoredNormal
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Train
from pvae.graph.site import Law
from pvae.models.likelihoods import base as likelihoods
from pvae.models.likelihoods.base import ClosedForm, Likelihood
from pvae.objectives.base import Loss
from pvae.objectives.elbo import TraceELBO
from pvae.objectives.em import EM
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.training.evaluation import evaluate
from pvae.util.threads import threads
from tests.runs_shared import assert_same, interrupted

DIAG = {"kind": "normal", "scale": "per_datum"}
SHARED = {"kind": "normal", "scale": "shared"}
FIXED = {"kind": "normal", "scale": "fixed", "value": 0.5}
FULL = {"kind": "multivariate_normal", "floor": 0.0}
TIED = {"kind": "multivariate_normal", "covariance": "tied", "floor": 0.0}
BERNOULLI = {"kind": "bernoulli"}
POISSON = {"kind": "poisson"}
CATEGORICAL = {"kind": "categorical", "levels": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run with one thread: on tensors as small as these a second one mostly waits."""
    with threads(1):
        yield


def standardised(x: np.ndarray) -> Tensor:
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


IRIS, WINE = standardised(load_iris().data), standardised(load_wine().data)
DIGITS = torch.tensor(load_digits().data[:500], dtype=torch.float32)
BITS, LEVELS = (DIGITS > 7).float(), (DIGITS / 4.01).floor()
REAL, WHOLE = (DIAG, SHARED, FIXED, FULL, TIED), (BERNOULLI, POISSON, CATEGORICAL)
DATA = [*((one, WINE[:, :5]) for one in REAL), (BERNOULLI, BITS), (POISSON, DIGITS), (CATEGORICAL, LEVELS)]
every_likelihood = pytest.mark.parametrize(("likelihood", "x"), DATA, ids=[str(one) for one, _ in DATA])


def declared(likelihood: dict[str, Any], codes: int = 3, prior: str = "categorical", **more: Any) -> Experiment:
    """A mixture; `more` are tables of the declaration."""
    objective = {"kind": "em", **more.pop("objective", {})}
    train = {"epochs": 20, "batch_size": 64, "keep": "last", "engine": "eager", **more.pop("train", {})}
    return Experiment.from_dict(
        {
            "latents": {"c": {"codes": codes, "prior": prior}},
            "decoder": {"network": "table", "likelihood": likelihood},
            "data": {"source": "tensor"},
            "objective": objective,
            "train": train,
            **more,
        }
    )


def dataset(x: Tensor) -> Dataset:
    """All rows as training data; some of them again to validate and test."""
    return Dataset.from_tensors(x, validation=x[:20], test=x[:20])


def fit(what: Experiment | Pair, x: Tensor, where: Path, **options: Any) -> pvae.Run:
    return pvae.fit(what, data=dataset(x), run_dir=where, device="cpu", progress=False, **options)


def log_likelihoods(run: pvae.Run, column: str = "elbo") -> np.ndarray:
    """Of the training data before every M-step, and after the last one."""
    rows = run.metrics.query("split == 'train'")[column].to_numpy()
    return rows if column != "elbo" else np.append(rows, evaluate(run.pair, run.data.train.x, 0)["elbo"])


def components(pair: Pair) -> Any:
    """p(x | c) of every code."""
    decoder = pair.model.decoder
    return decoder({"c": torch.eye(len(decoder.network.weight), dtype=torch.float64)})


def covariances(d: Any) -> np.ndarray:
    if isinstance(d, FactoredNormal):
        return (d.scale_tril @ d.scale_tril.mT).detach().numpy()
    return d.variance.detach().numpy()


def events(run: pvae.Run, kind: str) -> list[str]:
    return [line for line in (run.path / "events.jsonl").read_text().splitlines() if f'"kind": "{kind}"' in line]


# ---------------------------------------------------------------------- never falls


@every_likelihood
@pytest.mark.parametrize("start", ["kmeans++", "rows", "weights"])
def test_log_likelihood_never_falls(tmp_path, likelihood, x, start):
    run = fit(declared(likelihood, 4, objective={"start": start}, seed=3), x, tmp_path)
    found = log_likelihoods(run)
    assert len(found) == 21
    assert np.diff(found).min() > -1e-9
    assert found[-1] > found[1] + 0.01  # after one step alike components would stay as they are
    assert not events(run, "empty")


@pytest.mark.parametrize("likelihood", [DIAG, TIED, BERNOULLI], ids=str)
def test_hard_likelihood_never_falls(tmp_path, likelihood):
    run = fit(declared(likelihood, 5, objective={"hard": True}), BITS if likelihood is BERNOULLI else IRIS, tmp_path)
    found = -log_likelihoods(run, "loss")
    assert np.diff(found).min() > -1e-9
    assert found[-1] > found[0] + 0.01


@every_likelihood
def test_the_maximum_is_one(likelihood, x):
    # The weighted log-likelihood has no gradient left in anything that the M-step sets; with Poisson and Bernoulli
    # elements that are zero in all data the maximum lies at a bound, where the gradient is small, not zero.
    experiment = declared(likelihood, 4)
    pair, x = experiment.build(tuple(x.shape[1:])), x.double()
    module = pair.model.decoder.likelihood
    weights, origin = torch.rand(4, len(x)).double() ** 3, x.mean(0)
    with torch.no_grad():
        form = module.closed_form()
        h = form.maximise(weights.sum(1), weights @ form.statistics(x, origin), origin)
    h = h.requires_grad_()
    value = (weights * module(h.unflatten(1, module.inputs)[:, None]).log_prob(x)).sum()
    free = [h, *module.parameters()]
    gradients = torch.autograd.grad(value, free)
    assert max(float(g.abs().max()) for g in gradients) < (1e-8 if likelihood in REAL else 1e-2)
    with torch.no_grad():
        shifted = h + 0.01 * torch.randn_like(h)
        assert (weights * module(shifted.unflatten(1, module.inputs)[:, None]).log_prob(x)).sum() < value


@pytest.mark.parametrize("likelihood", [DIAG, FULL, TIED], ids=str)
def test_far_from_the_origin_nothing_cancels(tmp_path, likelihood):
    x = (WINE[:, :3] * 64).round() / 64  # exact in single precision even beside 2^16
    near, far = (
        components(fit(declared(likelihood, objective={"start": "rows"}), rows, tmp_path).pair)
        for rows in (x, x + 2**16)
    )
    np.testing.assert_allclose(covariances(far), covariances(near), rtol=1e-8)
    np.testing.assert_allclose((far.mean - 2**16).detach(), near.mean.detach(), atol=1e-8)


# ---------------------------------------------------------------------- equal to scikit-learn


def begun(likelihood: dict[str, Any], means: np.ndarray, weights: np.ndarray, factors: np.ndarray) -> Pair:
    """A pair of given parameters: `factors` are scales (K, D), or Cholesky factors (K, D, D) or (D, D)."""
    pair = declared(likelihood, len(means), objective={"start": "weights"}).build(means.shape[1:])
    module, d = pair.model.decoder.likelihood, means.shape[1]
    rows = [torch.tensor(means)]
    factor = torch.tensor(factors)
    if likelihood is DIAG:
        rows.append(factor.log() - module.offset)
    else:
        scale, (row, column) = factor.diagonal(dim1=-2, dim2=-1), torch.tril_indices(d, d, -1)
        free = [0.5 * (scale**2 - module.floor).log() - module.offset, factor[..., row, column] / scale[..., row]]
        rows += free if module.full else []
        if not module.full:
            module.factor.data.copy_(torch.cat(free))
    pair.model.decoder.network.weight.data.copy_(torch.cat(rows, 1))
    pair.model.priors["c"].logits.data.copy_(torch.tensor(weights).log())
    return pair


@pytest.mark.parametrize("iterations", [1, 40])
@pytest.mark.parametrize(
    ("covariance", "likelihood"), [("diag", DIAG), ("full", {**FULL, "floor": 1e-6}), ("tied", {**TIED, "floor": 1e-3})]
)
def test_equals_gaussian_mixture(tmp_path, covariance, likelihood, iterations):
    x, k = WINE[:, :6].double().numpy(), 4
    means, weights = x[[3, 40, 99, 150]], np.array([0.1, 0.2, 0.3, 0.4])
    spread = np.linalg.cholesky(np.cov(x.T) / 2)
    factors = {"diag": np.full((k, 6), 0.7), "full": np.stack([spread] * k), "tied": spread}[covariance]
    whole = factors**2 if covariance == "diag" else factors @ np.swapaxes(factors, -1, -2)
    peer = GaussianMixture(
        k,
        covariance_type=covariance,
        tol=0.0,
        max_iter=iterations,
        reg_covar=likelihood.get("floor", 0.0),
        means_init=means,
        weights_init=weights,
        precisions_init=1 / whole if covariance == "diag" else np.linalg.inv(whole),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        peer.fit(x)
    pair = begun(likelihood, means, weights, factors)
    train = Train(epochs=iterations, batch_size=50, keep="last")
    run = fit(pair, WINE[:, :6], tmp_path, objective=EM(start="weights"), train=train)
    d = components(run.pair)
    np.testing.assert_allclose(d.mean.detach().numpy(), peer.means_, atol=1e-6)
    found = covariances(d)
    np.testing.assert_allclose(found, np.broadcast_to(peer.covariances_, found.shape), atol=1e-6)
    np.testing.assert_allclose(run.pair.model.priors["c"].logits.softmax(0).tolist(), peer.weights_, atol=1e-6)
    assert evaluate(run.pair, run.data.train.x, 0)["elbo"] == pytest.approx(peer.score(x), abs=1e-6)
    assert log_likelihoods(run)[-2] == pytest.approx(peer.lower_bound_, abs=1e-6)
    assert log_likelihoods(run)[-1] > log_likelihoods(run)[0] + 0.1


@pytest.mark.parametrize("seed", [0, 5])
def test_the_hard_limit_is_k_means(tmp_path, seed):
    blurred = {**FIXED, "value": 8.0}  # p(c | x) is far from 0 and 1
    experiment = declared(
        blurred, 10, "uniform", objective={"hard": True}, train={"epochs": 40, "batch_size": 200}, seed=seed
    )
    run = fit(experiment, DIGITS, tmp_path)
    x = DIGITS.double().numpy()
    centres, _ = kmeans_plusplus(x, 10, random_state=seed)
    peer = KMeans(10, init=centres, n_init=1, algorithm="lloyd", tol=0.0, max_iter=40).fit(x)
    np.testing.assert_allclose(components(run.pair).mean.detach().numpy(), peer.cluster_centers_, atol=1e-6)
    loss = log_likelihoods(run, "loss")
    assert peer.n_iter_ < 40  # both have come to rest
    # -log max_c p(x, c) = log K + D/2 log(2 pi s^2) + |x - m_c|^2 / (2 s^2)
    variance = components(run.pair).variance[0, 0].item()
    inertia = 2 * variance * len(x) * (loss - math.log(10) - 32 * math.log(2 * math.pi * variance))
    assert inertia[-1] == pytest.approx(peer.inertia_, rel=1e-9)
    assert inertia[0] > inertia[-1] + 1000
    assert run.pair.model.priors["c"].logits.tolist() == [0.0] * 10


# ---------------------------------------------------------------------- the same model by SVI


@pytest.mark.fast("{'kind': 'normal', 'scale': 'per_datum'}")
@pytest.mark.parametrize("likelihood", [DIAG, {**FULL, "value": 1.0}], ids=str)
def test_gradients_reach_the_same_likelihood(tmp_path, likelihood):
    # From the same start to the same maximum, by 500 steps of Adam in single precision: within 2e-3 nats.
    x = IRIS[:, :2] + 3 * torch.arange(3).repeat(50)[:, None]
    exact = fit(declared(likelihood, 3, train={"epochs": 200}), x, tmp_path)
    steps = {"epochs": 500, "batch_size": 150, "optimizer": {"kind": "adam", "lr": 0.05}, "schedule": "cosine"}
    experiment = declared(likelihood, 3, objective={"kind": "trace_elbo"}, train={**steps, "validate_every": 500})
    pair = experiment.build((2,))
    assert {p.dtype for p in pair.parameters()} == {torch.float32}
    start = fit(declared(likelihood, 3, train={"epochs": 1}), x, tmp_path)
    pair.load_state_dict(start.pair.state_dict())
    run = fit(pair, x, tmp_path, train=experiment.train)
    want, found = log_likelihoods(exact)[-1], evaluate(run.pair, x, 0)["elbo"]
    assert found == pytest.approx(want, abs=2e-3)
    assert want > log_likelihoods(start)[-1] + 0.01


@every_likelihood
def test_loss_and_gradient_are_pyros(likelihood, x):
    pair, x = declared(likelihood).build(tuple(x.shape[1:])), x[:30].double()
    value, _ = Loss(TraceELBO(), pair)(x)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x) / len(x)
    assert value.item() == pytest.approx(theirs.item(), rel=1e-12)
    parameters = list(pair.parameters())
    for mine, want in zip(torch.autograd.grad(value, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)
        assert mine.any()


def test_rows_share_their_factor(monkeypatch):
    # K n D^2 numbers would be 50 times as many as K D^2.
    sizes, solve = [], torch.linalg.solve_triangular

    def counted(factor: Tensor, columns: Tensor, *, upper: bool) -> Tensor:
        lead = torch.broadcast_shapes(factor.shape[:-2], columns.shape[:-2])
        sizes.append(math.prod(lead) * factor.shape[-1] ** 2)
        return solve(factor, columns, upper=upper)

    monkeypatch.setattr(torch.linalg, "solve_triangular", counted)
    pair = declared(FULL, 4).build((6,))
    pair.terms(torch.randn(50, 6).double()).reconstruction.sum().backward()
    assert sizes == [4 * 6 * 6]


def test_sums_of_wide_data_take_few_rows_at_a_time(monkeypatch):
    # Full covariances have D^2 / 2 statistics a row: 2 GB for 1000 images of 28 x 28 pixels, in float64.
    monkeypatch.setattr(likelihoods, "BLOCK_NUMBERS", 100)
    form = declared(FULL, 4).build((6,)).model.decoder.likelihood.closed_form()
    x, weights, origin = torch.randn(50, 6).double(), torch.rand(4, 50).double(), torch.zeros(6).double()
    counted: list[int] = []
    one = form.statistics

    def statistics(rows: Tensor, at: Tensor) -> Tensor:
        counted.append(one(rows, at).numel())
        return one(rows, at)

    monkeypatch.setattr(form, "statistics", statistics)
    found = form.sums(weights, x, origin)
    square = torch.einsum("kn,ni,nj->kij", weights, x, x)[:, *torch.tril_indices(6, 6)]
    torch.testing.assert_close(found, torch.cat([weights @ x, square], 1), rtol=1e-12, atol=1e-12)
    assert max(counted) <= 100


# ---------------------------------------------------------------------- batches, and going on


@pytest.mark.parametrize("likelihood", [FULL, SHARED], ids=str)
def test_batch_size_does_not_matter(tmp_path, likelihood):
    runs = [fit(declared(likelihood, train={"batch_size": size}), WINE, tmp_path) for size in (7, 64, 1000)]
    first = dict(runs[0].pair.state_dict())
    for run in runs[1:]:
        for name, value in run.pair.state_dict().items():
            torch.testing.assert_close(value, first[name], rtol=0, atol=1e-10)
        np.testing.assert_allclose(log_likelihoods(run), log_likelihoods(runs[0]), rtol=0, atol=1e-10)
    assert len({run.metrics["step"].max() for run in runs}) == 3


@pytest.mark.parametrize("step", [1, 7, 8])
@pytest.mark.parametrize("objective", [{}, {"hard": True}], ids=str)
def test_resume_in_an_epoch_is_bit_for_bit(tmp_path, objective, step):
    # 178 rows in batches of 50: four steps to an epoch; step 7 is the last of the second.
    experiment = declared(DIAG, 5, objective=objective, train={"epochs": 5, "batch_size": 50})
    straight = fit(experiment, WINE, tmp_path / "straight")
    part = interrupted(experiment, tmp_path / "part", step + 1, data=dataset(WINE))
    saved = checkpoint.latest(part / "checkpoints")
    assert saved.tensors["progress"]["counts"].sum().item() == pytest.approx(min(178, 50 * ((step % 4) + 1)))
    done = pvae.resume(pvae.Run.load(part, data=dataset(WINE)), device="cpu", progress=False)
    assert_same(straight, done)
    columns = ["epoch", "elbo", "loss"]
    assert done.metrics[columns].equals(straight.metrics[columns])


def test_a_run_is_read_back_in_double_precision(tmp_path):
    run = fit(declared(FULL), WINE, tmp_path)
    again = pvae.Run.load(run.path, data=dataset(WINE))
    assert {p.dtype for p in again.pair.parameters()} == {torch.float64}
    assert torch.equal(again.pair.model.decoder.network.weight, run.pair.model.decoder.network.weight)
    assert again.pair.check(WINE) == []


# ---------------------------------------------------------------------- remedies


def far_away(likelihood: dict[str, Any] = FIXED) -> Pair:
    """Components at -1, 1 and 10 000: nothing belongs to the last."""
    pair = declared(likelihood, 3).build((2,))
    weight = pair.model.decoder.network.weight
    weight.data.zero_()
    weight.data[:, :2] = torch.tensor([-1.0, 1.0, 1e4])[:, None]
    return pair


TWO = torch.cat([torch.randn(60, 2, generator=torch.Generator().manual_seed(1)) * 0.3 + m for m in (-1.0, 1.0)])
OUTLIER = torch.tensor([[0.5, -4.0]])


@pytest.mark.parametrize("likelihood", [FIXED, FULL], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_an_empty_component_moves_to_the_least_likely_datum(tmp_path, likelihood, hard):
    x = torch.cat([TWO, OUTLIER])
    objective = EM(start="weights", hard=hard)
    run = fit(far_away(likelihood), x, tmp_path, objective=objective, train=Train(epochs=1, batch_size=50, keep="last"))
    d = components(run.pair)
    assert d.mean[2].tolist() == pytest.approx(OUTLIER[0].tolist(), abs=1e-9)
    assert run.pair.model.priors["c"].logits.softmax(0)[2].item() == pytest.approx(1 / 122, rel=1e-9)
    (event,) = events(run, "empty")
    assert "c: component 2 empty, moved to the least likely data" in event
    if likelihood is FULL:  # as spread out as all data are
        want = np.cov(x.double().numpy().T, bias=True)
        np.testing.assert_allclose(covariances(d)[2], want, atol=1e-9)


def test_an_empty_component_may_be_an_error(tmp_path):
    with pytest.raises(DataError, match=r"c: expected data for each of 3 components; got none for 2\..*'restart'"):
        fit(far_away(), TWO, tmp_path, objective=EM(start="weights", empty="stop"))
    (run,) = (pvae.Run.load(path.parent, data=dataset(TWO), pair=far_away()) for path in tmp_path.glob("*/*/spec.toml"))
    assert run.status["state"] == "failed"


def test_a_component_moved_to_a_binary_datum_keeps_every_value_possible():
    form = declared(BERNOULLI).build((4,)).model.decoder.likelihood.closed_form()
    x, mean = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double(), torch.tensor([0.2, 0.6, 0.0, 0.5]).double()
    moved = form.maximise(torch.ones(1).double(), form.around(x, mean, torch.zeros(4).double()), mean)
    assert moved.sigmoid()[0].tolist() == pytest.approx([0.1, 0.8, 0.5, 0.25])


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (FULL, r"full rank for component \d; got a singular one, of .* data in 3 dimensions. Set likelihood.floor to"),
        (TIED, r"full rank for all components; got a singular one, of 150 data in 3 dimensions. Set likelihood.floor"),
    ],
    ids=["full", "tied"],
)
def test_a_singular_covariance_is_an_error(tmp_path, likelihood, message):
    flat = torch.cat([IRIS[:, :2], IRIS[:, :1] + 2 * IRIS[:, 1:2]], 1)
    with pytest.raises(DataError, match=message):
        fit(declared(likelihood), flat, tmp_path)
    run = fit(declared({**likelihood, "floor": 1e-4}), flat, tmp_path)
    assert math.isfinite(log_likelihoods(run)[-1])


def test_more_codes_than_rows_are_refused(tmp_path):
    with pytest.raises(DeclarationError, match=r"codes: expected at most 30, one for each training row; got 31\."):
        fit(declared(FIXED, 31), WINE[:30], tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is refused

TABLE = {"network": "table", "likelihood": "normal"}
CODE = {"codes": 3}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two latents": (
        {"latents": {"c": CODE, "d": CODE}, "decoder": {"given": ["c", "d"], "likelihood": "normal"}},
        r"latents: expected exactly one latent, with codes, for the objective em",
    ),
    "a vector": (
        {"latents": {"z": {"dim": 3}}, "decoder": TABLE},
        r"latents\.z\.posterior: expected exact, of a latent with codes, for the objective em; got \"normal\"",
    ),
    "a prior of vectors": (
        {"latents": {"z": {"dim": 3}}, "decoder": TABLE},
        r"latents\.z\.prior: expected categorical or uniform, of a latent with codes, .*; got \"standard_normal\"",
    ),
    "a network": (
        {"latents": {"c": CODE}, "decoder": {"network": "mlp", "likelihood": "normal"}},
        r"decoder\.network: expected table for the objective em; got \"mlp\"",
    ),
    "no closed form": (
        {"latents": {"c": CODE}, "decoder": {"network": "table", "likelihood": "discretized_logistic"}},
        r"decoder\.likelihood: expected one with a closed form \(bernoulli, categorical, multivariate_normal, normal, "
        r"poisson\) for the objective em; got \"discretized_logistic\"",
    ),
    "beta": (
        {"latents": {"c": CODE}, "decoder": TABLE, "objective": {"kind": "em", "beta": 0.5}},
        r"objective: expected beta = 1 and free_bits = 0 with em",
    ),
    "free bits": (
        {"latents": {"c": CODE}, "decoder": TABLE, "objective": {"kind": "em", "free_bits": 0.5}},
        r"objective: expected beta = 1 and free_bits = 0 with em",
    ),
    "alternation": (
        {"latents": {"c": CODE}, "decoder": TABLE, "train": {"alternate": 2}},
        r"train\.alternate: expected 0, because the objective em takes no gradient steps; got 2",
    ),
    "an average": (
        {"latents": {"c": CODE}, "decoder": TABLE, "train": {"average": 0.9}},
        r"train\.average: expected nothing, because the objective em takes no gradient steps; got 0\.9",
    ),
}


@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=list(BAD))
def test_refused(raw, message):
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict({"objective": "em", **raw})


def test_every_refusal_is_the_objectives():
    for name, (raw, _) in BAD.items():
        assert Experiment.from_dict({**raw, "objective": "trace_elbo"}), name


def test_a_hand_written_pair_must_be_a_mixture(tmp_path):
    pair = Experiment.from_dict({"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "normal"}}).build((13,))
    with pytest.raises(DeclarationError, match="pair: expected a declared mixture for the objective em"):
        fit(pair, WINE, tmp_path, objective=EM())
    with pytest.raises(DeclarationError, match="train.average: expected nothing, because the objective em takes no"):
        fit(far_away(), TWO, tmp_path, objective=EM(), train=Train(average=0.9))


def test_a_table_has_one_input():
    with pytest.raises(DeclarationError, match="network table: expected one input .* got c, label"):
        Experiment.from_dict(
            {
                "latents": {"c": CODE},
                "covariates": {"label": {"codes": 2}},
                "decoder": {**TABLE, "given": ["c", "label"]},
                "objective": "em",
            }
        ).build((5,))


def test_the_declared_closed_forms_have_one():
    made = {kind: member for kind, member in Likelihood.members.items() if member.__module__.startswith("pvae.")}
    for kind, member in made.items():
        table = {"kind": kind, **({"levels": 3} if kind == "categorical" else {})}
        module = Likelihood.parse(table).over([Law("normal")] * 4).build((4,))
        assert isinstance(module.closed_form(), ClosedForm) == bool(member.closed_form), kind


# ---------------------------------------------------------------------- what the analyses say


@pytest.mark.parametrize("likelihood", [DIAG, FULL], ids=str)
def test_surgery_and_evidence_are_exact(tmp_path, likelihood):
    run = fit(declared(likelihood), WINE, tmp_path)
    found, want = surgery(run.pair, WINE), log_likelihoods(run)[-1]
    assert {figure.kind for figure in (found.elbo, found.kl, found.mutual_information, found.marginal_kl)} == {"exact"}
    assert found.elbo.value == pytest.approx(want, abs=1e-9)
    parts = found.mutual_information.value + found.marginal_kl.value
    assert parts == pytest.approx(found.kl.value, abs=1e-9)
    assert found.kl.value > 0.5
    assert evidence(run.pair, WINE, samples=2).iwae.value == pytest.approx(want, abs=1e-9)
    assert found.marginal_kl.value == pytest.approx(0, abs=0.01)  # the M-step makes the prior the mean of p(c | x)


@pytest.mark.parametrize("name", ["em_mixture", "kmeans"])
@pytest.mark.parametrize("kind", ["em", "trace_elbo"])
def test_the_zoo_runs(tmp_path, name, kind):
    run = pvae.fit(name, f"objective.kind={kind}", "train.epochs=3", run_dir=tmp_path, device="cpu", progress=False)
    elbo = run.metrics.query("split == 'train'")["elbo"]
    assert elbo.iloc[-1] > elbo.iloc[0]
