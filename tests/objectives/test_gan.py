"""GANs: the game's value, its gradients, the steps, what is learned, what is refused; no likelihood anywhere."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, operator, union-attr"

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

import pvae
from pvae.analysis import encode, sample, surgery
from pvae.analysis.samples.fidelity import fidelity
from pvae.analysis.samples.quality import two_sample
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError, NonFiniteError
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Fitting, Loss
from pvae.objectives.gan import (
    GAN,
    GANStepper,
    critic_loss,
    generate,
    generator_loss,
    nearest_accuracy,
    slope_penalty,
)
from pvae.pair.pair import Pair
from pvae.runs.rundir import list_runs

SMALL = {"kind": "mlp", "hidden": [16]}


def declared(**more: Any) -> Experiment:
    """A small GAN; `more` are tables of the declaration, merged one level deep."""
    base: dict[str, Any] = {
        "name": "gan",
        "data": {"source": "tensor"},
        "latents": {"z": {"dim": 3, "posterior": {"kind": "prior"}}},
        "decoder": {"network": SMALL, "likelihood": {"kind": "determined"}},
        "objective": {"kind": "gan", "critic": SMALL},
        "train": {"epochs": 2, "batch_size": 20, "optimizer": {"kind": "adam", "lr": 1e-3, "betas": [0.5, 0.99]}},
    }
    merged = {key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in more.items()}
    return Experiment.from_dict({**base, **merged})


def dataset(n: int = 100, d: int = 4) -> Dataset:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(3))
    return Dataset.from_tensors(x, validation=x[:40] + 0.01, test=x[:40] - 0.01)


def fit(experiment: Experiment, where: Path, data: Dataset | None = None, **options: Any) -> pvae.Run:
    return pvae.fit(experiment, data=data or dataset(), run_dir=where, device="cpu", progress=False, **options)


# ---------------------------------------------------------------------- the game

P, R = norm(0.0, 1.0), norm(1.5, 0.7)
"""Laws of data and of draws."""


def jensen_shannon() -> float:
    """By quadrature, on its own."""

    def half(one: Any, other: Any) -> float:
        def term(x: float) -> float:
            a, b = one.pdf(x), other.pdf(x)
            return a * math.log(2 * a / (a + b)) if a > 0 else 0.0

        return quad(term, -12, 12, limit=400)[0]

    return (half(P, R) + half(R, P)) / 2


def quantiles(law: Any, n: int = 200_000) -> np.ndarray:
    """As many points of equal weight: a mean over them is an integral."""
    return law.ppf((np.arange(n) + 0.5) / n)


def best_logits() -> tuple[Tensor, Tensor]:
    """log p - log r at points of both laws."""
    real, fake = (torch.tensor(P.logpdf(x) - R.logpdf(x)) for x in (quantiles(P), quantiles(R)))
    return real, fake


def test_at_the_best_critic_the_value_is_twice_the_divergence_less_log_4():
    real, fake = best_logits()
    assert -critic_loss(real, fake).item() == pytest.approx(2 * jensen_shannon() - math.log(4), abs=2e-5)


@pytest.mark.parametrize("worse", [lambda s: 0.7 * s, lambda s: s + 0.3, lambda s: s.clamp(-1, 1)])
def test_no_other_critic_is_better(worse):
    real, fake = best_logits()
    assert critic_loss(worse(real), worse(fake)) > critic_loss(real, fake) + 1e-4


def test_alike_the_value_is_minus_log_4():
    same = torch.zeros(5)
    assert critic_loss(same, same).item() == pytest.approx(math.log(4))
    assert generator_loss(same, "minimax").item() == pytest.approx(-math.log(2))
    assert generator_loss(same, "non_saturating").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("form", "slope"), [("minimax", lambda d: -d), ("non_saturating", lambda d: d - 1)])
def test_slopes_of_the_generators_losses(form, slope):
    s = torch.linspace(-30, 30, 41, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(generator_loss(s, form), s)
    d = 1 / (1 + np.exp(-s.detach().numpy()))
    assert found.numpy() * len(s) == pytest.approx(slope(d), abs=3e-9)  # softplus is linear beyond 20


def test_slopes_of_the_critics_loss():
    real, fake = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    on_real, on_fake = torch.autograd.grad(critic_loss(real, fake), (real, fake))
    assert torch.allclose(on_real, (torch.sigmoid(real) - 1) / 7)
    assert torch.allclose(on_fake, torch.sigmoid(fake) / 7)


def test_slope_penalty_is_that_of_finite_differences():
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
    x, h = torch.randn(6, 3, dtype=torch.float64), 1e-6
    logits, penalty = slope_penalty(critic, x)
    with torch.no_grad():
        steps = [(critic(x + h * e) - critic(x - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
        by_hand = 0.5 * sum(s.square() for s in steps).mean()
        assert torch.equal(logits, critic(x))
    assert penalty.item() == pytest.approx(by_hand.item(), rel=1e-7)
    weight = critic[0].weight
    (slope,) = torch.autograd.grad(penalty, weight)
    way = torch.randn_like(weight)

    def moved(step: float) -> float:
        other = copy.deepcopy(critic)
        with torch.no_grad():
            other[0].weight += step * way
        return slope_penalty(other, x)[1].item()

    assert float((slope * way).sum()) == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-5)


def test_nearest_accuracy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(0.7, 1, size=(40, 3))
    rows, own = np.concatenate([a, b]), np.arange(80) < 40
    distance = ((rows[:, None] - rows) ** 2).sum(-1) + 1e9 * np.eye(80)
    want = (own[distance.argmin(1)] == own).mean()
    assert nearest_accuracy(torch.tensor(a), torch.tensor(b)) == pytest.approx(want)
    assert nearest_accuracy(torch.tensor(a), torch.tensor(b) + 100) == 1.0
    assert nearest_accuracy(torch.tensor(a), torch.tensor(a) + 1e-6) == 0.0


# ---------------------------------------------------------------------- the steps


def duel(experiment: Experiment, data: Dataset, optimizer: Any = None, **more: Any) -> tuple[Pair, GANStepper]:
    pair = experiment.build(data.shape).train()
    optimizer = optimizer or torch.optim.SGD(pair.parameters(), lr=0.05)
    loss = Loss(experiment.objective, pair, len(data.train))
    fitting = Fitting(loss, data.train, 5, 0, {}, lambda _kind, _message: None, optimizer, **more)
    return pair, GANStepper(experiment.objective, fitting)


@pytest.mark.parametrize("form", ["non_saturating", "minimax"])
@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_a_step_is_the_one_written_by_hand(form, r1):
    data = dataset()
    experiment = declared(objective={"form": form, "r1": r1})
    pair, step = duel(experiment, data)
    other = copy.deepcopy(pair)
    critic, network = other.critic.network, other.model.decoder.network
    x = data.train.x[:20]
    torch.manual_seed(5)
    out = step(x)
    torch.manual_seed(5)
    z = [generate_z(other, x) for _ in range(2)]
    # the critic
    real = x.clone().requires_grad_(True)
    logits = critic({"x": real}).squeeze(-1)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    fake = network({"z": z[0]}).detach()
    value = torch.sigmoid(logits).log().mean() + (1 - torch.sigmoid(critic({"x": fake}).squeeze(-1))).log().mean()
    loss = -value + r1 * 0.5 * slope.square().sum(1).mean()
    parameters = list(critic.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if g is not None:
            p.data -= 0.05 * g
    # the generator, against the critic as it is now
    d = torch.sigmoid(critic({"x": network({"z": z[1]})}).squeeze(-1))
    paid = -d.log().mean() if form == "non_saturating" else (1 - d).log().mean()
    parameters = list(network.parameters())
    for p, g in zip(parameters, torch.autograd.grad(paid, parameters), strict=True):
        p.data -= 0.05 * g
    assert dict(zip(step.names, out.tolist(), strict=True)) == pytest.approx(
        {
            "critic_loss": -value.item(),
            "r1": r1 * 0.5 * slope.square().sum(1).mean().item(),
            "generator_loss": paid.item(),
        },
        rel=1e-5,
    )
    for (name, one), two in zip(pair.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7), name


def generate_z(pair: Pair, x: Tensor) -> Tensor:
    """z as a step draws it from the same random state."""
    return pair.simulate(x).nodes["z"]["value"].detach()


def test_each_side_takes_its_own_number_of_steps():
    data, experiment = dataset(), declared(objective={"critic_steps": 3})
    pair = experiment.build(data.shape)
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3)
    _, step = duel(experiment, data)
    step.optimizer, step.pair, step.critic = optimizer, pair, pair.get_submodule("critic")
    critic = {id(p) for p in pair.critic.parameters()}
    learned = list(pair.parameters())
    step.sides = [p for p in learned if id(p) in critic], [p for p in learned if id(p) not in critic]
    step(data.train.x[:20])
    step(data.train.x[20:40])
    for p in learned:
        assert optimizer.state[p]["step"] == (6 if id(p) in critic else 2)
        assert p.grad is None


def test_the_average_follows_the_weights():
    data, experiment = dataset(), declared()
    pair, step = duel(experiment, data)
    kept = [p.detach().clone() for p in pair.parameters()]
    before = [p.clone() for p in kept]
    step.average = (kept, 0.75)
    step(data.train.x[:20])
    for average, old, p in zip(kept, before, pair.parameters(), strict=True):
        assert torch.allclose(average, 0.75 * old + 0.25 * p, atol=1e-7)


def test_a_loss_that_is_not_finite_moves_nobody(tmp_path, monkeypatch):
    def overflow(critic, rows):
        logits, penalty = slope_penalty(critic, rows)
        return logits, penalty * 1e39

    monkeypatch.setattr("pvae.objectives.gan.slope_penalty", overflow)
    with pytest.raises(NonFiniteError, match=r"step 0 .*generator_loss"):
        fit(declared(objective={"r1": 1.0}), tmp_path)
    experiment = declared(objective={"r1": 1.0}, train={"nonfinite": "skip", "average": 0.9})
    run = fit(experiment, tmp_path)
    assert run.status["skipped"] == 10
    for (name, p), q in zip(run.pair.named_parameters(), experiment.build((4,)).parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_gradient_norm_is_clipped():
    data, experiment = dataset(), declared()
    pair, step = duel(experiment, data, clip_norm=1e-3)
    before = [p.detach().clone() for p in pair.parameters()]
    out = dict(zip(step.names, step(data.train.x[:20]).tolist(), strict=True))
    assert out["critic_grad_norm"] > 1e-3
    assert out["generator_grad_norm"] > 1e-3
    moved = torch.cat([(p - q).flatten() for p, q in zip(pair.parameters(), before, strict=True)])
    assert 0 < moved.norm() <= 0.05 * 1e-3 * math.sqrt(2) * 1.01


# ---------------------------------------------------------------------- the pair


def test_the_guide_is_the_prior():
    z2 = {"dim": 2, "posterior": "prior"}
    z1 = {"dim": 3, "given": ["z2"], "prior": {"kind": "conditional_normal", "network": SMALL}, "posterior": "prior"}
    base = declared().model_dump(exclude_none=True, exclude_unset=True)
    pair = Experiment.from_dict({**base, "latents": {"z2": z2, "z1": z1}}).build((4,))
    x = torch.randn(6, 4)
    guide, model = pair.traces(x)
    for name in ("z1", "z2"):
        q, p = (t.nodes[name]["fn"].log_prob(guide.nodes[name]["value"]) for t in (guide, model))
        assert torch.equal(q, p)
    assert pair.check(x) == []
    generate(pair, x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pair.model.parameters())
    assert all(p.grad is None for p in pair.critic.parameters())


def test_with_a_label_both_sides_see_it(tmp_path):
    base = declared().model_dump(exclude_none=True, exclude_unset=True)
    decoder = {**base["decoder"], "given": ["z", "y"]}
    experiment = Experiment.from_dict({**base, "covariates": {"y": {"codes": 2}}, "decoder": decoder})
    y = torch.arange(200) % 2
    x = torch.randn(200, 4) + 4.0 * y[:, None]
    data = Dataset.from_tensors(x, y, validation=(x[:40] + 0.01, y[:40]), test=(x[:40] - 0.01, y[:40]))
    wide = "hidden=[32, 32]"
    more = ["train.epochs=40", "train.optimizer.lr=3e-3", "train.optimizer.betas=[0.0, 0.99]", "objective.r1=0.1"]
    run = fit(experiment.with_overrides(*more, f"decoder.network.{wide}", f"objective.critic.{wide}"), tmp_path, data)
    rows = run.data.test.x
    other = rows.clone()
    other[:, -1] = 1 - other[:, -1]
    assert not torch.allclose(run.pair.critic(rows), run.pair.critic(other))
    low, high = (sample(run, 200, given={"y": label}).x.mean() for label in (0, 1))
    assert high - low > 2


def test_pixels_end_in_the_unit_interval():
    pair = declared(decoder={"likelihood": {"kind": "determined", "squash": "sigmoid"}}).build((4,))
    for p in pair.model.parameters():
        p.data *= 30
    x = generate(pair, torch.rand(50, 4))
    assert ((x >= 0) & (x <= 1)).all()
    assert x.std() > 0.1


def test_validation_moves_nothing_and_says_the_same_twice():
    data, experiment = dataset(), declared()
    pair = experiment.build(data.shape)
    state, random = copy.deepcopy(pair.state_dict()), torch.random.get_rng_state()
    one, two = (experiment.objective.measure(pair, data.validation.x, 7) for _ in range(2))
    assert one == two
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in pair.state_dict().items())
    assert one["js_bound"] == pytest.approx((math.log(4) - one["critic_loss"]) / 2)
    assert one != experiment.objective.measure(pair, data.validation.x, 8)


# ---------------------------------------------------------------------- fits


def test_it_learns_a_toy_density(tmp_path):
    experiment = Experiment.from_dict(
        {
            **declared().model_dump(exclude_none=True, exclude_unset=True),
            "data": {"source": "toy", "density": "eight_gaussians", "rows": 3000},
            "latents": {"z": {"dim": 4, "posterior": "prior"}},
            "decoder": {"network": {"kind": "mlp", "hidden": [64, 64]}, "likelihood": "determined"},
            "objective": {"kind": "gan", "critic": {"kind": "mlp", "hidden": [64, 64]}, "r1": 0.1},
            "train": {"epochs": 40, "optimizer": {"kind": "adam", "lr": 2e-3, "betas": [0.0, 0.99]}, "average": 0.98},
        }
    )
    run = pvae.fit(experiment, run_dir=tmp_path, device="cpu", progress=False)
    real, fake = run.data.test.x, sample(run, len(run.data.test.x)).x
    fresh = experiment.build((2,)).eval()
    at_first = sample(fresh, len(real)).x
    assert two_sample(real, fake).accuracy.value < 0.8 < 0.95 < two_sample(real, at_first).accuracy.value
    near, far = fidelity(real, fake), fidelity(real, at_first)
    assert near.recall.value > 0.7
    assert near.coverage.value > 0.5 > 0.1 > far.coverage.value
    rows = run.metrics.query("split == 'validation'")
    assert rows["two_sample"].iloc[-1] < rows["two_sample"].iloc[0] - 0.1


def test_resume_is_exact(tmp_path):
    more = {"objective": {"r1": 0.5, "critic_steps": 2}, "train": {"average": 0.9, "clip_norm": 1.0}}
    whole = fit(declared(**more).with_overrides("train.epochs=3"), tmp_path / "whole")
    half = fit(declared(**more).with_overrides("train.epochs=1"), tmp_path / "half")
    longer = pvae.resume(half, "train.epochs=3", allow_changes=True, progress=False, device="cpu", data=None)
    for key, value in whole.pair.state_dict().items():
        assert torch.equal(value, longer.pair.state_dict()[key]), key
    assert any(key.startswith("critic.") for key in whole.pair.state_dict())
    columns = ["epoch", "split", "critic_loss", "generator_loss", "two_sample"]
    assert whole.metrics[columns].equals(longer.metrics[columns])


@pytest.mark.cuda
def test_a_step_on_a_gpu_waits_for_nothing():
    data = dataset().to("cuda")
    experiment = declared(objective={"r1": 0.5, "critic_steps": 2})
    pair = experiment.build(data.shape).to("cuda")
    optimizer = experiment.train.optimizer.build(pair.parameters())
    loss = Loss(experiment.objective, pair, len(data.train))
    average = [p.detach().clone() for p in pair.parameters()]
    step = GANStepper(
        experiment.objective,
        Fitting(loss, data.train, 5, 0, {}, lambda _kind, _message: None, optimizer, 1.0, (average, 0.9)),
    )
    x = data.train.x[:20]
    with pyro.validation_enabled(False):
        step(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = step(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    before = [p.detach().clone() for p in pair.parameters()]
    with pyro.validation_enabled(False):
        step(x * torch.nan)
    assert all(torch.equal(p, q) for p, q in zip(pair.parameters(), before, strict=True))


# ---------------------------------------------------------------------- no likelihood anywhere


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pvae.Run:
    return fit(declared(), tmp_path_factory.mktemp("gan"))


def test_no_figure_is_an_elbo(run):
    assert "elbo" not in run.status
    assert not {"elbo", "reconstruction", "kl", "beta"} & set(run.metrics.columns)
    assert "ELBO" not in run._repr_html_()
    assert list_runs(run.path.parent.parent)[0]["elbo"] is None


def test_nothing_scores_it(run):
    x = run.data.test.x
    for analysis in (surgery, encode, pvae.analysis.evidence, pvae.analysis.gap, pvae.analysis.ais):
        with pytest.raises(DataError, match="generator without a likelihood"):
            analysis(run.pair, x)
    with pytest.raises(DataError, match="generator without a likelihood"):
        run.posterior()
    for score in (run.pair, run.pair.terms, lambda x: Trace_ELBO().loss(run.pair.model, run.pair.guide, x)):
        with pytest.raises(DeclarationError, match=r"expected a likelihood; got x = g\(z\)"):
            score(x)
    with pytest.raises(DeclarationError, match="refit: expected a run with an encoder"):
        pvae.refit(run, "latents.z.prior.kind=realnvp")
    with pytest.raises(DeclarationError, match="objective gan: expected to be fitted by its own steps"):
        Loss(run.plan.objective, run.pair)(x)


BAD = {
    "a likelihood": (
        {"decoder": {"likelihood": "normal"}},
        'decoder.likelihood: expected determined, x = g.z., for the objective gan; got "normal"',
    ),
    "a posterior": (
        {"latents": {"z": {"dim": 3}}},
        'latents.z.posterior: expected prior, because the objective gan infers nothing; got "normal"',
    ),
    "no gan": (
        {"objective": {"kind": "trace_elbo"}, "decoder": {"likelihood": "normal"}},
        'latents.z.posterior: expected a posterior that reads x .*trace_elbo fits a density of x; got "prior"',
    ),
    "given x": (
        {"latents": {"z": {"dim": 3, "posterior": {"kind": "prior", "given": ["x"]}}}},
        "latents.z.posterior.given: expected nothing, because the posterior prior infers nothing; got",
    ),
    "alternate": (
        {"train": {"alternate": 2}},
        "train.alternate: expected 0, because the objective gan has no ELBO, no guide, and its own steps; got 2",
    ),
    "patience": (
        {"train": {"patience": 2}},
        "train.patience: expected nothing, because the objective gan has no ELBO, no guide, and its own steps; got 2",
    ),
    "beta": ({"objective": {"beta": 0.5}}, "objective: expected beta = 1 and free_bits = 0 with gan"),
    "analysis": ({"analysis": {"every": 1}}, "analysis.every: expected 0, because the objective gan has no ELBO"),
    "refit": (
        {"refit": {"priors": {"z": {"kind": "realnvp"}}}},
        "refit: expected none, because the objective gan infers no latents to fit a prior to",
    ),
    "vamp": (
        {"latents": {"z": {"dim": 3, "prior": "vamp", "posterior": "prior"}}},
        "latents.z.posterior.given: expected",
    ),
    "codes": (
        {"latents": {"z": {"codes": 3, "posterior": "prior"}}},
        "latents.z.posterior: expected a posterior of codes",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=list(BAD))
def test_what_has_no_meaning_is_refused(change, message):
    base = declared().model_dump(exclude_none=True, exclude_unset=True)
    for key, value in change.items():
        base[key] = value if key in ("latents", "refit") else {**base.get(key, {}), **value}
        if key == "objective" and value.get("kind", "gan") != "gan":
            base[key] = value
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict(base)


def test_a_squashed_point_has_no_way_back():
    raw = Experiment.load("flow").model_dump(exclude_none=True, exclude_unset=True)
    raw["decoder"]["likelihood"] = {"kind": "determined", "squash": "sigmoid"}
    with pytest.raises(
        DeclarationError, match=r"decoder\.likelihood\.squash: expected none, because every other objective than gan"
    ):
        Experiment.from_dict(raw)


def test_a_critic_must_give_one_number():
    with pytest.raises(DeclarationError, match=r"objective\.critic: network bijection: expected"):
        declared(objective={"critic": {"kind": "bijection"}}).build((4,))


def test_a_prior_that_no_gradient_reaches_is_refused(tmp_path):
    latents = {"z": {"dim": 3, "prior": {"kind": "mixture", "components": 4}, "posterior": "prior"}}
    with pytest.raises(DeclarationError, match=r"latents\.z\.prior: expected draws with a pathwise gradient"):
        fit(declared(latents=latents), tmp_path)


def test_a_pair_written_by_hand_has_no_critic(tmp_path):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, pyro.param("s", torch.tensor(1.0))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(x, 1.0))

    with pytest.raises(DeclarationError, match="pair: expected a declared pair for the objective gan"):
        pvae.fit(Pair(model, guide), objective=GAN(), data=torch.randn(50), run_dir=tmp_path, progress=False)
