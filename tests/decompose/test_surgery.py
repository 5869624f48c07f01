"""Surgery and evidence against exact truths: linear VAE, Gaussian channels, hierarchies; and what they leave alone."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose import account
from pvae.analysis.decompose.account import GUIDE_ROWS
from pvae.analysis.decompose.aggregated import AggregatedPosterior
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, exact, over_draws
from pvae.distributions.exponential import Normals
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair

Array = np.ndarray
ROOT = Path(__file__).parents[2]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---------------------------------------------------------------------- linear VAE = probabilistic PCA


def digits() -> Array:
    return load_digits().data[:1000] / 16


class PPCA:
    """Maximum likelihood of x = W z + mu + eps, in closed form (NumPy, float64)."""

    def __init__(self, x: Array, q: int) -> None:
        self.mu = x.mean(0)
        values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
        values, vectors = values[::-1], vectors[:, ::-1]
        self.s2 = values[q:].mean()
        self.w = vectors[:, :q] * np.sqrt(values[:q] - self.s2)
        self.m = values[:q]
        d = x.shape[1]
        self.kl = 0.5 * np.log(values[:q] / self.s2).sum()
        self.log_p = -0.5 * (d * math.log(2 * math.pi) + np.log(values[:q]).sum() + (d - q) * np.log(self.s2) + d)


def linear_pair(q: int) -> Experiment:
    network = {"kind": "mlp", "hidden": []}
    return Experiment.from_dict(
        {
            "latents": {"z": {"dim": q}},
            "encoder": {"kind": "shared", "network": network},
            "decoder": {"network": network, "likelihood": {"kind": "normal", "scale": "shared"}},
        }
    )


def analytic(x: Array, q: int) -> tuple[Pair, PPCA]:
    """The declared linear pair in float64 with the closed-form weights."""
    pair, truth = linear_pair(q).build((x.shape[1],)).double(), PPCA(x, q)
    posterior = (truth.w / truth.m).T
    log_variance = np.log(truth.s2 / truth.m)
    decoder, encoder = pair.model.decoder, pair.guide.posteriors["z"].network.head
    with torch.no_grad():
        decoder.network.head.weight.copy_(torch.tensor(truth.w))
        decoder.network.head.bias.copy_(torch.tensor(truth.mu))
        decoder.likelihood.log_scale.fill_(0.5 * math.log(truth.s2))
        encoder.weight.copy_(torch.tensor(np.vstack([posterior, np.zeros_like(posterior)])))
        encoder.bias.copy_(torch.tensor(np.concatenate([-posterior @ truth.mu, log_variance])))
    return pair, truth


# q: elbo, closed-form KL, mutual information, marginal KL (n = 1000); shared/TRUTHS.md, found with NumPy in float64.
PPCA_TRUTHS = {2: (-0.036594, 2.470584, 2.303, 0.167), 10: (18.688612, 13.065748, 6.615, 6.451)}


@pytest.fixture(scope="module", params=PPCA_TRUTHS, ids=lambda q: f"q={q}")
def ppca(request: pytest.FixtureRequest) -> tuple[int, Pair, PPCA, Surgery]:
    """The pair, its truth and its surgery with 20 draws."""
    x = digits()
    pair, truth = analytic(x, request.param)
    return request.param, pair, truth, surgery(pair, torch.tensor(x), samples=20)


def test_linear_vae(ppca):
    # The Monte Carlo error is .013 for the marginal KL and .002 for the information: 4 to 10 standard errors.
    q, _, truth, found = ppca
    elbo, kl, information, marginal = PPCA_TRUTHS[q]
    assert (truth.log_p, truth.kl) == pytest.approx((elbo, kl), abs=1e-6)
    assert found.elbo.value == pytest.approx(elbo, abs=1e-4)
    assert found.kl_exact is not None
    assert found.kl_exact.value == pytest.approx(kl, abs=1e-4)
    assert found.kl_exact.kind == "exact"
    assert found.elbo.standard_error < 1e-6
    assert found.mutual_information.value == pytest.approx(information, abs=0.02)
    assert found.marginal_kl.value == pytest.approx(marginal, abs=0.06)
    assert found.kl.value == pytest.approx(kl, abs=5 * found.kl.standard_error)
    assert found.latents["z"].active_units == (truth.m - truth.s2 > 0.01 * truth.m**2 / (truth.m - truth.s2)).sum()


def test_linear_vae_per_dimension(ppca):
    _, _, truth, found = ppca
    # KL of coordinate i, mean over the data: 1/2 ln(l_i / s2), because the second moments of q_agg are 1.
    assert found.latents["z"].kl_per_dimension == pytest.approx(0.5 * np.log(truth.m / truth.s2), abs=1e-6)


def test_sum_rules(ppca):
    _, _, _, s = ppca
    assert s.elbo.value == pytest.approx(s.reconstruction.value - s.kl.value, abs=1e-12)
    assert s.kl.value == pytest.approx(s.mutual_information.value + s.marginal_kl.value, abs=1e-12)
    z = s.latents["z"]
    assert (z.kl.value, z.mutual_information.value) == pytest.approx((s.kl.value, s.mutual_information.value))
    assert s.mutual_information.value <= s.log_n.value == math.log(1000)


def test_evidence_of_the_true_posterior_is_log_p(ppca):
    _, pair, truth, _ = ppca
    for samples in (1, 2, 50):
        found = evidence(pair, torch.tensor(digits()), samples=samples)
        assert found.iwae.value == pytest.approx(truth.log_p, abs=1e-4)
        assert found.elbo.value == pytest.approx(truth.log_p, abs=1e-4)
        if samples == 1:  # one draw cannot tell noise from spread
            assert found.iwae.note == "conservative"
        else:
            assert found.iwae.standard_error < 1e-6
        assert found.ess.tolist() == pytest.approx([samples] * 1000, rel=1e-6)
        assert found.iwae.kind == found.elbo.kind == "lower_bound"


def test_evidence_of_unseen_rows():
    pair, _ = analytic(digits(), 10)
    test = torch.tensor(load_digits().data[1350:] / 16)
    assert evidence(pair, test, samples=5).iwae.value == pytest.approx(15.5197, abs=1e-4)  # shared/TRUTHS.md


# ---------------------------------------------------------------------- Gaussian channels


def channel(scale: Callable[[Tensor], Tensor], *, blind: bool = False) -> Pair:
    """q(z | x) = N(x, scale^2) under the prior N(0, I); a blind guide does not look at x."""

    def model(x):
        gain = pyro.param("gain", number(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(gain * z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.full_like(x, 0.3) if blind else x
            pyro.sample("z", dist.Normal(loc, scale(x)).to_event(1))

    return Pair(model=model, guide=guide)


# dim, noise variance, n, draws: mutual information +- its own error; shared/TRUTHS.md (converged, default_rng(0)).
CHANNELS = {
    "d2, n=100": (2, 0.25, 100, 60, 1.3085, 0.0015),
    "d2, n=1000": (2, 0.25, 1000, 40, 1.3828, 0.0017),
    "d10, n=1000": (10, 0.1, 1000, 20, 6.8512, 0.0007),
}


@pytest.mark.parametrize(("d", "s2", "n", "samples", "want", "error"), CHANNELS.values(), ids=list(CHANNELS))
def test_gaussian_channel(d, s2, n, samples, want, error):
    # 4 standard errors of both sides: one new seed in 5000 fails.
    means = torch.tensor(np.random.default_rng(0).standard_normal((n, d)) * math.sqrt(1 - s2))
    found = surgery(channel(lambda x: torch.full_like(x, s2**0.5)), means, samples=samples)
    information = found.mutual_information
    assert abs(information.value - want) < 4 * math.hypot(information.standard_error, error)
    kl = 0.5 * (d * (s2 - 1 - math.log(s2)) + means.square().sum(1).mean().item())
    assert found.kl_exact.value == pytest.approx(kl, abs=1e-9)


@pytest.mark.parametrize(("a", "want"), [(0.5, 0.1114214822), (1.0, 0.3368308203), (2.0, 0.6327201940)])
def test_binary_input_in_unit_noise(a, want):
    # x = +-a: MI = ln 2 - E ln(1 + exp(-2 a (a + eps))); 4 standard errors, one new seed in 5000 fails.
    x = torch.tensor([[a], [-a]]).double().repeat(500, 1)
    found = surgery(channel(torch.ones_like), x, samples=40)
    assert abs(found.mutual_information.value - want) < 4 * found.mutual_information.standard_error
    assert found.mutual_information.standard_error < 0.005
    assert found.kl_exact.value == pytest.approx(a * a / 2, abs=1e-12)
    assert abs(found.marginal_kl.value - (a * a / 2 - want)) < 4 * found.marginal_kl.standard_error


@pytest.mark.parametrize("n", [2, 100, 3000])
def test_disjoint_posteriors_tell_every_row_apart(n):
    # Neighbours are 20 scales apart: another row's density is at most e^-100 of the own, no digit of float64.
    x = torch.arange(n).double()[:, None] - n / 2
    found = surgery(channel(lambda x: torch.full_like(x, 0.05)), x, samples=2)
    assert found.mutual_information.value == pytest.approx(math.log(n), abs=1e-6 if n > 100 else 1e-10)
    assert found.log_n == exact(math.log(n))


def test_blind_posterior_knows_nothing():
    x = torch.randn(300, 3).double()
    found = surgery(channel(lambda x: torch.full_like(x, 0.7), blind=True), x, samples=3)
    assert found.mutual_information.value == pytest.approx(0, abs=1e-12)
    assert found.marginal_kl.value == pytest.approx(found.kl.value, abs=1e-12)
    assert found.latents["z"].active_units == 0


# ---------------------------------------------------------------------- coordinates, labels, another prior


def correlated(rho: float, n: int) -> Tensor:
    """Rows of a normal law with unit variances and correlation rho."""
    covariance = np.array([[1.0, rho], [rho, 1.0]])
    return torch.tensor(np.random.default_rng(2).multivariate_normal([0, 0], covariance, n))


def test_total_correlation_of_a_normal_aggregate():
    # q_agg is N(0, C + s2 I) up to 4000 rows: TC = -1/2 log(1 - r^2). Its error over data sets is about .02.
    rho, s2 = 0.8, 0.1
    x = correlated(rho, 4000)
    found = surgery(channel(lambda x: torch.full_like(x, s2**0.5)), x, samples=4)
    parts = found.latents["z"].dimensions
    want = -0.5 * math.log(1 - (rho / (1 + s2)) ** 2)
    assert parts.total_correlation.value == pytest.approx(want, abs=0.06)
    # one-dimensional aggregates are N(0, 1.1) against N(0, 1): nearly nothing
    one = 0.5 * (1 + s2 - 1 - math.log(1 + s2))
    assert parts.marginal_kl == pytest.approx([one, one], abs=0.01)
    assert parts.mutual_information == pytest.approx([0.5 * math.log((1 + s2) / s2)] * 2, abs=0.03)


@pytest.mark.parametrize("samples", [1, 3])
def test_coordinates_add_up_to_the_marginal_kl(samples):
    found = surgery(channel(lambda x: torch.full_like(x, 0.4)), correlated(0.5, 500), samples=samples)
    parts = found.latents["z"].dimensions
    whole = parts.total_correlation.value + parts.coordinate_kl.value
    assert found.marginal_kl.value == pytest.approx(whole, abs=1e-12)
    assert parts.coordinate_kl.value == pytest.approx(sum(parts.marginal_kl), abs=1e-10)
    rows = {name: e for name, e, _ in found.rows()}
    assert rows["total_correlation"] is parts.total_correlation
    assert rows["coordinate_kl"] is parts.coordinate_kl
    assert parts.error < 1e-3
    assert set(found.to_dict()["latents"]["z"]["dimensions"]) >= {"total_correlation", "mutual_information", "error"}


def test_one_coordinate_has_no_split():
    found = surgery(channel(torch.ones_like), torch.randn(50, 1).double())
    assert found.latents["z"].dimensions is None


def test_leave_one_out_is_the_mean_over_the_others():
    x = correlated(0.2, 60)
    found = surgery(channel(lambda x: torch.full_like(x, 0.3)), x, samples=50)
    noise = torch.randn(400, 60, 2).double() * 0.3
    log_q = torch.distributions.Normal(0.0, 0.3).log_prob(noise).sum(-1)
    gaps = torch.distributions.Normal(x, 0.3).log_prob((x + noise)[:, :, None]).sum(-1)
    gaps[:, torch.arange(60), torch.arange(60)] = -math.inf
    terms = log_q - (gaps.logsumexp(2) - math.log(59))
    error = math.hypot(found.leave_one_out.standard_error, float(terms.mean(0).std() / 60**0.5 / 20))
    assert found.leave_one_out.kind == "upper_bound"
    assert found.leave_one_out.value == pytest.approx(float(terms.mean()), abs=5 * error)
    assert found.leave_one_out.value > found.mutual_information.value


def test_classes_are_the_means_over_their_rows():
    x, y = correlated(0.0, 300), torch.arange(300) % 3
    found = surgery(channel(lambda x: torch.full_like(x, 0.4)), x, samples=2, labels=y)
    assert sorted(found.classes) == [0, 1, 2]
    for term in ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl"):
        parts = [getattr(c, term).value * c.n for c in found.classes.values()]
        assert sum(parts) / 300 == pytest.approx(getattr(found, term).value, abs=1e-10)
    plain = surgery(channel(lambda x: torch.full_like(x, 0.4)), x, samples=2)
    assert plain.elbo == found.elbo
    assert plain.classes == {}
    assert plain.label_information is None
    assert found.to_dict()["classes"]["1"]["kl"]["value"] == found.classes[1].kl.value


def test_label_information_is_that_of_the_class_mixtures():
    # Three far clusters: the label is known from z, I[y, z] = log 3; labels at random: nearly nothing.
    y = torch.arange(300) % 3
    x = correlated(0.0, 300) * 0.1 + 10.0 * y[:, None]
    pair = channel(lambda x: torch.full_like(x, 0.1))
    assert surgery(pair, x, labels=y).label_information.value == pytest.approx(math.log(3), abs=1e-6)
    shuffled = y[torch.randperm(300)]
    broad = channel(lambda x: torch.full_like(x, 5.0))
    assert surgery(broad, x, labels=shuffled).label_information.value == pytest.approx(0, abs=0.02)


def test_a_uniform_byte_has_eight_bits_and_a_real_number_none():
    def program(law: Any) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc = pyro.param("loc", number(0.0))
                pyro.sample("z", dist.Normal(loc.expand(2), 1.0).to_event(1))
                if law is not None:
                    pyro.sample("x", law.to_event(1), obs=x)

        return run

    x = torch.randint(0, 256, (30, 3)).double()
    found = surgery(Pair(program(dist.Categorical(torch.ones(3, 256).double())), program(None)), x)
    assert found.elements == 3
    assert found.elbo.value == pytest.approx(-3 * math.log(256), abs=1e-9)
    assert found.bits_per_dimension.value == pytest.approx(8, abs=1e-9)
    real = surgery(Pair(program(dist.Normal(torch.zeros(3).double(), 1.0)), program(None)), x / 256)
    assert real.elements is None
    assert real.bits_per_dimension is None


def test_covariates_are_no_elements_and_rounded_numbers_are():
    decoder = {"given": ["z", "y"], "network": {"kind": "mlp", "hidden": [4]}}
    latents = {"z": {"dim": 2}}
    table = {"covariates": {"y": {"codes": 3}}, "latents": latents, "decoder": decoder}
    x = torch.cat([(torch.rand(20, 6) > 0.5).float(), torch.ones(20, 1)], 1)
    found = surgery(Experiment.from_dict(table).build((6,)), x)
    assert found.elements == 6
    assert found.bits_per_dimension.value == pytest.approx(-found.elbo.value / 6 / math.log(2), abs=1e-9)
    grey = Experiment.from_dict({"latents": latents, "decoder": {"likelihood": "discretized_logistic"}}).build((6,))
    assert surgery(grey, torch.rand(20, 6).mul(255).round() / 255).elements == 6


def test_bare_numbers_under_a_point_of_a_guide_are_taken_apart():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("half", torch.tensor(0.5).double()) * x))

    x = torch.randn(7).double()
    found = surgery(Pair(model, guide), x)
    want = torch.distributions.Normal(x / 2, 1.0).log_prob(x).mean()
    assert found.reconstruction.value == pytest.approx(float(want), abs=1e-9)


def test_labels_must_fit():
    x = torch.randn(10, 2).double()
    with pytest.raises(DataError, match=r"labels: expected 10 integers; got shape \[9\]"):
        surgery(channel(torch.ones_like), x, labels=torch.zeros(9, dtype=torch.long))
    with pytest.raises(DataError, match="float32"):
        surgery(channel(torch.ones_like), x, labels=torch.zeros(10))
    with pytest.raises(DataError, match="at most 1000 classes; got 1100"):
        surgery(channel(torch.ones_like), torch.randn(1100, 2).double(), labels=torch.arange(1100))


def test_q_agg_of_the_training_rows_as_the_prior_of_others():
    pair = channel(lambda x: torch.full_like(x, 0.4))
    x = correlated(0.3, 400)
    same = surgery(pair, x, samples=1, train=x)
    assert same.train_gain.value == pytest.approx(same.marginal_kl.value, abs=1e-9)
    others = surgery(pair, x[:200], samples=1, train=x[200:])
    assert others.train_gain.value < others.marginal_kl.value  # what was not seen is priced higher


def test_a_subset_of_components_gives_two_bounds():
    pair, x = channel(lambda x: torch.full_like(x, 0.4)), correlated(0.3, 600)
    whole, some = surgery(pair, x, samples=4), surgery(pair, x, samples=4, components=100)
    assert whole.mutual_information_lower is whole.marginal_kl_upper is None
    assert (some.mutual_information.kind, some.mutual_information_lower.kind) == ("upper_bound", "lower_bound")
    assert (some.marginal_kl.kind, some.marginal_kl_upper.kind) == ("lower_bound", "upper_bound")
    # Random subsets move each side by a few hundredths; the exact figure lies between.
    assert some.mutual_information_lower.value - 0.05 < whole.mutual_information.value
    assert whole.mutual_information.value < some.mutual_information.value + 0.05
    assert some.kl.value == pytest.approx(some.mutual_information.value + some.marginal_kl.value, abs=1e-12)
    upper = some.mutual_information_lower.value + some.marginal_kl_upper.value
    assert some.kl.value == pytest.approx(upper, abs=1e-12)
    assert any("I_q stands between two bounds" in note for note in some.notes)
    assert " to " in some.headline()


def test_an_unknown_posterior_is_scored_by_the_guide():
    def model(x):
        bias = pyro.param("bias", number(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.log() + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x, 0.4).to_event(1))

    x = torch.randn(200, 1).double()
    found = surgery(Pair(model=model, guide=guide), x, samples=1)
    # log is one to one: the information is that of the normal channel on the same noise
    same = surgery(channel(lambda x: torch.full_like(x, 0.4)), x, samples=1)
    assert found.mutual_information.value == pytest.approx(same.mutual_information.value, abs=1e-9)
    assert found.marginal_kl.value == pytest.approx(same.marginal_kl.value, abs=1e-9)
    assert found.latents["z"].dimensions is None


# ---------------------------------------------------------------------- codes


def coded(table: Array, prior: Array | None = None, rows: int = 1) -> Pair:
    """q(c | x = i) = table[i] `(inputs, P, K)` and a factorised prior; x is the input's number."""
    log_q = torch.tensor(table).clamp(min=1e-300).log()
    log_p = torch.zeros(table.shape[1:]).double() if prior is None else torch.tensor(prior).log()

    def model(x):
        gain = pyro.param("gain", number(1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=log_p).to_event(1))
            pyro.sample("x", dist.Normal(gain * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=log_q[x[:, 0].long()]).to_event(1))

    return Pair(model=model, guide=guide)


