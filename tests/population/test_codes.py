"""Priors of codes that do not know the rows they are scored on, and the interval on new data for codes."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.analysis.population import codes as rooms, sample
from pvae.analysis.population.codes import CodeMixture, CodePrior, CodeTable, Grid, latent_classes
from pvae.analysis.population.interval import Population, interval
from pvae.analysis.population.sample import (
    GroupPrior,
    HonestPrior,
    MixedPrior,
    NewRows,
    RootPrior,
    folds,
    mixture_weights,
)
from pvae.analysis.population.sweep import PairCritic, sweep
from pvae.distributions.exponential_codes import CertainCodes, Codes
from tests.population.channels import CodeChannel, by_class, certain, enumerated, zipf

EVERY = torch.cartesian_prod(torch.arange(3), torch.arange(3))
PRIOR = torch.linspace(-1, 1, 9).double().log_softmax(0)


@pytest.fixture
def few(monkeypatch):
    """Latent classes from a handful of rows."""
    monkeypatch.setattr(rooms, "FEWEST_BY_CLASS", 5)
    monkeypatch.setattr(rooms, "CLASSES", (2,))
    monkeypatch.setattr(rooms, "CLASS_STEPS", 5)
    for room in (rooms, sample):
        monkeypatch.setattr(room, "mixture_weights", partial(mixture_weights, steps=5))


def small(n: int, posterior: str, seed: int = 0) -> NewRows:
    """Two positions of three codes, which depend on each other; the prior does not factorise."""
    torch.manual_seed(seed)
    first = torch.randint(3, (n,))
    index = torch.stack([first, (first + (torch.rand(n) < 0.3).long()) % 3], 1)
    q: Any = CertainCodes(index, 3)
    if posterior == "drawn":
        q = Codes(2 * q.codes().logits.clamp(min=-1) + torch.randn(n, 2, 3))
        index = q.sample().long()
    log_p = PRIOR[index[:, 0] * 3 + index[:, 1]]
    return NewRows(index.double(), q.log_prob(index.double()), log_p, -log_p, q if posterior != "unknown" else None)


def changed(rows: NewRows, i: int, code: Tensor) -> NewRows:
    """The same rows with another code, and another posterior, in one of them."""
    value, log_p = rows.value.clone(), rows.log_p.clone()
    value[i], log_p[i] = code.double(), PRIOR[code[0] * 3 + code[1]]
    q = rows.q
    if isinstance(q, CertainCodes):
        q = CertainCodes(torch.cat([q.index[:i], code[None], q.index[i + 1 :]]), 3)
    if isinstance(q, Codes):
        q = Codes(torch.cat([q.logits[:i], torch.randn(1, 2, 3).double(), q.logits[i + 1 :]]))
    parts = tuple(changed(part, i, code) for part in rows.parts)
    return replace(rows, value=value, log_p=log_p, q=q, parts=parts)


def masses(prior: HonestPrior, rows: NewRows, i: int, fold: Tensor) -> tuple[float, float]:
    """Sums over all states of r and of the r apart, with row i in each of them."""
    found = [prior.scored(changed(rows, i, code), fold) for code in EVERY]
    return tuple(float(torch.stack([getattr(s, name)[i] for s in found]).exp().sum()) for name in ("log_r", "apart"))  # type: ignore[return-value]


@pytest.mark.parametrize("posterior", ["certain", "drawn", "unknown"])
def test_a_prior_knows_nothing_of_the_row_that_it_scores(posterior, few):
    # Whatever the code and the posterior of a row, the r that scores it is one distribution.
    prior, rows, (_, fold) = CodePrior([Grid(2, 3, 2)]), small(60, posterior), folds(60, 0, torch.device("cpu"))
    for i in (3, 50):
        assert masses(prior, rows, i, fold) == pytest.approx((1, 1), abs=1e-5)


def test_priors_of_roots_groups_and_mixtures_are_distributions(few, monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.sample.FEWEST_OF_GROUP", 20)
    rows, (_, fold) = small(60, "certain"), folds(60, 0, torch.device("cpu"))
    rows = replace(rows, group=(torch.arange(60) % 7 == 0).long(), parts=(rows,))  # a value of 9 rows, one of 51
    codes = CodePrior([Grid(2, 3, 2)])
    mixed = MixedPrior([codes, GroupPrior(codes)])
    for prior in (RootPrior([codes]), mixed, MixedPrior([RootPrior([codes]), codes])):
        assert masses(prior, rows, 41, fold) == pytest.approx((1, 1), abs=1e-5)
    alone, both = codes.scored(rows, fold), mixed.scored(rows, fold)
    torch.testing.assert_close(both.log_r[rows.group == 1], alone.log_r[rows.group == 1])
    assert bool((both.log_r != alone.log_r)[rows.group == 0].all())


@pytest.mark.parametrize("posterior", ["certain", "drawn"])
def test_a_prior_of_train_rows_is_a_distribution(posterior, few):
    train, rows = small(80, posterior), small(30, posterior, seed=1)
    codes = CodePrior([Grid(2, 3, 2)])
    fold = torch.zeros(30)
    for prior in (codes, MixedPrior([codes, RootPrior([codes])])):
        given = replace(train, parts=(train,))
        found = [prior.scored(replace(changed(rows, 4, c), parts=(changed(rows, 4, c),)), fold, given) for c in EVERY]
        assert float(torch.stack([s.log_r[4] for s in found]).exp().sum()) == pytest.approx(1, abs=1e-5)
        assert not found[0].influence.any()


def test_one_hots_are_scored_as_indices():
    rows, (_, fold) = small(40, "unknown"), folds(40, 0, torch.device("cpu"))
    hot = torch.nn.functional.one_hot(rows.value.long(), 3).flatten(1).double()
    want = CodePrior([Grid(2, 3, 2)]).scored(rows, fold)
    for value in (hot, torch.where(hot > 0, 0.0, -1e30)):
        got = CodePrior([Grid(2, 3, 6)]).scored(replace(rows, value=value), fold)
        torch.testing.assert_close(got.log_r, want.log_r)


@pytest.mark.parametrize("posterior", ["certain", "drawn"])
def test_the_influence_of_a_row_is_what_leaving_it_out_changes(posterior, few):
    n, rows = 120, small(120, posterior)
    everyone, table = torch.ones(n, dtype=torch.bool), CodeTable.of(rows, [Grid(2, 3, 2)])
    mixture = CodeMixture.chosen(table, everyone)
    log_r, influence = mixture.scored(torch.arange(n), everyone)
    left = []
    for j in range(n):
        others = everyone.clone()
        others[j] = False
        left.append(mixture.scored(others.nonzero()[:, 0], others)[0].sum())
    moved = log_r.sum() - torch.stack(left) - log_r  # what row j adds to the scores of the others
    moved, influence = moved - moved.mean(), influence - influence.mean()
    assert float((moved - influence).std()) < 0.1 * float(moved.std())


def test_certain_codes_are_counted_as_pairs_are():
    torch.manual_seed(0)
    index = torch.randint(3, (60, 2))
    q, own = CertainCodes(index, 3), torch.zeros(60).double()
    apart = torch.randn(9).double()[index[:, 0] * 3 + index[:, 1]] - 2
    for critic in (PairCritic(apart, (20, 20, 20), 0.75, 2.0), PairCritic(apart, (60,), 1.0, 9.0)):
        (got, sums), (want, pairs) = (sweep(members, index.double(), own, critic) for members in (q, q.codes()))
        assert pairs is not None
        torch.testing.assert_close(got.inside, want.inside)
        torch.testing.assert_close(got.outside, want.outside)
        torch.testing.assert_close(sums[0], pairs[0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums[1], pairs[1], rtol=1e-5, atol=1e-4)


def test_a_latent_class_model_is_fitted_by_em():
    torch.manual_seed(0)
    made = by_class(3, 6, 4)
    rows, new = made.draw(600), made.draw(600)
    table, other = (CodeTable.of(r, made.grids) for r in (rows, new))
    found = {k: latent_classes(table.flat, table.shares(torch.arange(600)), k) for k in (1, 3)}
    every = torch.cartesian_prod(*[torch.arange(4)] * 6) + 4 * torch.arange(6)
    for model in found.values():
        assert float(model.joint(every).logsumexp(1).exp().sum()) == pytest.approx(1, abs=1e-5)
    held = {k: -float(model.joint(other.flat).logsumexp(1).mean()) for k, model in found.items()}
    assert held[3] < made.information + 0.25 < held[1]


def test_weights_of_a_mixture_are_the_best_ones():
    torch.manual_seed(0)
    terms = torch.randn(200, 3).double()
    found = mixture_weights(terms, torch.zeros(3).double())
    best = (terms + found).logsumexp(1).mean()
    others = torch.rand(200, 3).double().log().log_softmax(1)
    assert all(best >= (terms + w).logsumexp(1).mean() for w in others)
    assert float(found.exp().sum()) == pytest.approx(1)


def given(made: CodeChannel, n: int, seed: int) -> Population:
    torch.manual_seed(seed)
    found = interval(made.draw(n), CodePrior(made.grids), seed=seed)
    assert isinstance(found, Population)
    return found


def ends(found: Population) -> tuple[float, float]:
    assert found.gain_upper is not None
    low, high = found.gain, found.gain_upper
    return low.value - 2 * low.standard_error, high.value + 2 * high.standard_error


def test_codes_of_a_heavy_tail_gain_what_is_known():
    # Zipf over 1e5 codes, M = 3.54: 2.59 on average; all but uniform over 1e6 codes: 0.
    made = zipf(100_000)
    found = given(made, 1000, 0)
    low, high = ends(found)
    assert 2.3 < found.gain.value < made.gain < high
    assert low < made.gain
    even = given(zipf(10**6, power=0.0), 1000, 0)
    assert -0.05 < even.gain.value < 2 * even.gain.standard_error + 1e-6


CHANNELS: dict[str, Any] = {
    "few codes": lambda: enumerated(30, 2, 3, 1.0, 0),
    "saturated": lambda: enumerated(20_000, 4, 6, 6.0, 3),
    "bits": lambda: enumerated(5000, 8, 2, 3.0, 2),
    "heavy tail": lambda: zipf(1000),
    "latent classes": lambda: by_class(5, 16, 8),
}


def held(name: str, n: int, sets: int) -> tuple[int, float]:
    """Number of data sets whose interval holds M, and spread of the lower end in standard errors."""
    made = CHANNELS[name]()
    found = [given(made, n, seed) for seed in range(sets)]
    holds = sum(low <= made.gain <= high for low, high in map(ends, found))
    errors = torch.tensor([f.gain.standard_error for f in found])
    return holds, float(torch.tensor([f.gain.value for f in found]).std() / errors.mean())


@pytest.mark.parametrize("name", ["few codes", "bits"])
def test_the_interval_holds(name):
    holds, _ = held(name, 100, 12)
    assert holds >= 11  # below it with a probability of 0.02 at a level of 95 %, and these are on the safe side


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("n", [100, 1000])
def test_the_interval_holds_in_a_hundred_data_sets(name, n):
    holds, spread = held(name, n, 100)
    assert holds >= 90
    # With 100 rows the choice of the weights adds to the spread of a gain near zero (1.35), and is not in its error.
    assert 0.6 < spread < (1.6 if n == 100 else 1.25)


def test_codes_without_a_repeat_have_an_interval():
    index = torch.arange(200)[:, None]
    found = interval(certain(index, -math.log(1e6), 10**6), CodePrior([Grid(1, 10**6, 1)]))
    assert isinstance(found, Population)
    assert found.gain_upper is not None
    assert found.seen == pytest.approx(0, abs=1e-9)
    assert found.sizes[-1].leave_one_out is None
