"""Sites that appear or vanish from batch to batch, in model, guide or both: taken in, never dropped."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pvae import analysis
from pvae.errors import PvaeError
from pvae.pair.pair import Pair
from tests.pair.against_pyro import require_right
from tests.programs.program import normal

ROWS = 24


def flagged(columns: int = 2, flags: int = 1, first: int = 12) -> Tensor:
    """Columns of data, then flags that are 0 in the first rows."""
    later = (torch.arange(ROWS) >= first).float()[:, None].expand(-1, flags)
    return torch.cat([normal((ROWS, columns)), later], 1)


def normal_log_p(x: Tensor, variance: float) -> Tensor:
    return dist.Normal(0.0, math.sqrt(variance)).log_prob(x)


def observed_in_some_batches():
    """x2 given z where flagged: (x, x2) are jointly normal."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            if x[:, 2].max() > 0:
                with poutine.mask(mask=x[:, 2] > 0):
                    pyro.sample("x2", dist.Normal(z, 1.0), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x[:, 0] + 0.2 * x[:, 1] * x[:, 2], 0.7))

    both = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2))
    x = flagged()
    log_p = torch.where(x[:, 2] > 0, both.log_prob(x[:, :2]), normal_log_p(x[:, 0], 2.0))
    return model, guide, x, log_p


