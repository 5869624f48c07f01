"""Missing elements of data that are no table: densities of the observed ones, guides that read indicators, bounds."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr, index, operator, comparison-overlap"

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from pvae.analysis import ais, calibration, impute, score
from pvae.analysis.aggregate.entry import simulated
from pvae.distributions.missing import partly_missing, takes_missing
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.objectives.importance import IWAE
from pvae.pair.pair import Pair
from tests.models.test_likelihoods import ROWS, build, channels, every_independent_row, every_row, output


def holed(x: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """Data with elements missing, and with one row that has none and one that has no other."""
    gone = torch.rand(x.shape) < share
    gone[0], gone[1] = False, True
    return x.double().masked_fill(gone, torch.nan)


@every_independent_row
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)], ids=str)
def test_observed_elements_are_scored_by_their_density_alone(row, shape):
    module = build(row, shape)
    h = output(module, 6).requires_grad_()
    x = holed(module(h).sample())
    fn = partly_missing(module(h))
    seen, filler = ~x.isnan(), row.levels[0] if row.levels else 0.5
    expected = np.where(seen, row.score(channels(h, module), x.nan_to_num(filler).numpy()[None])[0], 0.0)
    found = fn.log_prob(x)
    np.testing.assert_allclose(found.detach(), expected.reshape(6, -1).sum(1), rtol=1e-6, atol=1e-6)
    assert found[1] == 0
    torch.testing.assert_close(fn.expand((3, 6)).log_prob(x)[2], found)
    assert torch.equal(found[:1], module(h[:1]).log_prob(x[:1]))
    found.sum().backward()
    grads = [h.grad, *(p.grad for p in module.parameters())]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    torch.testing.assert_close(h.grad[1], torch.zeros_like(h.grad[1]))
    assert takes_missing(fn)
    assert not takes_missing(module(h))
    assert fn.sample().isfinite().all()


@every_row
def test_a_mask_whose_probability_is_declared_is_scored_too(row):
    module = build(row, (5,))
    x, absence = holed(module(h := output(module, 6)).sample()), torch.randn(6, 5, dtype=torch.float64)
    alone, both = partly_missing(module(h)), partly_missing(module(h), absence)
    mask = dist.Bernoulli(logits=absence).log_prob(x.isnan().double())
    torch.testing.assert_close(both.log_prob(x), alone.log_prob(x) + mask.sum(1))
    torch.testing.assert_close(both.expand((3, 6)).log_prob(x)[1], both.log_prob(x))
    assert both.sample().isfinite().all()


@pytest.mark.parametrize("name", ["multivariate_normal", "multivariate_normal, tied"])
def test_a_multivariate_normal_has_its_marginal_density(name: str):
    module = build(ROWS[name], (2, 3))
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    h = output(module, 6).requires_grad_()
    x, whole = holed(module(h).sample()), module(h)
    found = partly_missing(whole).log_prob(x)
    covariance = (whole.scale_tril @ whole.scale_tril.mT).expand(6, 6, 6)
    for i in range(6):
        there = ~x[i].flatten().isnan()
        expected = 0.0
        if there.any():
            loc = whole.loc.expand(6, 6)[i][there]
            marginal = torch.distributions.MultivariateNormal(loc, covariance[i][there][:, there])
            expected = float(marginal.log_prob(x[i].flatten()[there]).detach())
        assert float(found[i].detach()) == pytest.approx(expected, abs=1e-9)
    found.sum().backward()
    assert h.grad.isfinite().all()


def test_dependent_elements_are_refused():
    fn = dist.OneHotCategorical(torch.ones(3)).to_event(0)
    with pytest.raises(DeclarationError, match="not independent under OneHotCategorical"):
        partly_missing(fn)


# ---------------------------------------------------------------------- declared pairs

NOISE = 0.5


def linear(dim: int = 2, width: int = 4, **more: Any) -> Pair:
    """Return x = W z + b + noise with a linear guide, of random weights, in float64; elements may be missing."""
    network = {"kind": "mlp", "hidden": []}
    decoder = {"network": network, "likelihood": {"kind": "normal", "scale": "fixed", "value": NOISE}}
    table = {
        "data": {"source": "tensor", "missing": "mask"},
        "latents": {"z": {"dim": dim}}, "encoder": {"network": network},
        "decoder": {**decoder, **more.pop("decoder", {})}, **more,
    }  # fmt: skip
    return Experiment.from_dict(table).build((width,)).double().eval()


def weights(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W `(width, dim)` and b of the decoder's means."""
    head = [module for module in pair.model.decoder.network.modules() if isinstance(module, nn.Linear)][-1]
    return head.weight.detach(), head.bias.detach()


