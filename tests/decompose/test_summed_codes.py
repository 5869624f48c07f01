"""Surgery of discrete latents against sums over all joint states in NumPy."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pvae.analysis.decompose.surgery import surgery
from tests.decompose.pairs import Array, coded, small


def symmetric(k: int, error: float) -> Array:
    """A k-ary symmetric channel, `(k, 1, k)`."""
    return (np.full((k, k), error / (k - 1)) + np.eye(k) * (1 - error - error / (k - 1)))[:, None]


# Mutual information of even inputs, nats: log K - H of the channel.
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


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("positions", [1, 3, 20])
def test_a_deterministic_code_says_its_entropy(positions, certain):
    # 20 positions of 5 have more joint states than can be summed: only a certain code is exact there.
    rng = np.random.default_rng(positions)
    used = rng.integers(0, 4, (40, positions))[rng.integers(0, 12, 40)]  # 12 joint codes at most, code 4 never
    found = surgery(coded(np.eye(5)[used], certain=certain), torch.arange(40).double()[:, None])
    _, counts = np.unique(used, axis=0, return_counts=True)
    joint = -(counts / 40 * np.log(counts / 40)).sum()
    singles = [np.bincount(column, minlength=5) / 40 for column in used.T]
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in singles]
    pooled = np.mean(singles, 0)
    perplexity = math.exp(-(pooled[pooled > 0] * np.log(pooled[pooled > 0])).sum())
    assert found.mutual_information.value == pytest.approx(joint, abs=1e-8)
    assert found.kl.value == pytest.approx(positions * math.log(5), abs=1e-9)
    assert found.kl_exact.value == pytest.approx(positions * math.log(5), abs=1e-9)
    assert found.marginal_kl.value == pytest.approx(positions * math.log(5) - joint, abs=1e-8)
    assert found.latents["c"].pooled_perplexity == pytest.approx(perplexity, abs=1e-8)
    assert joint <= sum(entropies) + 1e-12 <= positions * math.log(perplexity) + 1e-9
    if certain:
        assert found.mutual_information.kind == found.elbo.kind == "exact"
    if positions > 1:
        parts = found.latents["c"].dimensions
        assert parts.mutual_information == pytest.approx(entropies, abs=1e-8)
        assert parts.coordinate_kl.value == pytest.approx(positions * math.log(5) - sum(entropies), abs=1e-8)
        assert parts.total_correlation.value == pytest.approx(sum(entropies) - joint, abs=1e-8)
