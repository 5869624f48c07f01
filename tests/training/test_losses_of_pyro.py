"""A fit with an ELBO of `pyro.infer` takes the steps of Pyro's own SVI."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import SGD
from torch import Tensor

import pvae
from pvae.objectives.elbo import PyroELBO, TraceELBO
from pvae.pair.pair import Pair
from tests.programs.program import normal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, STEPS = 100, 5


def param(name: str, value: float, **options) -> Tensor:
    return pyro.param(name, torch.tensor(value), **options)


def continuous(latent: str = "normal"):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a, s = param("a", -0.2), param("s", 0.3, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, s))

    return model, guide


def discrete(infer: dict[str, str], summed: bool = False):
    def model(x: Tensor) -> None:
        b = param("b", 0.5)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(3)), infer=infer if summed else {})
            pyro.sample("x", dist.Normal(b * (c - 1.0), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if not summed:
            a = param("a", 0.4)
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Categorical(logits=a * x[:, None] * torch.arange(3.0)), infer=infer)

    return model, guide


def with_globals():
    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(param("a", 1.0), param("s", 0.2, constraint=dist.constraints.positive)))

    return model, guide


PARALLEL = {"enumerate": "parallel"}
CASES = {
    "Trace": (Trace_ELBO, {}, continuous()),
    "Trace, several": (Trace_ELBO, {"num_particles": 3}, continuous()),
    "Trace, score": (Trace_ELBO, {}, discrete({})),
    "Trace, global": (Trace_ELBO, {}, with_globals()),
    "MeanField": (TraceMeanField_ELBO, {}, continuous()),
    "MeanField, global": (TraceMeanField_ELBO, {}, with_globals()),
    "Enum, continuous": (TraceEnum_ELBO, {"max_plate_nesting": 1}, continuous()),
    "Enum, guide": (TraceEnum_ELBO, {"max_plate_nesting": 1}, discrete(PARALLEL)),
    "Enum, model": (TraceEnum_ELBO, {"max_plate_nesting": 1}, discrete(PARALLEL, summed=True)),
    "Graph": (TraceGraph_ELBO, {}, discrete({})),
    "Renyi": (RenyiELBO, {"alpha": 0.0, "num_particles": 4}, continuous()),
    "Renyi, half": (RenyiELBO, {"alpha": 0.5, "num_particles": 3}, continuous()),
}


def by_svi(model, guide, x: Tensor, loss) -> dict[str, float]:
    pyro.clear_param_store()
    svi = SVI(model, guide, SGD({"lr": 0.1 / len(x)}), loss)
    for _ in range(STEPS):
        svi.step(x)
    found = {name: value.detach().item() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_svi(name, tmp_path):
    """Plain gradient descent on all rows; the means over seeds agree within their errors."""
    kind, options, (model, guide) = CASES[name]
    x = 1.3 * normal(ROWS)
    descent = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.1", "train.keep=last")
    ours: list[dict[str, float]] = []
    for seed in range(3):
        pair = Pair(model=model, guide=guide)
        run = pvae.fit(
            pair, f"train.epochs={STEPS}", f"train.batch_size={ROWS}", f"seed={seed}", *descent,
            data=x, loss=kind(**options), run_dir=tmp_path / str(seed), progress=False,
        )  # fmt: skip
        rows = run.data.split("train").rows
        with run.pair.own_store():
            ours.append({n: value.detach().item() for n, value in pyro.get_param_store().items()})
    theirs = []
    for seed in range(8):
        torch.manual_seed(seed)
        theirs.append(by_svi(model, guide, rows, kind(**options)))
    for parameter in theirs[0]:
        one = torch.tensor([t[parameter] for t in ours]).double()
        other = torch.tensor([t[parameter] for t in theirs]).double()
        error = other.std().item() * (1 / len(one) + 1 / len(other)) ** 0.5
        assert abs(one.mean() - other.mean()).item() < 5 * error + 2e-3, (parameter, one, other)
        assert other.mean().item() != pytest.approx({"a": -0.2, "s": 0.3, "b": 0.5}[parameter], abs=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_pyros_at_the_same_noise(name):
    kind, options, (model, guide) = CASES[name]
    x = 1.3 * normal(20)
    pair = Pair(model=model, guide=guide).adopt(x)
    objective = PyroELBO.of(kind(**options))
    torch.manual_seed(5)
    loss, _ = objective.evaluate(pair, x, len(x), torch.tensor(1.0))
    ours = torch.autograd.grad(loss, list(pair.parameters()), allow_unused=True)
    pyro.clear_param_store()
    torch.manual_seed(5)
    value = kind(**options).loss_and_grads(model, guide, x)
    theirs = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
    pyro.clear_param_store()
    assert loss.item() == pytest.approx(value / len(x), rel=1e-4)
    for (parameter, _), got in zip(pair.named_parameters(), ours, strict=True):
        want = theirs[parameter.removeprefix("free.")]
        assert got.item() == pytest.approx(want.item() / len(x), rel=1e-3, abs=1e-5)


PLATES = {
    "of the batch": lambda x: pyro.plate("data", len(x)),
    "without a size": lambda x: pyro.plate("data"),
    "of a declared size": lambda x: pyro.plate("data", 1000, subsample_size=len(x)),
}


@pytest.mark.parametrize("plate", PLATES.values(), ids=list(PLATES))
def test_a_global_latent_counts_once_for_all_rows_whatever_the_plate(plate):
    """Pyro's loss of a batch from a larger data set is that of pvae's own step: the share of the global KL and all."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with plate(x):
            z = pyro.sample("z", dist.Normal(b + torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(param("m", 0.7), 0.1))
        with plate(x):
            pyro.sample("z", dist.Normal(param("a", 0.3) * x, 0.7))

    pair, x = Pair(model, guide), normal((20,))
    pair.adopt(x)
    found = []
    for objective in (TraceELBO(), PyroELBO()):
        torch.manual_seed(0)
        loss, _ = objective.evaluate(pair, x, 60, torch.ones(()))
        found.append([loss.detach(), *torch.autograd.grad(loss, [*pair.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
