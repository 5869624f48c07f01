"""The prior that is a VAE over the latent: its bound against closed forms and sums, and who is told of it."""

# mypy: disable-error-code="arg-type, attr-defined, operator, union-attr"

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.analysis import ais, evidence, surgery
from pvae.data.dataset import Dataset
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from tests.laws import require_gradients, require_own_states, shake

SMALL = {"network": {"kind": "mlp", "hidden": [8]}}
LATENTS: dict[str, dict[str, Any]] = {
    "real": {"dim": 2},
    "grid": {"codes": 3, "grid": [2, 2], "posterior": {"kind": "categorical"}},
    "code": {"codes": 4},
    "bits": {"bits": 3},
    "nearest": {"codes": 3, "grid": [2, 2], "embedding": 2, "posterior": {"kind": "nearest_code"}},
}
every_latent = pytest.mark.parametrize("latent", LATENTS)


def rows(n: int = 40) -> Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def declared(latent: str, **prior: Any) -> Pair:
    own = {"kind": "vae", "dim": 2, "encoder": SMALL["network"], **SMALL, **prior}
    decoder = {**SMALL, "likelihood": {"kind": "bernoulli"}}
    table = {"latents": {"z": {**LATENTS[latent], "prior": own}}, "encoder": SMALL, "decoder": decoder}
    return Experiment.from_dict(table).build((6,))


@every_latent
def test_its_weights_are_unbiased_and_what_is_sampled_is_what_is_scored(latent):
    pair = declared(latent, samples=1000 if latent == "real" else 10_000)
    shake(pair.model.priors["z"].eval().decoder, by=0.5)  # q(u | z) stays wide, so that weights are even
    p = pair.model.priors["z"]({})
    torch.manual_seed(0)
    with torch.no_grad():
        draws = p.expand((20_000,)).sample()
        if latent == "real":
            axis = torch.linspace(-12, 12, 49)
            log_p = p.log_prob(torch.cartesian_prod(axis, axis)).reshape(49, 49).double()
            total = log_p.exp().sum() * 0.5**2
            centre = (log_p.exp().sum(1) * axis).sum() * 0.5**2
            error = float(draws[:, 0].std()) / 20_000**0.5
            assert float(draws[:, 0].double().mean()) == pytest.approx(float(centre), abs=4 * error + 0.02)
        else:
            states = p.enumerate_support(expand=False)
            share = p.log_prob(states).double().exp()
            same = draws.reshape(20_000, 1, -1) == states.reshape(1, len(states), -1)
            found = same.all(-1).double().mean(0)
            total = share.sum()
            assert float((found - share).abs().max()) < 0.02
    assert float(total) == pytest.approx(1, abs=0.04)


def test_the_bound_of_a_linear_gaussian_reaches_its_density():
    """With linear maps p(z) = N(b, W W^T + diag), which the bound reaches from below as samples grow."""
    pair = declared("real", network={"kind": "mlp", "hidden": []}, encoder={"kind": "mlp", "hidden": []})
    module = pair.model.priors["z"]
    linear = module.decoder
    with torch.no_grad():
        weight, bias = dict(linear.named_parameters()).values()
        weight[2:] = 0.0
        for parameter in module.encoder.parameters():
            parameter.zero_()  # q(u | z) = N(0, I)
        cov = (weight[:2] @ weight[:2].T + bias[2:].exp().diag()).double()
        z = torch.randn(50, 2)
        want = torch.distributions.MultivariateNormal(bias[:2].double(), cov).log_prob(z.double())
        found = []
        for count in (1, 10, 4000):
            module.samples = count
            module.eval()
            torch.manual_seed(0)
            found.append(torch.stack([module({}).log_prob(z).double() for _ in range(20)]).mean(0))
    one, ten, many = found
    torch.testing.assert_close(many, want, atol=0.02, rtol=0)
    assert float(one.mean()) < float(ten.mean()) < float(want.mean()) + 0.02


@every_latent
def test_gradients_particles_and_states(latent):
    pair = declared(latent)
    if latent != "code":  # that is summed out: an exact posterior has no parameters
        assert pair.terms(rows(5), particles=3).kl["z"].shape == (3, 5)
    pair(rows()).mean().neg().backward()
    require_gradients(pair.model.priors["z"])
    require_own_states(pair, declared(latent), rows(), by=0.1)


@every_latent
def test_figures_say_that_they_are_bounds(latent):
    pair = declared(latent)
    found = surgery(pair, rows(), samples=2)
    assert found.kl.kind == "upper_bound"
    assert any("lower bound on log p(z)" in note for note in found.notes)
    assert found.population is None
    assert any("scored by a bound" in note for note in found.notes)
    assert found.latents["z"].kl_exact is None
    assert evidence(pair, rows(5), samples=10).exact is None


def test_annealing_asks_for_a_density():
    with pytest.raises(DataError, match=r"expected a prior with a density; got one that scores a bound, of z"):
        ais(declared("real"), rows(3))


@pytest.mark.parametrize("latent", ["real", "nearest"])
def test_a_refit_by_it_wins_nats(latent, tmp_path):
    usual = copy.deepcopy(LATENTS[latent])
    table = {
        "name": "first",
        "latents": {"z": usual},
        "encoder": SMALL,
        "decoder": {**SMALL, "likelihood": {"kind": "bernoulli"}},
        "train": {"epochs": 3, "batch_size": 50},
        "refit": {"priors": {"z": {"kind": "vae", "dim": 2}}, "train": {"epochs": 30, "batch_size": 50}},
    }
    x = rows(2).repeat(200, 1)  # two patterns: a prior that knows their codes wins nearly all of their nats
    run = pvae.fit(Experiment.from_dict(table), data=Dataset.of(x), run_dir=tmp_path, progress=False)
    assert run.experiment.latents["z"].prior.kind == "vae"
    with torch.no_grad():
        p = run.pair.model.priors["z"]({})
        z = run.pair.guide_trace(x[:50]).nodes["z"]["value"]
        assert float(p.log_prob(z).mean()) > {"real": -3.2, "nearest": -1.0}[latent]