def latent_in_both():
    """A second latent with its own observation, where flagged."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            if (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    w = pyro.sample("w", dist.Normal(0.0, 1.0))
                    pyro.sample("y", dist.Normal(w, 1.0), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.7))
            if (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    pyro.sample("w", dist.Normal(0.5 * x[:, 1], 0.7))

    x = flagged()
    return model, guide, x, normal_log_p(x[:, 0], 2.0) + x[:, 2] * normal_log_p(x[:, 1], 2.0)


def vector_latent_in_both():
    """As before, two coordinates and `to_event`, read from the left."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x[:, 0])
            if (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("y", dist.Normal(w[:, 0] + w[:, 1], 1.0), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, :1] * torch.tensor([1.0, 0.0]), 0.8).to_event(1))
            if (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    pyro.sample("w", dist.Normal(0.33 * x[:, 1:2].expand(-1, 2), 0.8).to_event(1))

    x = flagged()
    return model, guide, x, normal_log_p(x[:, 0], 2.0) + x[:, 2] * normal_log_p(x[:, 1], 3.0)


def steps_up_to_the_longest():
    """A sequence per row, of the length in the last column; T is that of the longest in the batch."""

    def lengths(x: Tensor) -> Tensor:
        return x[:, 3].long()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(int(lengths(x).max())):
                with poutine.mask(mask=t < lengths(x)):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(int(lengths(x).max())):
                with poutine.mask(mask=t < lengths(x)):
                    pyro.sample(f"z_{t}", dist.Normal(0.5 * x[:, t], 0.7))

    x = torch.cat([normal((ROWS, 3)), (1 + torch.arange(ROWS) * 3 // ROWS).float()[:, None]], 1)
    present = torch.arange(3) < x[:, 3:]
    return model, guide, x, (normal_log_p(x[:, :3], 2.0) * present).sum(1)


def factor_in_some_batches():
    """A term of the model's own density, where flagged."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            if (x[:, 2] > 0).any():
                pyro.factor("extra", -0.5 * x[:, 2])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.7))

    x = flagged()
    return model, guide, x, normal_log_p(x[:, 0], 2.0) - 0.5 * x[:, 2]


def discrete_in_some_batches(summed: str = "nowhere"):
    """A bit with its own observation, where flagged; summed over exactly in the model, or under the guide's law."""
    both = {"enumerate": "parallel"}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            if (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    b = pyro.sample("b", dist.Bernoulli(0.3), infer=both if summed == "model" else {})
                    pyro.sample("y", dist.Normal(2 * b, 1.0), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.7))
            if summed != "model" and (x[:, 2] > 0).any():
                with poutine.mask(mask=x[:, 2] > 0):
                    law = dist.Bernoulli(logits=2 * x[:, 1] - 2)
                    pyro.sample("b", law, infer=both if summed == "guide" else {})

    x = flagged()
    y = x[:, 1]
    mixed = torch.logaddexp(
        math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(y), math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(y)
    )
    return model, guide, x, normal_log_p(x[:, 0], 2.0) + x[:, 2] * mixed


CASES = [
    observed_in_some_batches,
    latent_in_both,
    vector_latent_in_both,
    steps_up_to_the_longest,
    factor_in_some_batches,
    discrete_in_some_batches,
]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", ["rows without", "rows with"])
def test_figures_hold_all_sites_whatever_batch_came_first(case, first):
    model, guide, x, log_p = case()
    x, log_p = (x, log_p) if first == "rows without" else (x.flip(0), log_p.flip(0))
    require_right(model, guide, x, log_p.mean().item())


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_a_pair_that_saw_no_such_rows_takes_the_sites_in(case):
    model, guide, x, log_p = case()
    pair = Pair(model=model, guide=guide)
    early = analysis.evidence(pair, x[:6], samples=300).iwae
    assert early.value < log_p[:6].mean().item() + 5 * early.standard_error
    found = analysis.evidence(pair, x, samples=300)
    want = log_p.mean().item()
    assert want - 0.3 < found.iwae.value < want + 5 * found.iwae.standard_error
    with torch.no_grad():
        torch.manual_seed(0)
        terms = pair.terms(x)
        torch.manual_seed(0)
        theirs = -Trace_ELBO().loss(model, guide, x)
    ours = terms.reconstruction.sum() - sum(kl.sum() for kl in terms.kl.values())
    assert ours.item() == pytest.approx(theirs, abs=1e-3)
    again = analysis.surgery(pair, x[:6], samples=100).elbo  # rows without the sites, after rows with them
    assert again is not None
    assert again.value < log_p[:6].mean().item() + 5 * again.standard_error
    exact = analysis.prior_evidence(pair, x[:6], samples=2000).evidence
    assert exact.value == pytest.approx(log_p[:6].mean().item(), abs=5 * exact.standard_error + 0.02)


def test_a_latent_of_the_guide_that_appears_later_without_one_in_the_model_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.7))
            if x[:, 2].max() > 0:
                pyro.sample("aux", dist.Normal(0.0, 1.0))

    pair, x = Pair(model=model, guide=guide), flagged()
    analysis.evidence(pair, x[:6], samples=5)
    for run in (analysis.surgery, analysis.evidence, analysis.gap, Pair.terms):
        with pytest.raises(PvaeError, match="aux"):
            run(pair, x)


def test_a_latent_of_the_model_that_appears_later_without_a_guide_is_no_bound():
    """Its value would be that of the prior: log p(x, z, w) - log q(z | x) is refused, or w averages over its prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z
            if x[:, 2].max() > 0:
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                mean = z + w * x[:, 2]
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.7))

    x = flagged()
    exact = normal_log_p(x[:, 0], 1.0) * 0 + torch.where(
        x[:, 2] > 0, normal_log_p(x[:, 0], 3.0), normal_log_p(x[:, 0], 2.0)
    )
    try:
        found = analysis.evidence(Pair(model=model, guide=guide), x, samples=500).iwae
    except PvaeError as error:
        assert "w" in str(error)  # noqa: PT017
        return
    assert found.value < exact.mean().item() + 5 * found.standard_error


@pytest.mark.parametrize("side", ["model", "guide"])
def test_states_that_are_summed_over_in_some_batches_only(side):
    model, guide, x, log_p = discrete_in_some_batches(side)
    pair = Pair(model=model, guide=guide)
    for rows in (slice(0, 6), slice(0, None), slice(-6, None), slice(0, 6)):
        want = log_p[rows].mean().item()
        found = analysis.evidence(pair, x[rows], samples=300).iwae
        assert want - 0.1 < found.value < want + 5 * found.standard_error
        loss = pair(x[rows])
        assert loss.shape == (len(x[rows]),)
        assert want - 1.0 < loss.mean().item() < want + 0.5


@pytest.mark.parametrize("case", [latent_in_both, steps_up_to_the_longest], ids=lambda f: f.__name__)
def test_gap_and_annealing_take_rows_that_lack_known_sites(case):
    model, guide, x, log_p = case()
    pair = Pair(model=model, guide=guide)
    for rows in (x[:4], x[-4:], x[:4]):
        want = (log_p[:4] if torch.equal(rows, x[:4]) else log_p[-4:]).mean().item()
        assert analysis.gap(pair, rows, steps=1, samples=20).elbo.value < want + 0.5
        found = analysis.ais(pair, rows, temperatures=6, chains=20, leapfrog=2)
        assert found.lower.value == pytest.approx(want, abs=0.6)
