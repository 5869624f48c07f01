"""Sites of one side, unpacked latents, points and relaxed codes: a figure named ELBO is a bound, or there is none."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.distributions.torch import RelaxedOneHotCategorical
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import Tensor
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pvae import analysis
from pvae.errors import PvaeError
from pvae.pair.pair import Pair
from tests.pair.against_pyro import elbo_of_pyro, require_right
from tests.programs.program import normal

ROWS = 12
T = torch.tensor(0.5)
CENTRES = torch.tensor([-2.0, 0.0, 2.0])


@pytest.fixture(autouse=True)
def clean():
    yield
    pyro.clear_param_store()


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# ---------------------------------------------------------------------- auxiliary sites


def auxiliary(kind: str) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        if kind == "global":
            pyro.sample("aux", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            if kind == "marked":
                a = pyro.sample("aux", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Normal(0.4 * a, 0.7))
            elif kind == "discrete":
                a = pyro.sample("aux", dist.Bernoulli(0.5))
                pyro.sample("z", dist.Normal(0.5 * x + 0.1 * a, 0.7))
            elif kind == "unread":
                pyro.sample("aux", dist.Normal(x, 1.0))
                pyro.sample("z", dist.Normal(0.5 * x, 0.7))
            elif kind == "after":
                z = pyro.sample("z", dist.Normal(0.5 * x, 0.7))
                pyro.sample("aux", dist.Normal(z, 1.0))
            else:
                pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    return guide


@pytest.mark.parametrize("kind", ["marked", "discrete", "unread", "after", "global"])
@pytest.mark.parametrize("run", [analysis.surgery, analysis.evidence, analysis.gap], ids=lambda f: f.__name__)
def test_a_latent_of_the_guide_alone_is_refused_by_every_analysis(kind, run):
    with pytest.raises(PvaeError, match=r"aux.*r\(a \| z\)"):
        run(Pair(model=model, guide=auxiliary(kind)), normal(ROWS))


def test_a_latent_of_the_guide_alone_is_right_once_the_model_holds_its_reverse():
    def with_reverse(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("aux", dist.Normal(1.5 * z, 1.2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = normal(ROWS)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean().item()
    require_right(with_reverse, auxiliary("unread"), x, exact, slack=1.5)


# ---------------------------------------------------------------------- unpacked latents


SUPPORTS = {
    "real": dist.Normal(0.0, 1.0),
    "positive": dist.LogNormal(0.0, 1.0),
    "interval": dist.Beta(2.0, 2.0),
    "vector": dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "simplex": dist.Dirichlet(torch.ones(3)),
}


def regression(name: str) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        w = pyro.sample("w", SUPPORTS[name])
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.reshape(-1)[0], 1.0), obs=x)

    return program


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_the_jacobian_of_an_unpacked_global_latent(name, kind):
    x, program = 0.5 + normal(ROWS), regression(name)
    auto = kind(program, init_scale=0.3)
    auto(x)
    require_right(program, auto, x, _log_p(name, x), slack=0.2)


def _log_p(name: str, x: Tensor) -> float | None:
    """By quadrature over the first coordinate."""
    if name == "simplex":
        prior, grid = dist.Beta(1.0, 2.0), torch.linspace(1e-4, 1 - 1e-4, 4001)
    elif name == "vector":
        prior, grid = dist.Normal(0.0, 1.0), torch.linspace(-8, 8, 4001)
    else:
        prior = SUPPORTS[name]
        ends = {"real": (-8, 8), "positive": (1e-4, 30), "interval": (1e-4, 1 - 1e-4)}[name]
        grid = torch.linspace(*ends, 4001)
    joint = (prior.log_prob(grid) + dist.Normal(grid[:, None], 1.0).log_prob(x).sum(1)).double()
    return (joint.logsumexp(0) + math.log(float(grid[1] - grid[0]))).item() / len(x)


@pytest.mark.parametrize("name", ["real", "positive", "interval"])
def test_the_jacobian_of_an_easy_guide(name):
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", SUPPORTS[name])
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    @easy_guide(program)
    def guide(self, x: Tensor) -> None:
        group = self.group(match="w")
        with self.plate("data", len(x)):
            group.sample("group", dist.Normal(0.2 * x[:, None], 0.5).to_event(1))

    x = normal(ROWS)
    rows = [_log_p(name, row[None]) for row in x]
    require_right(program, guide, x, sum(rows) / ROWS, slack=0.6)


# ---------------------------------------------------------------------- points


def test_a_point_for_a_local_latent_is_a_log_joint():
    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(0.5 * x))

    x = normal(ROWS)
    pair = Pair(model=model, guide=point)
    found = analysis.surgery(pair, x)
    want = (dist.Normal(0.0, 1.0).log_prob(0.5 * x) + dist.Normal(0.5 * x, 1.0).log_prob(x)).mean().item()
    assert found.elbo is None
    assert found.log_joint.value == pytest.approx(want, abs=1e-5)
    assert "elbo" not in str(found).split("log joint")[0].lower().replace("elbo surgery", "")
    for run in (analysis.evidence, analysis.gap):
        with pytest.raises(PvaeError, match="z"):
            run(pair, x)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean().item()
    prior = analysis.prior_evidence(pair, x, samples=2000).evidence
    assert prior.value == pytest.approx(exact, abs=5 * prior.standard_error + 0.01)


@pytest.mark.parametrize("kind", ["AutoDelta", "Delta"])
def test_a_point_for_a_global_latent(kind):
    """The evidence is that given the point, the surgery's total a log joint."""

    def program(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    point = torch.tensor(0.4)

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + 0.2, 0.7))

    def by_hand(x: Tensor) -> None:
        pyro.sample("b", dist.Delta(point))
        local(x)

    guide = by_hand
    if kind != "Delta":
        auto = AutoDelta(pyro.poutine.block(program, expose=["b"]), init_loc_fn=lambda site: point)

        def guide(x: Tensor) -> None:
            auto(x)
            local(x)

    x = normal(ROWS)
    pair = Pair(model=program, guide=guide)
    found = analysis.surgery(pair, x, samples=20)
    assert found.elbo is None
    want, error = elbo_of_pyro(program, guide, x, rows=ROWS)
    assert found.log_joint.value == pytest.approx(want, abs=5 * (error + found.log_joint.standard_error))
    given = dist.Normal(0.4, math.sqrt(2)).log_prob(x).mean().item()
    bound = analysis.evidence(pair, x, samples=200).iwae
    assert given - 0.1 < bound.value < given + 5 * bound.standard_error


