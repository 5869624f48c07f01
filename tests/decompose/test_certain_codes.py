"""Codes known for certain, which q_agg counts, and codes whose probabilities are too many to keep."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
import resource

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.aggregate.components import Reread, Tallied
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose import posterior_draws
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.surgery import gain, surgery
from pvae.analysis.samples.encode import encode
from pvae.distributions.exponential import Normals
from pvae.distributions.exponential_codes import CertainCodes, Codes, Product, product
from pvae.pair.pair import Pair
from tests.decompose.pairs import DRAWN, NEAREST, VQ, declared, leave_one_out, rows


def brute(index: Tensor, value: Tensor) -> Tensor:
    """log of the share of rows with each value."""
    return (value[:, None] == index).all(-1).double().mean(1).log()


def test_certain_codes_are_counted():
    index = torch.randint(2, (200, 5))
    q = AggregatedPosterior(CertainCodes(index, 2))
    assert isinstance(q.components, Tallied)
    value = torch.cat([index[:50], torch.randint(2, (20, 5)), torch.full((1, 5), 7)]).double()
    torch.testing.assert_close(q.log_prob(value), brute(index, value))
    assert q.log_prob(value)[-1] == -math.inf
    at = torch.arange(50)
    others = torch.stack([brute(index[torch.arange(200) != i], value[i : i + 1])[0] for i in at.tolist()])
    torch.testing.assert_close(leave_one_out(q, value[:50], at), others)
    drawn = q.sample((64,))
    assert bool(q.log_prob(drawn).isfinite().all())


def test_a_subset_of_certain_codes_bounds_their_information():
    index = torch.randint(2, (4000, 4))
    own = torch.zeros(4000).double()
    exact = AggregatedPosterior(CertainCodes(index, 2)).information(index.double(), torch.arange(4000), own)
    chosen = torch.randperm(4000)[:100].sort().values
    some = AggregatedPosterior(CertainCodes(index[chosen], 2), 4000, chosen)
    found = some.information(index.double(), torch.arange(4000), own)
    assert found.lower.mean() < exact.upper.mean() < found.upper.mean()
    assert torch.equal(exact.lower, exact.upper)
    assert bool((found.upper <= math.log(4000) + 1e-9).all())


def test_counting_is_the_matrix_product():
    index = torch.randint(9, (60, 3))
    certain, value = CertainCodes(index, 9), torch.randint(9, (40, 3)).double()
    multiplied = AggregatedPosterior(certain.codes())
    got, want = AggregatedPosterior(certain).log_prob(value), multiplied.log_prob(value)
    assert bool((got.isfinite() == (want > -1e29)).all())
    torch.testing.assert_close(got[got.isfinite()], want[got.isfinite()])


def test_certain_codes_beside_normals_are_summed_within_each_code():
    n = 80
    index, loc, scale = torch.randint(3, (n, 1)), torch.randn(n, 2).double(), torch.rand(n, 2).double() + 0.1
    q = product([Normals(loc, scale), CertainCodes(index, 3)])
    assert isinstance(q, Product)
    mixture = AggregatedPosterior(q)
    assert isinstance(mixture.components, Tallied)
    value = torch.cat([torch.randn(30, 2), torch.randint(4, (30, 1))], 1).double()
    density = dist.Normal(loc, scale).to_event(1).log_prob(value[:, None, :2])
    density = torch.where(value[:, None, 2] == index[:, 0], density, -math.inf)
    torch.testing.assert_close(mixture.log_prob(value), density.logsumexp(1) - math.log(n))
    at = torch.arange(30)
    density[at, at] = -math.inf
    torch.testing.assert_close(leave_one_out(mixture, value, at), density.logsumexp(1) - math.log(n - 1))


def test_rows_of_a_table_are_the_product_with_one_hots():
    q, value = Codes(torch.randn(50, 6, 12).double()), torch.randint(12, (70, 6)).double()
    assert q.is_sparse
    out = torch.empty(70, 50).double()
    q.scorer()(value, out)
    eta, constant = q.natural()
    torch.testing.assert_close(out, q.statistics(value, q.origin) @ eta + constant)


def test_the_kl_of_a_nearest_code_is_positions_times_log_k():
    x = rows(40)
    for pair in (declared({"c": VQ}), declared({"c": VQ}).float()):  # single precision too
        found = surgery(pair, x)
        for figure in (found.kl, found.kl_exact, found.latents["c"].kl):
            assert figure.value == pytest.approx(6 * math.log(16), abs=1e-9)
            assert (figure.kind, figure.standard_error) == ("exact", 0.0)
        index = encode(pair, x)["c"].reshape(40, -1)
        counts = index.unique(dim=0, return_counts=True)[1].double() / 40
        assert found.mutual_information.value == pytest.approx(float(-(counts * counts.log()).sum()), abs=1e-9)
        assert f"c: certain codes ({len(counts)} distinct ones)" in found.notes[0]


def test_other_rows_as_the_prior_of_certain_codes():
    pair = declared({"c": {**VQ, "codes": 3, "grid": [2]}})
    x, train = rows(30), rows(3000, seed=1)
    with quiet(pair, x, 0):
        index, seen = (draw(pair, part).latents["c"].value for part in (x, train))
    want = brute(seen, index) + 2 * math.log(3)
    assert bool(want.isfinite().all())
    assert surgery(pair, x, train=train).train_gain.value == pytest.approx(float(want.mean()), abs=1e-8)
    nothing = surgery(pair, x, train=train[seen[:, 0] != index[0, 0]]).train_gain
    assert nothing.value == -math.inf
    assert "have codes that no training row has" in nothing.note


def test_gain_of_a_prior_fitted_to_certain_codes():
    x = rows(60)
    before = declared({"c": {**VQ, "codes": 3, "grid": [2], "prior": "categorical"}})
    after = declared({"c": {**VQ, "codes": 3, "grid": [2], "prior": "categorical"}})
    with torch.no_grad():
        for p in after.model.priors.parameters():
            p.mul_(0.5)
    found = gain(before, after, x)
    kls = [surgery(pair, x).kl.value for pair in (before, after)]
    assert found.gained.value == pytest.approx(kls[0] - kls[1], abs=1e-8)
    assert abs(found.gained.value) > 1e-3
    assert found.before.marginal_kl.kind == "exact"


def wide(posterior, codes: int, grid) -> Pair:
    """Codes of logits that are a fixed projection of x, in single precision: nothing but the codes takes room."""
    latent = {"codes": codes, "grid": grid, "posterior": posterior}
    return declared({"c": {**latent, "embedding": 4}}, spread=0.1).float()


@pytest.mark.fast("nearest")
@pytest.mark.parametrize(("posterior", "n"), [(NEAREST, 3000), (DRAWN, 1000)], ids=["nearest", "drawn"])
def test_memory_does_not_hold_all_probabilities(posterior, n, monkeypatch):
    # Half of what the probabilities of all rows would take in float64: 786 and 262 MB.
    monkeypatch.setattr(posterior_draws, "PARAMETER_BYTES", 2**26)
    pair, x = wide(posterior, 512, [8, 8]), rows(n).float()
    surgery(pair, x[:200], memory=2**26)  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = surgery(pair, x, memory=2**26)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < n * 64 * 512 * 8 / 2**20 / 2
    assert found.latents["c"].dimensions is not None
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-9)
    assert 0 <= found.mutual_information.value <= math.log(n) + 1e-9


def test_streamed_codes_are_scored_as_kept_ones(monkeypatch):
    # More joint states than are summed over: the same draws, with probabilities in memory and read off again.
    pair, x = declared({"c": {"codes": 9, "grid": [6], "posterior": DRAWN}}), rows(300)
    kept = surgery(pair, x, samples=2)
    assert kept.mutual_information.kind == "estimate"
    monkeypatch.setattr(posterior_draws, "PARAMETER_BYTES", 8)
    streamed = surgery(pair, x, samples=2, memory=2**17)
    for name in ("kl", "kl_exact", "mutual_information", "marginal_kl", "leave_one_out"):
        assert getattr(streamed, name).value == pytest.approx(getattr(kept, name).value, abs=1e-8)
    assert isinstance(AggregatedPosterior.of(pair, x, memory=2**17).components, Reread)
    parts = [s.latents["c"].dimensions for s in (kept, streamed)]
    assert parts[0].mutual_information == pytest.approx(parts[1].mutual_information, abs=1e-10)
    assert parts[0].marginal_kl == pytest.approx(parts[1].marginal_kl, abs=1e-10)


def test_probabilities_that_are_many_are_not_encoded():
    pair, x = wide({"kind": "categorical", "estimator": "score"}, 512, [4, 4]), rows(5).float()
    code = encode(pair, x).latents["c"]
    assert code.probs is None
    assert code.value.shape == (5, 4, 4)