def log_p_of(pair: Pair, x: torch.Tensor) -> torch.Tensor:
    """Return log p of the observed coordinates of every row, in closed form."""
    w, b = weights(pair)
    covariance = w @ w.T + NOISE**2 * torch.eye(len(w))
    found = []
    for row in x:
        at = (~row.isnan()).nonzero()[:, 0]
        law = scipy.stats.multivariate_normal(b[at], covariance[at][:, at]) if len(at) else None
        found.append(law.logpdf(row[at]) if law else 0.0)
    return torch.tensor(np.array(found, float))


def test_the_bound_of_importance_weights_is_that_of_the_observed_elements():
    """MIWAE: log 1/K sum_k p(x_observed | z_k) p(z_k) / q(z_k | x_observed), written by hand."""
    pair, objective, x = linear(), IWAE(particles=7), holed(torch.randn(5, 4))
    torch.manual_seed(3)
    loss = objective.loss(objective.terms(pair, x), torch.tensor(1.0))
    torch.manual_seed(3)
    z = pair.traces(x, 7)[0].nodes["z"]["value"]
    read = torch.cat([x.nan_to_num(), x.isnan().double()], 1)  # the guide reads 0 and an indicator
    layer = [m for m in pair.guide.modules() if isinstance(m, nn.Linear)][-1]
    loc, log_variance = layer(pair.guide.encoder.network({"x": read})).chunk(2, -1)
    (w, b), normal = weights(pair), torch.distributions.Normal
    log_q = normal(loc, (log_variance.clamp(-12, 6) / 2).exp()).log_prob(z).sum(-1)
    each = torch.where(x.isnan(), 0.0, normal(z @ w.T + b, NOISE).log_prob(x.nan_to_num()))
    log_w = normal(0.0, 1.0).log_prob(z).sum(-1) + each.sum(-1) - log_q
    torch.testing.assert_close(loss, -(log_w.logsumexp(0) - math.log(7)).mean())


def test_evidence_of_missing_coordinates_is_in_closed_form():
    pair = linear()
    x = holed(torch.randn(40, 4) + 0.5)
    exact = log_p_of(pair, x)
    found = score(pair, x, samples=3000)
    assert ((found.log_p - exact).abs() < 5 * found.error + 0.01).all()
    assert (found.reconstruction[1], found.elements[1].abs().max()) == (0, 0)
    torch.testing.assert_close(found.elements.sum(1).double(), found.reconstruction, rtol=1e-4, atol=1e-4)
    annealed = ais(pair, x, temperatures=20, chains=8)
    assert annealed.lower.value == pytest.approx(float(exact.mean()), abs=5 * annealed.lower.standard_error + 0.01)
    filled = impute(pair, x, samples=3000, draws=2)
    (w, b), seen = weights(pair), ~x[2].isnan()
    covariance = w @ w.T + NOISE**2 * torch.eye(4)
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen]).T
    torch.testing.assert_close(filled.x[2][~seen], b[~seen] + gain @ (x[2][seen] - b[seen]), atol=0.1, rtol=0.1)


def test_nan_reaches_no_network_and_gradients_are_finite():
    pair, x = linear().train(), holed(torch.randn(9, 4))
    read = []
    for module in pair.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: read.extend(given))
    pair(x).mean().backward()
    assert len(read) > 1
    assert all(bool(t.isfinite().all()) for t in read)
    assert all(bool(p.grad.isfinite().all()) for p in pair.parameters() if p.grad is not None)


@pytest.mark.parametrize("missingness", ["random", "z"])
def test_latents_are_ranked_on_rows_with_holes(missingness: str):
    """Importance weights correct the guide, so that ranks are uniform where rows are made as the model says."""
    pair, x = linear(dim=1, decoder={"missingness": missingness}), holed(torch.randn(30, 4))
    if missingness == "random":
        assert torch.equal(simulated(pair, x, "test")[0].isnan(), x.isnan())
    found = calibration(pair, 400, 9, importance=200, x=x)
    assert min(test.p for test in found.weighted) > 1e-3