def symmetric(k: int, error: float) -> Array:
    """A k-ary symmetric channel, `(k, 1, k)`."""
    return (np.full((k, k), error / (k - 1)) + np.eye(k) * (1 - error - error / (k - 1)))[:, None]


# Mutual information of even inputs, nats; shared/TRUTHS.md, and log 2 - H(.25) for the third.
CODES = {
    "binary symmetric .1": (symmetric(2, 0.1), 0.3680642072),
    "10-ary symmetric .1": (symmetric(10, 0.1), 1.7577796619),
    "binary symmetric .25": (symmetric(2, 0.25), math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
    "deterministic": (np.eye(5)[:, None], math.log(5)),
    "blind": (np.full((4, 1, 3), 1 / 3), 0.0),
}


@pytest.mark.parametrize(("table", "want"), CODES.values(), ids=list(CODES))
@pytest.mark.parametrize("copies", [1, 30])
def test_codes_are_summed_over_exactly(table, want, copies):
    x = torch.arange(len(table)).double().repeat(copies)[:, None]
    found = surgery(coded(table), x)
    k = table.shape[2]
    q = table[:, 0]
    entropy = -(q * np.log(np.maximum(q, 1e-300))).sum(1).mean()
    mean = q.mean(0)
    assert found.mutual_information.kind == found.kl.kind == found.marginal_kl.kind == "exact"
    assert found.mutual_information.value == pytest.approx(want, abs=1e-8)
    assert found.kl.value == pytest.approx(math.log(k) - entropy, abs=1e-8)
    assert found.marginal_kl.value == pytest.approx(math.log(k) + (mean * np.log(mean)).sum(), abs=1e-8)
    assert found.kl_exact.value == pytest.approx(found.kl.value, abs=1e-8)
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value, abs=1e-10)
    assert found.latents["c"].perplexity[0] == pytest.approx(math.exp(-(mean * np.log(mean)).sum()))


