"""Surgery and evidence against exact truths: linear VAE, Gaussian channels, coordinates, labels."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import exact
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from tests.decompose.pairs import channel, coded, correlated, number, small, with_global

Array = np.ndarray


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


# q: elbo, closed-form KL, mutual information, marginal KL (n = 1000), found with NumPy in float64.
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
    assert evidence(pair, test, samples=5).iwae.value == pytest.approx(15.5197, abs=1e-4)  # NumPy, float64


# dim, noise variance, n, draws: mutual information +- its own error (NumPy, converged, default_rng(0)).
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
    some = torch.where(y == 2, torch.nan, y.double())  # the rows of one cluster have no label: they are in no class
    found = surgery(pair, x, labels=some)
    assert sorted(found.classes) == [0, 1]
    assert found.label_information.value == pytest.approx(math.log(2), abs=1e-6)
    assert surgery(pair, x, labels=torch.full((300,), torch.nan)).label_information is None
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
    whole, some = (surgery(pair, x, samples=4, components=c, population=None) for c in (None, 100))
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


def test_classes_add_up_with_global_latents_and_codes():
    y = torch.arange(300) % 3
    found = surgery(with_global(), torch.linspace(-1, 1, 300), labels=y, samples=2)
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
