"""Collapse of latents of every kind: found where a latent carries next to nothing, and nowhere else."""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, union-attr"

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from pvae.analysis import collapse
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.training.evaluation import alerts
from tests.decompose.pairs import coded, small

INPUTS = 10
X = torch.arange(INPUTS, dtype=torch.float64).repeat(20)[:, None]
PLAN = Experiment.load("vae")


def tilted(states: int, by: float) -> np.ndarray:
    """q(c | x = i) `(inputs, K)` that leans by `by` nats towards the state i mod K."""
    logits = by * (np.arange(states) == np.arange(INPUTS)[:, None] % states)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def information(table: np.ndarray) -> float:
    """I_q of one position, nats, by scipy."""
    return float(entropy(table.mean(0)) - entropy(table, axis=1).mean())


def told(pair: Pair, x: Tensor = X) -> tuple[list[str], list[str]]:
    """The alerts of the analysis, and those of the end of a fit."""
    return list(collapse(pair, x).alerts), alerts(PLAN, pair, x, seed=0)


@pytest.mark.parametrize(
    ("states", "by", "silent"), [(10, 0.2, True), (10, 0.58, True), (10, 0.7, False), (10, 4.0, False), (2, 0.2, True)]
)
def test_one_code_that_hardly_depends_on_x_has_collapsed(states, by, silent):
    table = tilted(states, by)
    found = collapse(coded(table[:, None]), X).latents["c"].codes
    assert found.information == pytest.approx([information(table)], abs=1e-9)
    assert (information(table) <= 0.01 * math.log(states)) is silent
    assert found.silent == silent
    for lines in told(coded(table[:, None])):
        assert len(lines) == silent
        assert all("c has collapsed: it carries 0.0" in line and "objective.beta" in line for line in lines)


def test_one_code_at_a_sixtieth_of_its_nats_is_flagged():
    """A fit ended with y at .017 of 2.30 nats, spread evenly over its ten codes, and no alert."""
    lines, at_the_end = told(coded(tilted(10, 0.53)[:, None]))
    assert lines == at_the_end
    assert lines[0].startswith("c has collapsed: it carries 0.017 of 2.30 nats")


def test_positions_of_a_grid_are_told_apart():
    awake, asleep, constant = tilted(4, 3.0), np.full((INPUTS, 4), 0.25), np.eye(4)[np.zeros(INPUTS, int)]
    table = np.stack([awake, asleep, awake, constant, asleep], 1)
    found = collapse(coded(table), X).latents["c"].codes
    assert found.information == pytest.approx([information(table[:, p]) for p in range(5)], abs=1e-9)
    assert found.silent == 3
    assert told(coded(table)) == ([], [])  # the latent as a whole carries information
    assert told(coded(table[:, [0, 2]])) == ([], [])
    assert "information 0.0" in str(collapse(coded(table[:, [1, 4]]), X))


@pytest.mark.parametrize("certain", [False, True])
def test_a_constant_corner_of_a_grid_is_no_fault(certain):
    """An image with a constant background leaves positions of a good fit silent: no alert, so that --strict gives 0."""
    awake, constant = tilted(4, 6.0), np.eye(4)[np.zeros(INPUTS, int)]
    found = collapse(coded(np.stack([awake] * 12 + [constant] * 4, 1), certain=certain), X)
    assert found.latents["c"].codes.silent == 4
    assert told(coded(np.stack([awake] * 12 + [constant] * 4, 1), certain=certain)) == ([], [])
    for lines in told(coded(np.stack([constant] * 16, 1), certain=certain)):
        assert [line.split(":")[0] for line in lines] == ["c has collapsed"]


def test_a_grid_of_which_hardly_any_position_depends_on_x_has_collapsed():
    table = np.stack([tilted(4, 6.0), *[np.full((INPUTS, 4), 0.25)] * 39], 1)
    for lines in told(coded(table)):
        assert len(lines) == 1
        assert lines[0].startswith("c has collapsed: 39 of 40 positions are silent, each carries at most 1% of log 4")


def test_a_code_of_one_state_is_never_silent():
    assert told(coded(np.ones((INPUTS, 3, 1)))) == ([], [])


def test_one_row_tells_nothing():
    assert told(coded(tilted(4, 1.0)[:, None]), X[:1]) == ([], [])


def test_a_certain_code_is_judged_by_its_information():
    assert told(coded(tilted(5, 4.0)[:, None], certain=True)) == ([], [])  # its KL is log 5, its information too
    for lines in told(coded(np.eye(5)[np.zeros(INPUTS, int)][:, None], certain=True)):
        assert "c has collapsed: one of 5 codes is chosen whatever x is" in lines[0]


def of_bits(probabilities: Callable[[Tensor], Tensor]) -> Pair:
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.5).double()).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(probabilities(x)).to_event(1))

    return small(model, guide)


def test_bits_that_do_not_depend_on_x_are_silent():
    some = of_bits(lambda x: torch.cat([0.1 + 0.8 * (x % 2), 0 * x + 0.5, 0 * x + 1e-5], 1))
    assert collapse(some, X).latents["b"].codes.silent == 2
    assert told(some) == ([], [])
    assert told(of_bits(lambda x: (0.1 + 0.8 * (x % 2)).expand(-1, 3))) == ([], [])
    for lines in told(of_bits(lambda x: (0 * x + 0.4).expand(-1, 3))):
        assert lines[0].startswith("b has collapsed: it carries 0.000 of 2.08 nats")


@pytest.mark.parametrize("copied", [True, False])
def test_a_level_of_codes_that_follows_its_prior_carries_nothing(copied):
    """q(b | a) = p(b | a) varies with x through a alone, which is no information of b's own."""
    follow = torch.tensor(tilted(3, 3.0)[:3]).log()

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.full((3,), 1 / 3).double()))
            b = pyro.sample("b", dist.Categorical(logits=follow[a]))
            pyro.sample("x", dist.Normal(1.0 * (a + b)[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=follow[x[:, 0].long() % 3]))
            pyro.sample("b", dist.Categorical(logits=follow[a if copied else (x[:, 0].long() + 1) % 3]))

    for lines in told(small(model, guide)):
        assert [line.split(" has collapsed")[0] for line in lines] == ["b"] * copied


def of_laplace(shift: float) -> Pair:
    """A real latent whose posterior is not normal, so that its units have no variance of a mean."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, :1], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Laplace(shift * x.expand(-1, 2), 1.0).to_event(1))

    return small(model, guide)


def test_a_latent_without_active_units_is_judged_by_its_kl():
    for lines in told(of_laplace(0.0)):
        assert [line for line in lines if "z has collapsed onto its prior: its KL is 0.0000 nats" in line]
    assert told(of_laplace(0.5)) == ([], [])