@pytest.mark.parametrize(("positions", "states"), [(3, 4), (6, 4)])
def test_positions_share_what_the_joint_code_says_once(positions, states):
    # By enumeration in NumPy; 4^6 = 4096 joint states are the most that are summed over.
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(states), (5, positions))
    prior = rng.dirichlet(np.ones(states), positions)
    found = surgery(coded(table, prior), torch.arange(5.0).double()[:, None])
    grids = np.stack(np.meshgrid(*[np.arange(states)] * positions, indexing="ij"), -1).reshape(-1, positions)
    q = np.prod([table[:, p][:, grids[:, p]] for p in range(positions)], axis=0)
    p = np.prod([prior[i][grids[:, i]] for i in range(positions)], axis=0)
    mean = q.mean(0)
    assert found.mutual_information.value == pytest.approx((q * np.log(q / mean)).sum(1).mean(), abs=1e-8)
    assert found.marginal_kl.value == pytest.approx((mean * np.log(mean / p)).sum(), abs=1e-8)
    parts = found.latents["c"].dimensions
    singles = table.mean(0)
    information = [(table[:, i] * np.log(table[:, i] / singles[i])).sum(1).mean() for i in range(positions)]
    assert parts.mutual_information == pytest.approx(information, abs=1e-8)
    assert parts.coordinate_kl.value == pytest.approx((singles * np.log(singles / prior)).sum(), abs=1e-8)
    split = parts.total_correlation.value + parts.coordinate_kl.value
    assert split == pytest.approx(found.marginal_kl.value, abs=1e-8)


