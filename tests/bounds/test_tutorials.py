"""Pairs written and trained as Pyro's tutorials do it get every analysis unchanged."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, union-attr"

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pvae.analysis import evidence, surgery
from pvae.errors import DeclarationError
from pvae.objectives.base import Loss
from pvae.objectives.elbo import TraceELBO
from pvae.pair.pair import Pair

# ---------------------------------------------------------------------- the VAE


class Decoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 64)
        self.softplus = nn.Softplus()
        self.sigmoid = nn.Sigmoid()

    def forward(self, z):
        return self.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class Encoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()

    def forward(self, x):
        hidden = self.softplus(self.fc1(x.reshape(-1, 64)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class VAE(nn.Module):
    def __init__(self, z_dim: int = 5, hidden_dim: int = 40) -> None:
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim)
        self.decoder = Decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x.reshape(-1, 64))
            return loc_img

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def images() -> Tensor:
    return torch.tensor(load_digits().images[:600] > 7).float()[:, None]


def test_the_vae():
    vae, x = VAE(), images()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1.0e-2}), loss=Trace_ELBO())
    losses = [svi.step(rows) / len(rows) for _ in range(8) for rows in x.split(100)]
    assert losses[-1] < losses[0] - 5
    pair = Pair(model=vae.model, guide=vae.guide)
    assert pair.check(x) == []
    found = surgery(pair, x, samples=5, labels=torch.tensor(load_digits().target[:600]))
    loss = np.mean([svi.evaluate_loss(x) for _ in range(20)]) / len(x)
    assert found.elbo.value == pytest.approx(-loss, abs=5 * found.elbo.standard_error)
    assert 0 < found.label_information.value < found.mutual_information.value < math.log(600)
    correlation = found.latents["latent"].dimensions.total_correlation
    assert correlation.value > -4 * correlation.standard_error
    assert evidence(pair, x[:50], samples=100).gap > 0
    pyro.clear_param_store()


# ---------------------------------------------------------------------- the Gaussian mixture

DATA = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
K = 2


@config_enumerate
def mixture(data):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(K)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", K):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def init_loc_fn(site):
    if site["name"] == "weights":
        return torch.ones(K) / K
    if site["name"] == "scale":
        return (DATA.var() / 2).sqrt()
    return torch.tensor([2.0, 9.0])


def globals_of(model):
    return poutine.block(model, expose=["weights", "locs", "scale"])


def fitted_mixture(data: Tensor = DATA) -> tuple[Pair, dict[str, Tensor], float]:
    """The pair trained by Pyro's own SVI, its points, and Pyro's loss."""
    guide = AutoDelta(globals_of(mixture), init_loc_fn=init_loc_fn)
    svi = SVI(mixture, guide, Adam({"lr": 0.1, "betas": [0.8, 0.99]}), loss=TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(150):
        svi.step(data)
    points = {name: value.detach().double() for name, value in guide(data).items()}
    loss = svi.evaluate_loss(data)
    pair = Pair(model=mixture, guide=guide)
    pair.adopt(data)
    pyro.clear_param_store()
    return pair, points, loss


def test_the_mixture_is_exact():
    pair, points, loss = fitted_mixture()
    assert pair.check(DATA) == []
    assert pair.layout.enumerated == ("assignment",)
    assert pair.layout.latents == ()
    assert set(pair.layout.shared) == {"weights", "scale", "locs"}
    found = surgery(pair, DATA)
    assert found.elbo is None  # the guide sets the global latents to points
    assert found.log_joint.value == pytest.approx(-loss / 5, abs=1e-6)
    log_joint = points["weights"].log().numpy() + scipy.stats.norm(
        points["locs"].numpy(), float(points["scale"])
    ).logpdf(DATA.numpy()[:, None])
    log_p = np.logaddexp(*log_joint.T)
    r = np.exp(log_joint - log_p[:, None])
    mean = r.mean(0)
    assert found.reconstruction.value - found.kl.value == pytest.approx(log_p.mean(), abs=1e-6)
    assert found.mutual_information.value == pytest.approx(
        (r * np.log(np.maximum(r, 1e-300) / mean)).sum(1).mean(), abs=1e-6
    )
    marginal = (mean * np.log(mean / points["weights"].numpy())).sum()
    assert found.marginal_kl.value == pytest.approx(marginal, abs=1e-6)
    assert {e.kind for e in (found.log_joint, found.kl, found.mutual_information, found.marginal_kl)} == {"exact"}
    assert found.latents["assignment"].perplexity[0] == pytest.approx(math.exp(-(mean * np.log(mean)).sum()), abs=1e-5)
    assert evidence(pair, DATA, samples=3).iwae.value == pytest.approx(log_p.mean(), abs=1e-5)


def test_the_mixture_has_the_loss_and_gradient_of_pyro():
    pair, _, _ = fitted_mixture()
    loss = Loss(TraceELBO(), pair, 5)
    value, figures = loss(DATA)
    names = [name for name, _ in pair.named_parameters()]
    mine = torch.autograd.grad(value, list(pair.parameters()))
    with pair.own_store():
        theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture, pair.guide, DATA) / 5
    want = torch.autograd.grad(theirs, list(pair.parameters()))
    assert value.item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, a, b in zip(names, mine, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert dict(zip(loss.names, figures.tolist(), strict=True))["kl/assignment"] > 0.5


def test_a_mixture_can_be_fitted(tmp_path):
    import pvae

    x = torch.cat([torch.randn(150) * 0.5 - 3, torch.randn(150) * 0.5 + 3])
    start = {"weights": torch.ones(K) / K, "scale": torch.tensor(1.0), "locs": torch.tensor([-1.0, 1.0])}
    guide = AutoDelta(globals_of(mixture), init_loc_fn=lambda site: start[site["name"]])
    pair = Pair(model=mixture, guide=guide)
    run = pvae.fit(pair, "train.epochs=40", "train.optimizer.lr=0.05", data=x, run_dir=tmp_path, progress=False)
    again = pvae.Run.load(run.path, data=x, pair=run.pair)
    found = surgery(again.pair, again.data.train.x)
    assert found.latents["assignment"].perplexity[0] == pytest.approx(2, abs=0.05)
    assert found.mutual_information.value == pytest.approx(math.log(2), abs=0.02)


def test_random_global_latents_are_told_apart_from_points():
    guide = AutoNormal(globals_of(mixture), init_loc_fn=init_loc_fn)
    pair = Pair(model=mixture, guide=guide)
    found = surgery(pair, DATA, samples=3)
    assert found.elbo.kind == found.global_kl.kind == "estimate"
    assert found.global_kl.standard_error > 0
    assert found.mutual_information is None  # p(c | x) moves with the draw of the global latents
    assert "one draw of the global latents" in surgery(pair, DATA).elbo.note


def test_two_enumerated_sites_are_one_joint_code():
    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0).double())
        with pyro.plate("data", len(x)):
            a = pyro.sample(
                "a", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)), infer={"enumerate": "parallel"}
            )
            b = pyro.sample(
                "b",
                dist.Categorical(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)[a]),
                infer={"enumerate": "parallel"},
            )
            pyro.sample("x", dist.Normal(gain * (2.0 * a + b), torch.tensor(0.7, dtype=torch.float64)), obs=x)

    x = torch.randn(20).double() + 1
    pair = Pair(model=model, guide=lambda x: None)
    found = surgery(pair, x)
    joint = np.array([[0.15, 0.09, 0.06], [0.07, 0.07, 0.56]])
    means = 2.0 * np.arange(2)[:, None] + np.arange(3)
    log_x = scipy.stats.norm(means, 0.7).logpdf(x.numpy()[:, None, None])
    log_p = np.log((np.exp(log_x) * joint).sum((1, 2)))
    r = np.exp(log_x) * joint / np.exp(log_p)[:, None, None]
    assert found.elbo.value == pytest.approx(log_p.mean(), abs=1e-10)
    assert found.kl.value == pytest.approx((r * np.log(r / joint)).sum((1, 2)).mean(), abs=1e-10)
    information = (r * np.log(r / r.mean(0))).sum((1, 2)).mean()
    assert found.mutual_information.value == pytest.approx(information, abs=1e-10)
    terms = pair.terms(x)
    first = r.sum(2)
    assert terms.kl["a"].tolist() == pytest.approx((first * np.log(first / [0.3, 0.7])).sum(1).tolist())
    assert (terms.kl["a"] + terms.kl["b"]).mean().item() == pytest.approx(found.kl.value)


def test_a_latent_beside_an_enumerated_one():
    # p(z) = sum_c p(c) N(z; m_c, 1): the prior of z is that mixture.
    centres = torch.tensor([-2.0, 2.0]).double()

    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0).double())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(2).double()), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(centres[c], 1.0))
            pyro.sample("x", dist.Normal(gain * z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.4))

    x = torch.randn(50).double() * 2
    found = surgery(Pair(model=model, guide=guide), x, samples=200)
    # E_q log p(z) by Gauss-Hermite; 4 standard errors, one new seed in 16 000.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = 0.8 * x.numpy()[:, None] + 0.4 * nodes
    log_p = np.logaddexp(scipy.stats.norm(-2, 1).logpdf(z), scipy.stats.norm(2, 1).logpdf(z)) - math.log(2)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.16)
    want = -entropy - (log_p @ weights / weights.sum()).mean()
    assert found.kl.value == pytest.approx(want, abs=4 * found.kl.standard_error)
    assert found.mutual_information is not None


def test_what_cannot_be_enumerated_says_so():
    def unmarked(x):
        gain = pyro.param("gain", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(2)))
            pyro.sample("x", dist.Normal(gain * c, 1.0), obs=x)

    problems = Pair(model=unmarked, guide=lambda x: None).check(torch.zeros(4))
    assert 'infer={"enumerate": "parallel"}' in str(problems[0])

    def inside_pixels(x):
        gain = pyro.param("gain", torch.tensor(1.0))
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("pixels", 3, dim=-2):
                c = pyro.sample("c", dist.Categorical(logits=torch.zeros(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(gain * c.sum(-2), 1.0), obs=x)

    with pytest.raises(DeclarationError, match="x: expected a density that keeps the plates around the sites"):
        surgery(Pair(model=inside_pixels, guide=lambda x: None), torch.zeros(4))

    def huge(x):
        gain = pyro.param("gain", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            c = [
                pyro.sample(f"c{i}", dist.Categorical(logits=torch.zeros(9)), infer={"enumerate": "parallel"})
                for i in range(4)
            ]
            pyro.sample("x", dist.Normal(gain * sum(c), 1.0), obs=x)

    with pytest.raises(DeclarationError, match="at most 4096 joint states to sum over; got 6561"):
        surgery(Pair(model=huge, guide=lambda x: None), torch.zeros(4))

    def everywhere(x):
        gain = pyro.param("gain", torch.tensor(1.0))
        c = pyro.sample("c", dist.Categorical(logits=torch.zeros(2)), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(gain * c, 1.0), obs=x)

    with pytest.raises(DeclarationError, match="expected enumerated sites inside the data plate; got global ones"):
        surgery(Pair(model=everywhere, guide=lambda x: None), torch.zeros(4))


def test_weights_inside_of_a_sum_are_refused():
    pair, _, _ = fitted_mixture()
    scaled = Pair(model=poutine.scale(mixture, scale=0.3), guide=pair.guide)
    with pytest.raises(DeclarationError, match=r"without poutine.scale; got a scale of 0.3. Set objective.beta"):
        scaled.terms(DATA)
    assert surgery(scaled, DATA).total.value == pytest.approx(surgery(pair, DATA).total.value, abs=1e-6)


# ---------------------------------------------------------------------- two levels


class Ladder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(2, 3)
        self.out = nn.Linear(3, 64)
        self.enc1 = nn.Linear(64, 6)
        self.enc2 = nn.Linear(3, 4)

    def model(self, x):
        pyro.module("ladder", self)
        with pyro.plate("batch", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.top(z2), 1.0).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=self.out(z1)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("ladder", self)
        with pyro.plate("batch", len(x)):
            loc, raw = self.enc1(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, raw.exp()).to_event(1))
            loc, raw = self.enc2(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, raw.exp()).to_event(1))


def test_two_levels_inferred_from_the_bottom_up():
    ladder, x = Ladder(), images().reshape(-1, 64)[:200]
    svi = SVI(ladder.model, ladder.guide, Adam({"lr": 0.01}), loss=Trace_ELBO())
    for _ in range(30):
        svi.step(x)
    pair = Pair(model=ladder.model, guide=ladder.guide)
    assert pair.check(x) == []
    found = surgery(pair, x, samples=3)
    loss = np.mean([svi.evaluate_loss(x) for _ in range(30)]) / len(x)
    assert found.elbo.value == pytest.approx(-loss, abs=6 * found.elbo.standard_error)
    assert found.latents["z1"].mutual_information is not None
    assert found.latents["z2"].mutual_information is None
    assert found.latents["z1"].kl_exact is None  # its prior reads what the guide inferred from it
    assert 0 < found.mutual_information.value < math.log(200)
    assert "joint I_q over 2 levels: 200 of 200 draws, each under all 200 components" in found.notes
    pyro.clear_param_store()