def test_a_pair_that_takes_no_missing_values_says_so():
    pair = linear(data={"source": "tensor"})
    with pytest.raises(DataError, match='got NaN in row 1. Fit with data.missing = "mask"'):
        score(pair, holed(torch.randn(3, 4)))


# ---------------------------------------------------------------------- not missing at random


def at_z(pair: Pair, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a grid of z, log p(x_observed, m, z) on it, and the means of x there, of a pair with one latent."""
    w, b = weights(pair)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    h = z @ w.T + b
    mean, logits = h.chunk(2, -1)
    normal, gone = torch.distributions.Normal, x.isnan()
    each = torch.where(gone, 0.0, normal(mean, NOISE).log_prob(x.nan_to_num()))
    each = each + torch.distributions.Bernoulli(logits=logits).log_prob(gone.double())
    return z, each.sum(-1) + normal(0.0, 1.0).log_prob(z[:, 0]), mean


def test_a_mask_given_z_is_data_too():
    """log p(x_observed, m) and the means of what is missing, by quadrature over z."""
    pair = linear(dim=1, width=3, decoder={"missingness": "z"})
    with torch.no_grad():
        for p in pair.model.decoder.parameters():
            p.normal_()
    x = holed(torch.randn(6, 3))
    found, filled = score(pair, x, samples=4000), impute(pair, x, samples=4000, draws=1)
    for i, row in enumerate(x):
        _, joint, mean = at_z(pair, row)
        log_p = joint.logsumexp(0) + math.log(18 / 4000)
        assert abs(float(found.log_p[i] - log_p)) < 5 * float(found.error[i]) + 0.02
        expected = joint.softmax(0) @ mean
        torch.testing.assert_close(filled.x[i][row.isnan()], expected[row.isnan()], atol=0.25, rtol=0.1)
    torch.testing.assert_close(found.elements.sum(1).double(), found.reconstruction, rtol=1e-4, atol=1e-4)
    made, _ = simulated(pair, x[:1].expand(4000, 3), "test")
    z = torch.randn(20_000, 1, dtype=torch.float64)
    w, b = weights(pair)
    torch.testing.assert_close(made.isnan().double().mean(0), (z @ w.T + b)[:, 3:].sigmoid().mean(0), atol=0.05, rtol=0)
    with pytest.raises(DataError, match="expected sweeps = 0"):
        impute(pair, x, sweeps=2)


CELLS = {"a": {"type": "continuous", "missing": "mask"}, "b": {"type": "count", "missing": "mask"}}


def test_a_mask_of_a_table_is_data_too():
    table = {"data": {"source": "frame", "columns": CELLS}, "latents": {"z": {"dim": 1}}}
    table["decoder"] = {"likelihood": {"kind": "columns"}, "missingness": "z"}
    pair = Experiment.from_dict(table).build((2,))
    assert pair.check(x := torch.tensor([[0.5, 2.0], [torch.nan, 1.0], [torch.nan, torch.nan]])) == []
    fn = pair.model_trace(x).nodes["x"]["fn"]
    torch.testing.assert_close(fn.log_prob(x)[2].float(), fn.absence.sigmoid().log().sum(-1)[2])
    assert score(pair, x, samples=5).elements.shape == (3, 2)


REFUSED = {
    "a flow": ("flow", {"data.missing": "mask"}, "where z determines x"),
    "em": ("em_mixture", {"data.missing": "mask"}, "sums of the objective em"),
    "nothing missing": ("vae", {"decoder.missingness": "z"}, "no value can be missing"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_declarations_that_take_no_missing_values_are_refused(name: str):
    zoo, changes, said = REFUSED[name]
    with pytest.raises(DeclarationError, match=said):
        Experiment.load(zoo, [f"{key}={value}" for key, value in changes.items()])


def test_each_column_says_for_itself():
    table = {"source": "frame", "columns": CELLS, "missing": "mask"}
    with pytest.raises(DeclarationError, match="data.missing: expected.*error"):
        Experiment.from_dict(
            {"data": table, "latents": {"z": {"dim": 1}}, "decoder": {"likelihood": {"kind": "columns"}}}
        )