def test_more_states_than_can_be_summed_are_drawn():
    # Seven positions of four: an estimate, against the exact sum in NumPy; 4 standard errors, one in 16 000.
    table = np.random.default_rng(1).dirichlet(np.ones(4) / 2, (6, 7))
    found = surgery(coded(table), torch.arange(6.0).double().repeat(50)[:, None], samples=30)
    assert found.mutual_information.kind == "estimate"
    grids = np.stack(np.meshgrid(*[np.arange(4)] * 7, indexing="ij"), -1).reshape(-1, 7)
    q = np.prod([table[:, p][:, grids[:, p]] for p in range(7)], axis=0)
    want = (q * np.log(np.maximum(q, 1e-300) / q.mean(0))).sum(1).mean()
    assert abs(found.mutual_information.value - want) < 4 * found.mutual_information.standard_error + 1e-9
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-12)


# ---------------------------------------------------------------------- evidence and errors


def test_evidence_rises_with_samples_and_stays_below_log_p():
    # Noise N(x / 4, .9) for the true posterior N(x / 2, .5): 4 standard errors, four comparisons, one in 5000.
    def model(x):
        bias = pyro.param("bias", number(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 4, 0.9**0.5).to_event(1))

    x = torch.tensor(np.random.default_rng(6).standard_normal((300, 3)) * 2**0.5)
    log_p = scipy.stats.norm.logpdf(x.numpy(), 0, 2**0.5).sum(1)
    pair = Pair(model=model, guide=guide)
    found = {k: evidence(pair, x, samples=k).iwae for k in (1, 4, 32, 512)}
    for few, many in ((1, 4), (4, 32), (32, 512)):
        error = math.hypot(found[few].standard_error, found[many].standard_error)
        assert found[many].value > found[few].value - 4 * error
    assert found[32].value > found[1].value + 10 * found[32].standard_error
    last = evidence(pair, x, samples=2000)
    assert last.iwae.value == pytest.approx(log_p.mean(), abs=4 * last.iwae.standard_error + 1e-3)
    np.testing.assert_allclose(last.log_p.numpy(), log_p, atol=0.5)
    # The ELBO exactly: log p - KL(q || posterior), per coordinate.
    kl = 0.5 * (0.9 / 0.5 - 1 - math.log(0.9 / 0.5) + ((x / 4) ** 2 / 0.5)).sum(1).mean().item()
    assert last.elbo.value == pytest.approx(log_p.mean() - kl, abs=4 * last.elbo.standard_error)
    assert last.gap == pytest.approx(kl, abs=4 * math.hypot(last.elbo.standard_error, last.iwae.standard_error) + 1e-3)


