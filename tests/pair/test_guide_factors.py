"""Factors and observed sites of a guide: part of the training loss as in Pyro's, no part of ELBO or evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import SGD
from torch import Tensor

import pvae
from pvae import analysis
from pvae.pair.pair import Pair
from tests.programs.program import normal

pytestmark = pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide")

ROWS = 12


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_with(kind: str):
    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.3))
        penalty = 5.0 * (a - 2.0) ** 2 * torch.ones(len(x))
        if kind == "outside":
            pyro.factor("penalty", (a - 1.0) ** 2, has_rsample=True)
        with pyro.plate("data", len(x)):
            if kind == "observed":
                pyro.sample("label", dist.Bernoulli(logits=a * x), obs=(x > 0).float())
            if kind == "observed normal":
                pyro.sample("label", dist.Normal(a * x, 1.0), obs=x)
            z = pyro.sample("z", dist.Normal(a * x, 0.7))
            if kind in ("pathwise", "score"):
                pyro.factor("penalty", penalty, has_rsample=kind == "pathwise")
            if kind == "of a latent":
                pyro.factor("penalty", z**2 + a, has_rsample=True)
            if kind == "masked":
                with pyro.poutine.mask(mask=x > 0):
                    pyro.factor("penalty", penalty, has_rsample=True)
            if kind == "scaled":
                with pyro.poutine.scale(scale=0.25):
                    pyro.factor("penalty", penalty, has_rsample=True)
            if kind == "in some batches" and bool((x > 1).any()):
                pyro.factor("penalty", penalty, has_rsample=True)
            if kind == "several":
                pyro.factor("first", penalty, has_rsample=True)
                pyro.factor("second", -0.2 * penalty, has_rsample=True)

    return guide


KINDS = [
    "outside",
    "observed",
    "observed normal",
    "pathwise",
    "score",
    "of a latent",
    "masked",
    "scaled",
    "in some batches",
    "several",
]


def fitted(pair: Pair, x: Tensor, folder) -> tuple[float, Tensor]:
    """The parameter after a few plain gradient steps on the training rows, and these."""
    steps = (
        "train.epochs=4",
        "train.keep=last",
        "train.optimizer.kind=sgd",
        "train.optimizer.lr=0.02",
        f"train.batch_size={len(x)}",
    )
    run = pvae.fit(pair, *steps, data=x, run_dir=folder, progress=False)
    pyro.clear_param_store()
    return next(iter(run.pair.parameters())).item(), run.data.split("train").rows


def by_svi(model, guide, x: Tensor, loss: ELBO, steps: int = 4) -> float:
    """The parameter after the same steps of Pyro's own SVI on the loss per row."""
    pyro.clear_param_store()
    scaled = pyro.poutine.scale(scale=1 / len(x))
    svi = SVI(scaled(model), scaled(guide), SGD({"lr": 0.02}), loss)
    for _ in range(steps):
        svi.step(x)
    found = pyro.param("a").item()
    pyro.clear_param_store()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_is_in_the_loss_and_no_part_of_the_bounds(kind):
    x, guide = 1.4 * normal(ROWS), guide_with(kind)
    pair = Pair(model=model, guide=guide)
    assert not pair.check(x)
    with torch.no_grad():
        torch.manual_seed(1)
        terms = pair.terms(x)
        torch.manual_seed(1)
        theirs = -Trace_ELBO().loss(model, guide, x)
    ours = (terms.reconstruction - terms.kl["z"]).sum()
    shared = {name for name in terms.penalties if kind == "outside"}
    ours = ours - sum(v.sum() * (ROWS if name in shared else 1) for name, v in terms.penalties.items())
    assert ours.item() == pytest.approx(theirs, abs=1e-3)
    pyro.clear_param_store()
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean().item()
    loc = 0.3 * x
    elbo = dist.Normal(loc, 1.0).log_prob(x) - 0.49 / 2
    elbo = elbo - torch.distributions.kl_divergence(dist.Normal(loc, 0.7), dist.Normal(0.0, 1.0))
    found = analysis.surgery(pair, x, samples=60).elbo
    assert found.value == pytest.approx(elbo.mean().item(), abs=5 * found.standard_error)
    bound = analysis.evidence(pair, x, samples=200)
    assert exact - 0.1 < bound.iwae.value < exact + 5 * bound.iwae.standard_error
    pyro.clear_param_store()
    gap = analysis.gap(pair, x[:3], steps=2, samples=50).elbo
    assert gap.value < dist.Normal(0.0, math.sqrt(2)).log_prob(x[:3]).mean().item() + 5 * gap.standard_error


@pytest.mark.parametrize("kind", ["observed", "observed normal", "pathwise", "score", "masked", "scaled", "outside"])
def test_a_fit_goes_where_pyros_svi_goes(kind, tmp_path):
    """Full-batch steps of plain gradient descent; noise of z moves the parameter by a few hundredths."""
    x, guide = 1.4 * normal(200), guide_with(kind)
    found, rows = fitted(Pair(model=model, guide=guide), x, tmp_path)
    ours_without, _ = fitted(Pair(model=model, guide=guide_with("none")), x, tmp_path)
    want = by_svi(model, guide, rows, Trace_ELBO())
    assert found == pytest.approx(want, abs=0.06 if kind != "score" else 0.15)
    if kind not in ("outside", "observed normal", "observed"):
        assert abs(found - ours_without) > 0.1


def enumerated(kind: str):
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=a * x), infer={"enumerate": "parallel"})
            penalty = {"of c": 2.0 * c * (a + x), "of x": a * x, "both": (1 + c) * a}[kind]
            pyro.factor("penalty", penalty, has_rsample=True)

    return discrete, guide


@pytest.mark.parametrize("kind", ["of c", "of x", "both"])
def test_a_penalty_beside_an_enumerated_latent_is_averaged_over_it(kind):
    """As the classification term of SCANVI and of the semi-supervised VAE."""
    discrete, guide = enumerated(kind)
    x = normal(ROWS)
    pair = Pair(model=discrete, guide=guide)
    terms = pair.terms(x, expected=True)
    pyro.clear_param_store()
    ours = (terms.reconstruction - terms.kl["c"] - terms.penalties["penalty"]).sum()
    (gradient,) = torch.autograd.grad(ours, list(pair.parameters()))
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(discrete, guide, x)
    (want,) = torch.autograd.grad(-theirs, [pyro.param("a")])
    pyro.clear_param_store()
    assert ours.item() == pytest.approx(-theirs.item(), abs=1e-4)
    assert gradient.item() == pytest.approx(want.item(), abs=1e-4)


def test_a_score_factor_beside_an_enumerated_latent_is_refused_by_name():
    discrete, _ = enumerated("of c")

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=a * x), infer={"enumerate": "parallel"})
            pyro.factor("penalty", a * x, has_rsample=False)

    (problem,) = Pair(model=discrete, guide=guide).check(normal(ROWS))
    pyro.clear_param_store()
    assert problem.site == "penalty"
    assert "has_rsample=True" in problem.message