def test_a_point_that_moves_with_another_global_latent_has_no_evidence():
    """Log p(x | b) at a b that depends on a sampled one would exceed any one log p(x | b)."""

    def program(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.2, 0.5))
        pyro.sample("b", dist.Delta(0.3 - a))

    with pytest.raises(PvaeError, match="values of b that depend"):
        analysis.evidence(Pair(model=program, guide=guide), normal(ROWS), samples=20)


# ---------------------------------------------------------------------- relaxed codes


def one_hot(x: Tensor, w: Tensor) -> Tensor:
    return x[:, None] * CENTRES * w


RELAXED = {
    "relaxed": lambda logits: dist.RelaxedOneHotCategorical(T, logits=logits),
    "straight through": lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(T, logits=logits),
    "torch's": lambda logits: RelaxedOneHotCategorical(T, probs=logits.softmax(-1)),
    "expanded": lambda logits: dist.RelaxedOneHotCategorical(T, logits=logits).expand([len(logits)]),
}


@pytest.mark.parametrize("name", RELAXED)
def test_one_hot_codes_of_pyro(name):
    make = RELAXED[name]

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", make(torch.zeros(len(x), 3)))
            pyro.sample("x", dist.Normal(c @ CENTRES, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(3))
        with pyro.plate("data", len(x)):
            pyro.sample("c", make(one_hot(x, w)))

    x = 1.4 * normal(ROWS)
    log_q = one_hot(x, torch.ones(3)).log_softmax(1)
    log_x = dist.Normal(CENTRES, 0.5).log_prob(x[:, None])
    _require_discrete(program, guide, x, log_q, log_x, math.log(1 / 3))


@pytest.mark.parametrize("plate", ["to_event", "plate"])
def test_two_one_hot_codes_in_a_row(plate):
    def make(logits: Tensor):
        fn = dist.RelaxedOneHotCategorical(T, logits=logits)
        return fn.to_event(1) if plate == "to_event" else fn

    def program(x: Tensor) -> None:
        if plate == "plate":
            with pyro.plate("data", len(x), dim=-2), pyro.plate("codes", 2, dim=-1):
                c = pyro.sample("c", make(torch.zeros(len(x), 2, 3)))
                pyro.sample("x", dist.Normal(c @ CENTRES, 0.7), obs=x)
        else:
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", make(torch.zeros(len(x), 2, 3)))
                pyro.sample("x", dist.Normal(c @ CENTRES, 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logits = x[..., None] * CENTRES
        if plate == "plate":
            with pyro.plate("data", len(x), dim=-2), pyro.plate("codes", 2, dim=-1):
                pyro.sample("c", make(logits))
        else:
            with pyro.plate("data", len(x)):
                pyro.sample("c", make(logits))

    x = normal((ROWS, 2))
    log_q = (x[..., None] * CENTRES).log_softmax(-1)
    log_x = dist.Normal(CENTRES, 0.7).log_prob(x[..., None])
    pair = Pair(model=program, guide=guide)
    found = analysis.surgery(pair, x, samples=40)
    want = (log_q.exp() * (log_x - math.log(3) - log_q)).sum((1, 2)).mean().item()
    assert found.elbo.value == pytest.approx(want, abs=5 * found.elbo.standard_error + 1e-4)
    assert found.mutual_information.kind == "exact"
    assert found.relaxed_elbo is not None


@pytest.mark.parametrize("event", [0, 1])
def test_relaxed_bits(event):
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample(
                "b", dist.RelaxedBernoulli(T, logits=0.3 * torch.ones(len(x), *[1] * event)).to_event(event)
            )
            pyro.sample("x", dist.Normal(2 * b.reshape(*b.shape[: b.dim() - event]), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = x.reshape(-1, *[1] * event)
            pyro.sample("b", dist.RelaxedBernoulli(T, logits=logits).to_event(event))

    x = normal(ROWS)
    bits = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=x[:, None]).log_prob(bits)
    log_prior = dist.Bernoulli(logits=torch.tensor(0.3)).log_prob(bits)
    _require_discrete(program, guide, x, log_q, dist.Normal(2 * bits, 1.0).log_prob(x[:, None]), log_prior)


def test_logarithms_of_relaxed_codes():
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", ExpRelaxed(T, logits=torch.zeros(len(x), 3)))
            pyro.sample("x", dist.Normal(c.exp() @ CENTRES, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", ExpRelaxed(T, logits=x[:, None] * CENTRES))

    x = normal(ROWS)
    log_q = (x[:, None] * CENTRES).log_softmax(1)
    log_x = dist.Normal(CENTRES, 0.5).log_prob(x[:, None])
    _require_discrete(program, guide, x, log_q, log_x, -math.log(3))


class ExpRelaxed(ExpRelaxedCategorical, dist.TorchDistribution):
    """Torch's distribution with the methods that Pyro needs."""


def _require_discrete(program, guide, x: Tensor, log_q: Tensor, log_x: Tensor, log_prior: Tensor | float) -> None:
    """The figures are those of the discrete codes, beside them the relaxed one of Pyro's loss."""
    found = analysis.surgery(Pair(model=program, guide=guide), x, samples=40)
    want = (log_q.exp() * (log_x + log_prior - log_q)).sum(1).mean().item()
    assert found.elbo.value == pytest.approx(want, abs=5 * found.elbo.standard_error + 1e-4)
    shared = log_q.exp().mean(0).log()
    information = (log_q.exp() * (log_q - shared)).sum(1).mean().item()
    assert found.mutual_information.kind == "exact"
    assert found.mutual_information.value == pytest.approx(information, abs=1e-4)
    with torch.no_grad():
        relaxed = torch.tensor([-Trace_ELBO().loss(program, guide, x) for _ in range(100)]) / len(x)
    error = relaxed.std().item() / 10 + found.relaxed_elbo.standard_error
    assert found.relaxed_elbo.value == pytest.approx(relaxed.mean().item(), abs=5 * error)
    bound = analysis.evidence(Pair(model=program, guide=guide), x, samples=100)
    exact = (log_x + log_prior).logsumexp(1).mean().item()
    assert bound.iwae.value < exact + 5 * bound.iwae.standard_error + 1e-4
    if bound.exact is not None:
        assert bound.exact.value == pytest.approx(exact, abs=1e-4)