# The spread of a deviation estimated from 200 seeds is 5 %: 20 % is 4 of them, one new set of seeds in 10 000 each.
SPREADS = {
    "kl": lambda pair, x, seed: surgery(pair, x, samples=8, seed=seed).kl,
    "elbo": lambda pair, x, seed: surgery(pair, x, samples=8, seed=seed).elbo,
    "reconstruction": lambda pair, x, seed: surgery(pair, x, samples=8, seed=seed).reconstruction,
    "mutual information": lambda pair, x, seed: surgery(pair, x, samples=8, seed=seed).mutual_information,
    "marginal kl": lambda pair, x, seed: surgery(pair, x, samples=8, seed=seed).marginal_kl,
    "evidence, elbo": lambda pair, x, seed: evidence(pair, x, samples=50, seed=seed).elbo,
    "evidence, iwae": lambda pair, x, seed: evidence(pair, x, samples=200, seed=seed).iwae,
}


@pytest.mark.parametrize("figure", SPREADS.values(), ids=list(SPREADS))
def test_standard_error_is_the_spread_over_seeds(figure):
    x = torch.tensor(np.random.default_rng(3).standard_normal((40, 2)))
    pair = channel(lambda x: torch.full_like(x, 0.9)).adopt(x)  # wider than the posterior: weights of finite variance
    found = [figure(pair, x, seed) for seed in range(200)]
    spread = np.std([e.value for e in found], ddof=1)
    claimed = math.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert claimed == pytest.approx(spread, rel=0.2)


def test_one_draw_says_conservative_and_errs_on_that_side():
    x = torch.tensor(np.random.default_rng(3).standard_normal((200, 2)))
    pair = channel(lambda x: torch.full_like(x, 0.5))
    one, many = surgery(pair, x), surgery(pair, x, samples=20)
    for name in ("reconstruction", "kl", "elbo", "mutual_information", "marginal_kl"):
        assert getattr(one, name).note == "conservative"
        assert getattr(many, name).note == ""
        assert getattr(one, name).standard_error > 0.9 * math.sqrt(20) * getattr(many, name).standard_error
    assert "conservative" in one.to_frame().loc["kl", "note"]


def test_over_draws_by_hand():
    terms = torch.tensor([[1.0, 4.0], [3.0, 8.0]])  # means 2 and 6; variances 2 and 8; their mean over 2 draws
    found = over_draws(terms)
    assert found.value == 4.0
    assert found.standard_error == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)
    assert found.data_error == pytest.approx(np.std([2, 6], ddof=1) / math.sqrt(2))
    assert float(found) == 4.0
    assert str(found) == f"4.0000 +- {found.standard_error:.4f} (estimate)"
    assert str(exact(2.5)) == "2.5000 (exact)"
    assert Estimate(1.0, 0.1, "lower_bound").to_dict()["kind"] == "lower_bound"


# ---------------------------------------------------------------------- hierarchies

A, B, C = np.array([[0.8], [-0.5]]), np.array([[0.3], [0.6]]), np.array([[0.9]])
S2, S1 = 0.4, 0.3


def two_levels(link: float = 1.0) -> Pair:
    """q(z2 | x) = N(x A, S2), q(z1 | x, z2) = N(x B + link z2 C, S1); the model p(z2) p(z1 | z2) p(x | z1)."""
    a, b, c = (torch.tensor(t) for t in (A, B, C))

    def model(x):
        slope = pyro.param("slope", torch.ones(1, 2).double())
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(0.5 * z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ slope, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x @ a, S2**0.5).to_event(1))
            pyro.sample("z1", dist.Normal(x @ b + link * (z2 @ c), S1**0.5).to_event(1))

    return Pair(model=model, guide=guide)


def joint_posterior(x: Array, link: float) -> tuple[Array, Array]:
    """Means `(n, 2)` and covariance of (z2, z1) given x, as one dense normal."""
    c = link * C[0, 0]
    mean = np.concatenate([x @ A, x @ B + c * (x @ A)], 1)
    return mean, np.array([[S2, c * S2], [c * S2, S1 + c * c * S2]])


def dense_log_q_agg(z: Array, mean: Array, covariance: Array) -> Array:
    precision = np.linalg.inv(covariance)
    gap = z[:, None] - mean
    log_q = -0.5 * (np.einsum("mnd,de,mne->mn", gap, precision, gap) + np.log(np.linalg.det(2 * np.pi * covariance)))
    top = log_q.max(1, keepdims=True)
    return (top + np.log(np.exp(log_q - top).mean(1, keepdims=True)))[:, 0]


def hierarchy_rows(n: int) -> Array:
    return np.random.default_rng(4).standard_normal((n, 2)) * 1.5


@pytest.mark.parametrize("link", [0.0, 1.0, -2.0])
def test_a_mixture_run_by_the_guide_is_the_dense_mixture(link):
    x = hierarchy_rows(300)
    pair = two_levels(link).adopt(torch.tensor(x))
    with torch.no_grad():
        d = draw(pair, torch.tensor(x))
    z = d.flat(["z2", "z1"])
    got = AggregatedPosterior.of(pair, torch.tensor(x)).log_prob(z)
    np.testing.assert_allclose(got.numpy(), dense_log_q_agg(z.numpy(), *joint_posterior(x, link)), rtol=0, atol=1e-10)


def test_a_mixture_run_by_the_guide_is_the_product_normal_when_levels_are_independent():
    x = torch.tensor(hierarchy_rows(300))
    pair = two_levels(0.0).adopt(x)
    with torch.no_grad():
        d = draw(pair, x)
    z = d.flat(["z2", "z1"])
    got = AggregatedPosterior.of(pair, x).log_prob(z)
    loc, scale = (torch.cat([getattr(z, side) for z in d.latents.values()], 1) for side in ("loc", "scale"))
    product = AggregatedPosterior(Normals(loc, scale))
    torch.testing.assert_close(got, product.log_prob(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [100, GUIDE_ROWS + 200])
@pytest.mark.parametrize("link", [0.0, 1.0])
def test_joint_information_of_two_levels(n, link):
    # Against 20 dense draws of every row; 4 standard errors, four rows: one new seed in 4000 fails.
    x = hierarchy_rows(n)
    found = surgery(two_levels(link), torch.tensor(x), samples=3)
    mean, covariance = joint_posterior(x, link)
    noise = np.random.default_rng(5).multivariate_normal([0, 0], covariance, size=(20, n))
    own = scipy.stats.multivariate_normal([0, 0], covariance).logpdf(noise)
    terms = own - np.stack([dense_log_q_agg(mean + e, mean, covariance) for e in noise])
    information = found.mutual_information
    assert abs(information.value - terms.mean()) < 4 * math.hypot(
        information.standard_error, terms.std() / terms.size**0.5
    )
    assert found.kl.value == pytest.approx(information.value + found.marginal_kl.value, abs=1e-12)
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value, abs=1e-12)
    assert 0 < information.value < math.log(n)


