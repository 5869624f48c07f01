"""Intervals of a surgery for codes, hierarchies, covariates and rows with other latents."""

# A figure that may be None, and rows that are no tensor, fail their test.
# mypy: disable-error-code="union-attr, attr-defined, arg-type"

import numpy as np
import pytest
import torch

from pvae.analysis import surgery
from pvae.analysis.decompose import surgery_figures
from pvae.analysis.population.kernels import KernelPrior
from pvae.analysis.population.sample import NewRows, RootPrior, folds
from tests.decompose import pairs, test_conditional, test_ragged
from tests.zoo_runs import tiny_run

TABLE = np.random.default_rng(0).dirichlet([0.3] * 4, size=(6, 2))  # six inputs, two positions of four codes


def inputs(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, (n, 1), generator=torch.Generator().manual_seed(seed)).double()


def exact_gain(table: np.ndarray) -> float:
    """KL of the mean posterior of equally likely inputs to equal probabilities of all joint states."""
    joint = np.einsum("ia,ib->ab", table[:, 0], table[:, 1]) / len(table)
    return float((joint * (np.log(np.clip(joint, 1e-300, None)) + np.log(joint.size))).sum())


@pytest.mark.parametrize("certain", [True, False], ids=["certain", "drawn"])
@pytest.mark.parametrize("trained", [True, False], ids=["train rows", "these rows"])
def test_a_surgery_of_codes_has_an_interval(certain, trained):
    pair = pairs.coded(TABLE, np.full((2, 4), 0.25), certain=certain)
    table = np.eye(4)[TABLE.argmax(2)] if certain else TABLE
    found = surgery(pair, inputs(600), train=inputs(600, 1) if trained else None).population
    gain = exact_gain(table)
    assert found.gain.value - 2.5 * found.gain.standard_error < gain
    assert gain < found.gain_upper.value + 2.5 * found.gain_upper.standard_error + 1e-9
    assert found.gain_upper.value - found.gain.value < 0.2


def test_train_rows_have_noise_of_their_own():
    # With the noise of the rows themselves the samples of train rows would not be independent of theirs.
    flat = np.full((6, 3, 4), 0.25)
    found = surgery(pairs.coded(flat, np.full((3, 4), 0.25)), inputs(300), train=inputs(300, 1)).population
    assert abs(found.gain.value) < 0.02
    assert found.gain_upper.value > -1e-6


def test_a_new_prior_of_the_roots_leaves_the_other_levels(monkeypatch):
    caught: list[NewRows] = []
    real = surgery_figures.interval.interval

    def spy(rows, prior, **more):
        caught.append(rows)
        return real(rows, prior, **more)

    monkeypatch.setattr(surgery_figures.interval, "interval", spy)
    x = pairs.correlated(0.5, 200)
    found = surgery(pairs.two_levels(), x).population
    assert found.gain.value < found.gain_upper.value
    assert "without parents" in found.prior
    rows = caught[0]
    top = rows.parts[0]
    assert len(rows.parts) == 1
    torch.testing.assert_close(top.log_p, torch.distributions.Normal(0.0, 1.0).log_prob(top.value[:, 0]))
    order, fold = folds(200, 0, x.device)
    whole, alone = (
        RootPrior([KernelPrior()]).scored(rows.rows(order), fold),
        KernelPrior().scored(top.rows(order), fold),
    )
    torch.testing.assert_close(whole.log_r - rows.log_p[order], alone.log_r - top.log_p[order])
    torch.testing.assert_close(whole.influence, alone.influence)


def test_a_root_far_from_its_prior_is_gained():
    # z2 ~ N(0, 9 A' R A + S2) under q_pi, N(0, 1) under p; levels below it can only add to the gain.
    found = surgery(pairs.two_levels(), 3 * pairs.correlated(0.9, 800)).population
    variance = 9 * (pairs.A.T @ np.array([[1, 0.9], [0.9, 1]]) @ pairs.A).item() + pairs.S2
    root = 0.5 * (variance - 1 - np.log(variance))
    assert found.gain.value > root - 0.05 - 2 * found.gain.standard_error
    assert found.gain_upper.value > root


def test_groups_of_rows_with_other_latents_have_an_interval():
    lengths = torch.tensor([1, 2, 3]).repeat(40)
    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)).double()
    pair = test_ragged.chain(mask_sites=True)
    found = surgery(pair, (x, lengths)).population
    alone = [surgery(pair, (x[lengths == k], lengths[lengths == k])).population for k in (1, 2, 3)]
    assert found.n == 120
    assert found.gain.value == pytest.approx(np.mean([a.gain.value for a in alone]), abs=0.25)  # other draws
    assert surgery(pair, (x, lengths), seen=True).population is None
    assert surgery(pair, (x[:30], lengths[:30])).population is None  # 10 rows of each length


def test_covariates_have_an_interval():
    pair, (x, _) = test_conditional.declared(), test_conditional.rows(600)
    found = surgery(pair, x)
    new = found.population
    assert new.information.value == pytest.approx(found.mutual_information.value, abs=0.1)
    assert new.gain.value <= new.gain_upper.value
    assert "3 values" in new.notes[0]
    assert surgery(pair, x, seen=True).population is None
    few = surgery(test_conditional.declared(codes=2000), test_conditional.rows(60, 2000)[0])
    # Hardly two rows have the same value: the KL itself is the upper end.
    assert few.population.gain_upper.value == pytest.approx(few.kl.value, abs=0.2)


@pytest.mark.parametrize(
    "name",
    ["vq_vae", "gumbel_softmax_vae", "dvae", "bernoulli_vae", "vq_vae_2", "hvae", "ladder", "em_mixture"],
)
def test_zoo_entries_of_codes_and_levels_have_an_interval(name):
    run = tiny_run(name)
    found = surgery(run.pair, run.data.split("test").rows)
    assert found.population is not None, found.notes
    assert found.population.gain.value - 2 * found.population.gain.standard_error <= found.kl.value + 0.5
    assert found.population.gain_upper is not None