def test_a_hierarchy_has_rows_for_every_level():
    x = torch.tensor(hierarchy_rows(GUIDE_ROWS + 200))
    found = surgery(two_levels(), x, samples=2)
    rows = {name: e for name, e, _ in found.rows()}
    levels = {f"{z}.{term}" for z in ("z2", "z1") for term in ("kl", "mutual_information", "marginal_kl")}
    assert levels < set(rows)
    # q(z1 | x, z2) reads z2: no aggregated posterior of its own. p(z2) and q(z2 | x) read no other latent.
    assert rows["z1.mutual_information"] is rows["z1.marginal_kl"] is None
    assert found.latents["z2"].kl_exact.kind == "exact"
    assert found.latents["z1"].kl_exact.kind == found.kl_exact.kind == "estimate"
    z2 = found.latents["z2"]
    assert z2.kl.value == pytest.approx(z2.mutual_information.value + z2.marginal_kl.value, abs=1e-12)
    assert found.kl.value == pytest.approx(found.latents["z1"].kl.value + z2.kl.value, abs=1e-12)
    assert found.notes == (f"joint I_q over 2 levels: 512 of {len(x)} draws, each under all {len(x)} components",)
    assert {"z2.kl", "z1.kl", "elbo"} <= set(found.to_frame().index)
    assert {"z1", "z2"} == set(found.to_dict()["latents"])
    assert "z2.mutual_information" in str(found)


def test_a_level_that_reads_no_other_has_information_but_no_marginal_under_a_conditional_prior():
    found = surgery(two_levels(0.0), torch.tensor(hierarchy_rows(100)), samples=2)
    assert found.notes == ()
    assert found.latents["z1"].mutual_information is not None
    assert found.latents["z1"].marginal_kl is None
    assert found.latents["z2"].marginal_kl is not None


def test_a_single_level_has_no_rows_of_its_own():
    found = surgery(channel(torch.ones_like), torch.randn(9, 2).double())
    assert not [name for name, _, _ in found.rows() if "." in name]


# ---------------------------------------------------------------------- what is left alone


class Noisy(PyroModule):
    """A model with a parameter, dropout and batch statistics: everything that training mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.noise = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.noise).to_event(1), obs=x)


def noisy_pair() -> Pair:
    def guide(x):
        slope = pyro.param("slope", torch.full((3, 2), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, 0.5).to_event(1))

    return Pair(model=Noisy(), guide=guide)


ANALYSES = {
    "surgery": lambda pair, x, seed: surgery(pair, x, samples=2, seed=seed).to_dict(),
    "evidence": lambda pair, x, seed: evidence(pair, x, samples=7, seed=seed).to_dict(),
}
every_analysis = pytest.mark.parametrize("analyse", ANALYSES.values(), ids=list(ANALYSES))


@every_analysis
@pytest.mark.parametrize("training", [True, False])
def test_analysis_moves_nothing(analyse, training):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x).train(training)
    pyro.param("mine", torch.tensor(4.0))
    state = {name: t.clone() for name, t in pair.state_dict().items()}
    random = torch.get_rng_state()
    analyse(pair, x, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in pair.state_dict().items())
    assert {m.training for m in pair.modules()} == {training}
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())
    assert torch.is_grad_enabled()
    assert torch.distributions.Distribution._validate_args
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.clear_param_store()


@every_analysis
def test_analysis_keeps_the_mode_of_every_module(analyse):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x).train()
    pair.model.net[1].eval()  # frozen batch statistics in a pair that trains
    modes = [m.training for m in pair.modules()]
    analyse(pair, x, 0)
    assert [m.training for m in pair.modules()] == modes


@every_analysis
def test_same_seed_same_numbers(analyse):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x)
    first = analyse(pair, x, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert analyse(pair, x, 5) == first
    assert analyse(pair.eval(), x, 5) == first
    assert analyse(pair, x, 6) != first


FRESH = """
from pvae.analysis import Surgery, Evidence, surgery, evidence
import pvae.analysis.decompose.surgery, pvae.analysis.bounds.evidence, pvae.analysis
assert callable(surgery) and callable(evidence), (surgery, evidence)
assert callable(pvae.analysis.surgery) and callable(pvae.analysis.evidence), pvae.analysis.surgery
"""


def test_package_names_mean_the_functions_whatever_was_imported_first():
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("analysis", [surgery, evidence])
def test_analysis_refuses_what_it_cannot_analyse(analysis):
    pair = channel(torch.ones_like)
    with pytest.raises(DataError, match=r"got samples=0"):
        analysis(pair, torch.zeros(3, 2).double(), samples=0)
    analysis(pair, torch.zeros(3, 2).double(), samples=1)
    for shape in ((0, 2), (3, 5), (3, 2, 1), ()):
        with pytest.raises(DataError, match=r"expected at least one row, of shape \(2\)"):
            analysis(pair, torch.zeros(shape), samples=1)


@pytest.mark.parametrize("analysis", [surgery, evidence])
def test_analysis_takes_other_types_of_the_same_numbers(analysis):
    pair = channel(torch.ones_like)
    wanted = analysis(pair, torch.ones(4, 2).double(), samples=3).elbo.value
    for x in (torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64), np.ones((4, 2))):
        assert analysis(pair, x, samples=3).elbo.value == wanted


# ---------------------------------------------------------------------- found in review


class BottomUp(torch.nn.Module):
    """Model p(z2) p(z1 | z2) p(x | z1), guide q(z1 | x) q(z2 | z1): the prior of z1 reads what was inferred from it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.w * z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.8 * x, 0.6))
            pyro.sample("z2", dist.Normal(0.5 * z1, 0.9))


def test_bottom_up_guide_has_no_closed_form_for_what_it_reads_back():
    module = BottomUp()
    pair = Pair(module.model, module.guide)
    x = torch.linspace(-1, 1, 50)
    assert pair.dependencies(x).bottom_up == {"z1"}
    found = surgery(pair, x, samples=50)
    assert found.latents["z1"].kl_exact is None
    assert found.kl_exact is None
    assert found.latents["z1"].kl_per_dimension is None
    assert two_levels().dependencies(torch.zeros(5, 2).double()).bottom_up == set()


def test_a_latent_whose_scale_alone_reads_another_is_no_first_level():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h = torch.nn.Parameter(torch.tensor(0.5))

        def model(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(0.0, (a / 2).exp()))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(self.h * x, 1.0))
                pyro.sample("b", dist.Normal(self.h * x, (a / 2).exp()))

    module = Scaled()
    found = surgery(Pair(module.model, module.guide), torch.linspace(-2, 2, 40), samples=3)
    assert found.latents["b"].mutual_information is None
    assert found.latents["b"].kl_exact.kind == "estimate"
    assert "joint I_q" in found.notes[0]


class WithGlobal(torch.nn.Module):
    """x_i ~ N(z_i + b, 1) with one global b: log p is a joint Gaussian over all rows."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("b", dist.Normal(self.loc, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))


def test_global_latents_count_once_and_are_no_evidence_per_datum():
    module = WithGlobal()
    pair, x = Pair(module.model, module.guide), torch.linspace(-1, 1, 2500)
    found = surgery(pair, x, samples=2)
    rows = {name: e for name, e, _ in found.rows()}
    assert rows["elbo"].value == pytest.approx(
        rows["reconstruction"].value - rows["kl"].value - rows["global_kl"].value, abs=1e-12
    )
    exact = float(torch.distributions.kl_divergence(dist.Normal(0.3, 0.1), dist.Normal(0.0, 1.0)))
    assert found.shared["b"] == pytest.approx(exact, abs=4)  # one draw: its spread is below one nat
    with pytest.raises(DataError, match="got global b"):
        evidence(pair, x)
    from pvae.training.evaluation import evaluate

    assert evaluate(pair, x, 0)["kl/b"] == pytest.approx(exact / 2500, abs=4 / 2500)


def test_a_plate_left_of_the_data_keeps_rows_apart():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.5))

        def model(self, x):
            rows = pyro.plate("data", len(x), dim=-1)
            with rows, pyro.plate("units", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with rows:
                pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1), pyro.plate("units", 3, dim=-2):
                pyro.sample("z", dist.Normal(self.w * x * torch.arange(1.0, 4.0)[:, None], 0.3))

    module = Wide()
    x = torch.linspace(-3, 3, 30)
    found = surgery(Pair(module.model, module.guide), x, samples=400)
    means = 0.5 * x.double()[:, None] * torch.arange(1.0, 4.0).double()
    want = AggregatedPosterior(Normals(means, torch.full_like(means, 0.3)))
    z = means + 0.3 * torch.randn(4000, 30, 3, dtype=torch.float64)
    own = dist.Normal(means, 0.3).log_prob(z).sum(-1)
    information = float((own - want.log_prob(z)).mean())
    assert found.mutual_information.value == pytest.approx(information, abs=0.03)
    kl = 0.5 * (means**2 + 0.09 - 1 - math.log(0.09)).sum(1).mean()
    assert found.kl_exact.value == pytest.approx(float(kl), abs=1e-5)


def small(model: Callable, guide: Callable) -> Pair:
    """A pair of two functions, with one parameter to have one."""

    def with_parameter(x):
        pyro.param("unused", number(1.0))
        return guide(x)

    return Pair(model=model, guide=with_parameter)


def test_a_prior_that_varies_with_the_datum_is_not_summed_as_one():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1)))
            pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1)))

    found = surgery(small(model, guide), torch.linspace(-3, 3, 50).double(), samples=3)
    assert found.kl.value == pytest.approx(0, abs=1e-12)
    assert found.kl_exact.value == pytest.approx(0, abs=1e-12)
    assert found.kl.kind == "estimate"


def test_a_parent_that_hardly_moves_is_a_parent():
    # c is certain given x: two draws are alike, yet z reads it on both sides.
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(()).double()))
            z = pyro.sample("z", dist.Normal(3 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=40 * x))
            pyro.sample("z", dist.Normal(3 * c + 0.1 * x, 0.5))

    x = torch.tensor([2.0, -2.0]).double().repeat(50)
    found = surgery(small(model, guide), x)
    assert found.latents["z"].mutual_information is found.latents["z"].marginal_kl is None
    assert found.latents["c"].marginal_kl.value == pytest.approx(0, abs=1e-6)
    assert found.mutual_information is not None


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_a_plate_that_has_as_many_elements_as_rows_is_not_the_data(rows):
    def model(x):
        with pyro.plate("sensors", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0 * number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("sensors", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5**0.5))

    x = torch.tensor(np.random.default_rng(0).normal(size=(rows, 3)))
    pair = small(model, guide).adopt(x)
    assert (pair.layout.plate, pair.layout.dim) == ("data", -1)
    log_p = scipy.stats.norm(0, 2**0.5).logpdf(x.numpy()).sum(1).mean()
    assert surgery(pair, x).elbo.value == pytest.approx(log_p, abs=1e-9)  # the guide is the posterior


def test_weights_of_handlers_are_no_part_of_the_figures():
    pair, x = channel(lambda x: torch.full_like(x, 0.5)), torch.randn(60, 2).double()
    weighed = Pair(model=poutine.scale(pair.model, scale=0.1), guide=poutine.scale(pair.guide, scale=0.1))
    assert surgery(weighed, x).to_dict() == surgery(pair, x).to_dict()
    assert evidence(weighed, x, samples=5).to_dict() == evidence(pair, x, samples=5).to_dict()


def test_a_factor_outside_the_plate_is_shared_by_all_data():
    pair, x = channel(lambda x: torch.full_like(x, 0.5)), torch.randn(100, 2).double()

    def model(x):
        pair.model(x)
        pyro.factor("penalty", number(-5.0))

    found = surgery(Pair(model=model, guide=pair.guide), x, samples=2)
    assert found.elbo.value == pytest.approx(surgery(pair, x, samples=2).elbo.value - 0.05, abs=1e-9)
    terms = Pair(model=model, guide=pair.guide).terms(x[:10], rows=100)
    assert terms.reconstruction.shape == (10,)


class RandomGlobal(torch.nn.Module):
    """q(z | x, w) reads a global w that the guide draws."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.0))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        w = pyro.sample("w", dist.Normal(self.loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + w, 0.1))


def test_a_posterior_that_reads_a_random_global_latent_has_no_information_of_its_own():
    module, x = RandomGlobal(), torch.randn(300)
    pair = Pair(module.model, module.guide)
    found = surgery(pair, x, samples=30)
    assert found.mutual_information is found.marginal_kl is None
    assert "not available" in found.headline()
    # One draw of w is one unit of noise: the error is the spread over seeds (half to twice, with 12 seeds).
    spread = np.std([surgery(pair, x, samples=30, seed=seed).elbo.value for seed in range(12)], ddof=1)
    assert 0.5 < found.elbo.standard_error / spread < 2


def test_one_draw_of_a_global_latent_serves_all_chunks():
    module, x = RandomGlobal(), torch.zeros(2500)
    with torch.no_grad():
        d = draw(Pair(module.model, module.guide).adopt(x), x)
    means = d.latents["z"].value[:, 0].split(1000)
    assert [float(m.mean()) for m in means] == pytest.approx([float(means[0].mean())] * 3, abs=0.03)


def test_disjoint_supports_are_infinite_not_huge():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0 * number(0.0) - 9, 9.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 0.1, x + 0.1))

    x = torch.arange(5).double()
    pair = small(model, guide)
    found = surgery(pair, x, train=x + 0.5)
    assert found.mutual_information.value == pytest.approx(math.log(5))
    assert found.leave_one_out is None
    assert found.train_gain.value == -math.inf
    assert found.to_dict()["figures"]["train_gain"]["value"] is None
    assert AggregatedPosterior.of(pair, x).log_prob(torch.tensor([[20.0]])).item() == -math.inf


def test_very_small_scales_are_told():
    x = torch.randn(200, 2).double()
    fine = surgery(channel(lambda x: torch.full_like(x, 1e-2)), x)
    tiny = surgery(channel(lambda x: torch.full_like(x, 1e-8)), x)
    assert not any("known to" in note for note in fine.notes)
    assert any("scales are very small" in note for note in tiny.notes)
    assert tiny.mutual_information.value == pytest.approx(math.log(200), abs=1e-9)


def test_total_correlation_of_a_subset_is_a_lower_bound():
    x = correlated(0.5, 300)
    found = surgery(channel(lambda x: torch.full_like(x, 0.4)), x, components=50)
    assert found.latents["z"].dimensions.total_correlation.kind == "lower_bound"
    table = np.random.default_rng(1).dirichlet(np.ones(4) / 2, (6, 7))
    coded_found = surgery(coded(table), torch.arange(6.0).double().repeat(50)[:, None], components=60)
    assert coded_found.latents["c"].dimensions.total_correlation.kind == "lower_bound"


def test_error_of_a_random_subset_of_draws():
    # The spread over seeds of the scored rows is in it: half to twice, with 20 seeds.
    x = correlated(0.2, 400) * torch.linspace(0.1, 6, 400)[:, None]
    pair = channel(lambda x: torch.full_like(x, 0.4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "MULTIPLICATIONS", 400 * 4 * 40)
        found = [surgery(pair, x, samples=8, seed=seed).mutual_information for seed in range(20)]
    spread = np.std([e.value for e in found], ddof=1)
    assert 0.5 < np.mean([e.standard_error for e in found]) / spread < 2


def test_classes_add_up_with_global_latents_and_codes():
    y = torch.arange(300) % 3
    module = WithGlobal()
    found = surgery(Pair(module.model, module.guide), torch.linspace(-1, 1, 300), labels=y, samples=2)
    mean = sum(c.elbo.value * c.n for c in found.classes.values()) / 300
    assert mean == pytest.approx(found.elbo.value, abs=1e-9)
    table = np.random.default_rng(1).dirichlet(np.ones(3), (6, 2))
    found = surgery(coded(table), torch.arange(6.0).double().repeat(50)[:, None], labels=y)
    for term in ("elbo", "kl", "mutual_information", "marginal_kl"):
        mean = sum(getattr(c, term).value * c.n for c in found.classes.values()) / 300
        assert mean == pytest.approx(getattr(found, term).value, abs=1e-9)


def test_progress_is_told_to_the_end():
    told: list[tuple[int, int]] = []
    surgery(channel(torch.ones_like), torch.randn(5, 2).double(), 3, on_progress=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_code_used_as_an_index():
    centres = torch.tensor([-1.0, 0.0, 2.0]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(3).double()))
            pyro.sample("x", dist.Normal(centres[c], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=-((x[:, None] - centres) ** 2) / 2))

    x = torch.randn(40).double()
    pair = small(model, guide)
    assert pair.dependencies(x).bottom_up == set()
    log_p = np.log(np.exp(scipy.stats.norm(centres.numpy(), 1).logpdf(x.numpy()[:, None])).mean(1)).mean()
    assert surgery(pair, x, samples=400).elbo.value == pytest.approx(log_p, abs=0.02)


def test_normals_and_codes_side_by_side():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", dist.Normal(z.sum(-1) + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] * x.new_ones(2), 0.5).to_event(1))
            pyro.sample("c", dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1)))

    x = torch.randn(80).double()
    found = surgery(small(model, guide), x, samples=2, train=x)
    assert found.train_gain.value == pytest.approx(found.marginal_kl.value, abs=0.2)
    assert found.latents["c"].mutual_information.kind == "exact"
    assert found.mutual_information.kind == "estimate"
    assert found.notes == ()


def test_what_has_no_local_latent_or_no_numbers_for_labels_is_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(0 * number(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    with pytest.raises(DataError, match="expected latents of single data; got only global w"):
        surgery(small(model, lambda x: pyro.sample("w", dist.Normal(0 * number(0.0), 1.0))), torch.zeros(4).double())
    with pytest.raises(DataError, match="labels: expected 3 integers; got something else: list"):
        surgery(channel(torch.ones_like), torch.zeros(3, 2).double(), labels=["a", "b", "c"])


def test_modules_named_by_pyro_module_are_put_in_evaluation_mode():
    noisy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def model(x):
        net = pyro.module("net", noisy)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    pair, x = Pair(model=model, guide=guide).adopt(torch.randn(20, 3)), torch.randn(20, 3)
    before = noisy[1].running_mean.clone()
    first, second = surgery(pair, x), surgery(pair, x)
    assert first.elbo == second.elbo
    assert torch.equal(noisy[1].running_mean, before)
    assert any("running_mean" in name for name in pair.state_dict())
    assert surgery(pair, x[:1]).n == 1


def test_numbers_of_another_type_are_cast_before_the_first_run():
    module = BottomUp()
    assert surgery(Pair(module.model, module.guide), np.linspace(-1, 1, 9)).n == 9
