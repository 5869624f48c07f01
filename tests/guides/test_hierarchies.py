"""Ladders and shared ways down: merges against grids, KLs that vanish, Pyro's ELBO, features level by level."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, operator, union-attr"

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pvae
from pvae.analysis import surgery
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.guides.posteriors.base import TOP_DOWN
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.pair.pair import Pair
from tests.laws import (
    require_bounds,
    require_importance_weights,
    require_own_states,
    require_pyros,
    require_slope,
    require_trainable,
    shake,
)
from tests.runs_shared import assert_resumes_exactly

TANH = {"network": {"kind": "mlp", "hidden": [8], "activation": "tanh"}}
CONDITIONAL = {"kind": "conditional_normal", **TANH}
ENCODER = {
    "kind": "bottom_up",
    "network": {"kind": "mlp", "hidden": [20, 11], "activation": "tanh"},
    "levels": {"kind": "mlp", "hidden": [7], "activation": "tanh"},
}
ONE = torch.ones(())

every_kind = pytest.mark.parametrize("kind", ["ladder", "bidirectional"])
every_encoder = pytest.mark.parametrize("encoder", ["shared", "per_latent", "bottom_up"])


def table(kind: str, **changes: Any) -> dict[str, Any]:
    """Three levels, declared from the bottom up; z1 reads both above it."""
    latents = {
        "z1": {"dim": 4, "given": ["z2", "z3"], "prior": CONDITIONAL, "posterior": {"kind": kind}},
        "z2": {"dim": 3, "given": ["z3"], "prior": CONDITIONAL, "posterior": {"kind": kind}},
        "z3": {"dim": 2, "posterior": {"kind": kind}},
    }
    decoder = {**TANH, "given": ["z1"], "likelihood": {"kind": "bernoulli"}}
    return {"latents": latents, "encoder": ENCODER, "decoder": decoder, **changes}


def hierarchy(kind: str, **changes: Any) -> Pair:
    pair = Experiment.from_dict(table(kind, **changes)).build((6,))
    torch.manual_seed(2)
    shake(pair, 0.2)
    return pair


def rows(n: int = 9) -> Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def guide_sites(pair: Pair, x: Tensor) -> dict[str, Any]:
    trace = pair.guide_trace(x)
    return {name: trace.nodes[name] for name in pair.layout.latents}


def normal_of(node: dict[str, Any]) -> tuple[Tensor, Tensor]:
    base = node["fn"].base_dist
    return base.loc.detach(), base.scale.detach()


# ---------------------------------------------------------------------- the ladder


def test_a_ladder_s_level_is_the_product_of_two_normals():
    # The product of what x says and what the model says, normalised on a grid.
    pair, x = hierarchy("ladder").double(), rows(4).double()
    sites, features = guide_sites(pair, x), pair.guide.encoder(x)
    seen = {name: node["value"].detach() for name, node in sites.items()}
    axis = np.linspace(-30, 30, 60_001)
    for name in ("z2", "z1"):
        mu, log_variance = pair.guide.posteriors[name].head.network({"features": features[name]}).detach().chunk(2, -1)
        prior_mu, prior_log_variance = pair.model.priors[name].network(seen).detach().chunk(2, -1)
        loc, scale = normal_of(sites[name])
        for i in np.ndindex(*loc.shape):
            log_density = scipy.stats.norm.logpdf(axis, float(mu[i]), math.exp(0.5 * float(log_variance[i])))
            log_density += scipy.stats.norm.logpdf(
                axis, float(prior_mu[i]), math.exp(0.5 * float(prior_log_variance[i]))
            )
            weight = np.exp(log_density - log_density.max())
            weight /= weight.sum()
            mean = weight @ axis
            assert float(loc[i]) == pytest.approx(mean, abs=1e-6)
            assert float(scale[i]) == pytest.approx(math.sqrt(weight @ (axis - mean) ** 2), rel=1e-6)
        assert (scale < (0.5 * log_variance).exp()).all()


def test_the_top_of_a_ladder_says_what_x_says():
    pair, x = hierarchy("ladder"), rows(4)
    features = pair.guide.encoder(x)["z3"]
    mu, log_variance = pair.guide.posteriors["z3"].head.network({"features": features}).detach().chunk(2, -1)
    loc, scale = normal_of(guide_sites(pair, x)["z3"])
    torch.testing.assert_close(loc, mu)
    torch.testing.assert_close(scale, (0.5 * log_variance).exp())


def test_a_level_that_x_says_nothing_of_is_the_prior():
    # As wide as log_variance allows, x weighs e^-6 of a prior of unit scale: what is left of the KL is of order 1e-5.
    pair, x = hierarchy("ladder"), rows(4)
    with torch.no_grad():
        for name in ("z1", "z2"):
            pair.guide.posteriors[name].head.network.head.weight.zero_()
            bias = pair.guide.posteriors[name].head.network.head.bias
            bias.zero_()[len(bias) // 2 :] = 40.0  # clipped to 6
            prior = pair.model.priors[name].network.head
            prior.bias[len(prior.bias) // 2 :] -= 3.0
    for name in ("z1", "z2"):
        assert float(pair.terms(x, closed_form=True).kl[name].detach().max()) < 1e-3


@pytest.mark.parametrize("prior", ["mixture", "vamp", "spline_coupling"])
def test_the_top_of_a_ladder_takes_any_prior(prior):
    # Nothing is asked of a prior without parents.
    latents = {"z2": {"dim": 2, "prior": {"kind": prior}, "posterior": {"kind": "ladder"}}}
    latents["z1"] = {"dim": 3, "given": ["z2"], "prior": CONDITIONAL, "posterior": {"kind": "ladder"}}
    pair = hierarchy("ladder", latents=latents)
    assert pair.check(rows()) == []


# ---------------------------------------------------------------------- the shared way down


def silence(pair: Pair) -> None:
    """Let x say nothing: the last layers of the posteriors give zero."""
    with torch.no_grad():
        for posterior in pair.guide.posteriors.values():
            posterior.network.head.weight.zero_()
            posterior.network.head.bias.zero_()


def test_silent_networks_leave_the_prior():
    pair, x = hierarchy("bidirectional"), rows()
    assert all(float(kl.detach().abs().min()) > 0 for kl in pair.terms(x, closed_form=True).kl.values())
    silence(pair)
    for terms in (pair.terms(x), pair.terms(x, particles=5), pair.terms(x, closed_form=True)):
        assert set(terms.kl) == {"z1", "z2", "z3"}
        for kl in terms.kl.values():
            assert float(kl.detach().abs().max()) == 0


def test_a_level_is_the_prior_moved_and_stretched():
    pair, x = hierarchy("bidirectional"), rows(4)
    sites, features = guide_sites(pair, x), pair.guide.encoder(x)
    seen = {name: node["value"].detach() for name, node in sites.items()}
    for name in ("z3", "z2", "z1"):
        inputs, mu, sigma = {"features": features[name]}, torch.zeros(2), torch.ones(2)
        if name != "z3":
            prior = pair.model.priors[name].network
            inputs[TOP_DOWN] = prior.trunk(
                torch.cat([branch(seen[n]) for n, branch in zip(prior.inputs, prior.branches, strict=True)], -1)
            )
            mu, log_variance = prior.head(inputs[TOP_DOWN]).chunk(2, -1)
            sigma = (0.5 * log_variance).exp()
        d, log_e = pair.guide.posteriors[name].network(inputs).chunk(2, -1)
        loc, scale = normal_of(sites[name])
        torch.testing.assert_close(loc, (mu + sigma * d).detach())
        torch.testing.assert_close(scale, (sigma * log_e.exp()).detach())


@pytest.mark.parametrize("sign", [-1, 1])
def test_how_far_a_level_may_be_stretched(sign):
    latents = {"z": {"dim": 2, "posterior": {"kind": "bidirectional", "bound": 1.5}}}
    pair = hierarchy("bidirectional", latents=latents, decoder=TANH)
    silence(pair)
    with torch.no_grad():
        pair.guide.posteriors["z"].network.head.bias[2:] = sign * 50.0
    scale = normal_of(guide_sites(pair, rows())["z"])[1]
    torch.testing.assert_close(scale, torch.full((9, 2), math.exp(sign * 1.5)))


# ---------------------------------------------------------------------- parameters


@every_kind
@every_encoder
def test_gradient_reaches_every_parameter(kind, encoder):
    require_trainable(hierarchy(kind, encoder={"kind": encoder, **TANH}), rows(20))


@every_kind
def test_what_is_shared_is_registered_once(kind):
    pair = hierarchy(kind)
    every = [name for name, _ in pair.named_parameters(remove_duplicate=False)]
    assert not any("link" in name for name in pair.state_dict())
    storages = [value.data_ptr() for value in pair.state_dict().values()]
    assert len(storages) == len(set(storages))
    assert {name.split(".")[2] for name in every if name.startswith("model.priors")} == {"z1", "z2"}
    shared = {id(p) for p in pair.model.parameters()} & {id(p) for p in pair.guide.parameters()}
    assert shared == set()


@every_kind
def test_a_copy_reads_its_own_way_down(kind):
    pair, x = hierarchy(kind), rows(20)
    require_own_states(pair, hierarchy(kind), x)
    found = []
    for by in (0.0, 0.5):
        shake(pair.model.priors, by)
        torch.manual_seed(0)
        found.append({name: normal_of(node)[0] for name, node in guide_sites(pair, x).items()})
    at, moved = found
    assert not torch.equal(at["z2"], moved["z2"])  # the guide follows the model's prior
    assert torch.equal(at["z3"], moved["z3"])


# ---------------------------------------------------------------------- objectives


@every_kind
def test_the_gradient_is_the_slope_through_every_shared_part(kind):
    require_slope(hierarchy(kind).double(), rows().double())


LOSSES = {
    "one draw": (TraceELBO(), Trace_ELBO()),
    "particles": (TraceELBO(particles=4), Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True)),
    "closed form": (TraceMeanFieldELBO(), TraceMeanField_ELBO()),
}


@every_kind
@pytest.mark.parametrize("case", LOSSES)
def test_the_elbo_is_pyros_in_value_and_gradient(kind, case):
    require_pyros(hierarchy(kind), rows(), *LOSSES[case])


@every_kind
def test_closed_forms_are_the_mean_of_their_estimates(kind):
    # 4 standard errors for each of three levels; the seed is fixed.
    pair, x = hierarchy(kind), rows()
    with torch.no_grad():
        torch.manual_seed(0)
        many = pair.terms(x, particles=2000)
        torch.manual_seed(0)
        closed = pair.terms(x, particles=2000, closed_form=True)
    for name, kl in many.kl.items():
        gap = kl.mean(1) - closed.kl[name].expand(2000, -1).mean(1)
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / 2000**0.5
        assert float(closed.kl[name].min()) >= 0


@every_kind
def test_mean_field_takes_a_way_down_and_no_way_up(kind):
    Experiment.from_dict(table(kind, objective="trace_mean_field_elbo"))
    latents = {
        "z1": {"dim": 4, "given": ["z2"], "prior": CONDITIONAL},
        "z2": {"dim": 3, "posterior": {"kind": kind, "given": ["x", "z1"]}},
    }
    with pytest.raises(DeclarationError, match="objective.kind: expected trace_elbo: the guide infers z2 from z1"):
        Experiment.from_dict(table(kind, latents=latents, objective="trace_mean_field_elbo"))


@every_kind
def test_particles_and_importance_weights(kind):
    pair, x = hierarchy(kind), rows()
    assert {name: kl.shape for name, kl in pair.terms(x, particles=4).kl.items()} == dict.fromkeys(
        ("z3", "z2", "z1"), (4, 9)
    )
    require_importance_weights(pair, x)


# ---------------------------------------------------------------------- the encoder, level by level


def test_features_rise_from_x_to_the_top():
    pair, x = hierarchy("ladder"), rows()
    encoder = pair.guide.encoder
    assert list(encoder.networks) == ["z1", "z2", "z3"]
    assert {name: shapes["features"] for name, shapes in encoder.shapes.items()} == {
        "z1": (11,),
        "z2": (7,),
        "z3": (7,),
    }
    assert [site.name for site in pair.guide.sites] == ["z3", "z2", "z1"]
    features = encoder(x)
    h = x
    for name in ("z1", "z2", "z3"):
        network = encoder.networks[name]
        h = network.trunk(network.branches[0](h))
        torch.testing.assert_close(features[name], h)
    (reach,) = torch.autograd.grad(features["z3"].sum(), [encoder.networks["z1"].branches[0][0].weight])
    assert float(reach.abs().max()) > 0


@every_kind
def test_parents_of_the_model_are_given_to_the_guide(kind):
    experiment = Experiment.from_dict(table(kind))
    given = {site.name: site.guide_given for site in experiment.guide_sites()}
    assert given == {"z3": ("x",), "z2": ("x", "z3"), "z1": ("x", "z2", "z3")}
    assert experiment.latents["z1"].posterior.given == ("x",)
    assert Experiment.from_toml(experiment.to_toml()) == experiment
    latents = table(kind)["latents"]
    latents["z1"]["posterior"] = {"kind": kind, "given": ["z3", "x"]}  # its own list comes first, nothing twice
    sites = Experiment.from_dict(table(kind, latents=latents)).guide_sites()
    assert sites[-1].guide_given == ("z3", "x", "z2")
    # a density of its own asks for no parents
    latents["z1"]["posterior"] = {"kind": "normal"}
    assert Experiment.from_dict(table(kind, latents=latents)).guide_sites()[-1].guide_given == ("x",)


@every_kind
def test_a_level_follows_the_draw_above_it(kind):
    pair, x = hierarchy(kind), rows()
    at = {name: torch.zeros(9, dim) for name, dim in (("z3", 2), ("z2", 3), ("z1", 4))}
    found = []
    for top in (0.0, 1.0):
        with poutine.condition(data={**at, "z3": at["z3"] + top}):
            found.append({name: normal_of(node)[0] for name, node in guide_sites(pair, x).items()})
    for name, moves in (("z3", False), ("z2", True), ("z1", True)):
        assert bool(((found[0][name] - found[1][name]).abs() > 1e-6).any()) is moves


def test_a_posterior_that_is_not_given_x_has_no_level():
    latents = {
        "z1": {"dim": 4},
        "z2": {"dim": 3, "posterior": {"kind": "normal", "given": ["z1"]}},
        "z3": {"dim": 2, "posterior": {"kind": "normal", "given": ["z1", "x"]}},
    }
    decoder = {**TANH, "given": ["z1", "z2", "z3"]}
    pair, x = hierarchy("ladder", latents=latents, decoder=decoder), rows()
    assert set(pair.guide.encoder.networks) == {"z1", "z3"}
    assert pair.check(x) == []
    found = []
    for data in (x, 1 - x):
        with poutine.condition(data={"z1": torch.ones(9, 4)}):
            found.append({name: normal_of(node)[0] for name, node in guide_sites(pair, data).items()})
    assert torch.equal(found[0]["z2"], found[1]["z2"])
    assert not torch.equal(found[0]["z3"], found[1]["z3"])


@every_kind
def test_images(kind):
    conv = {"kind": "conv", "channels": [4, 6], "dense": 10, "activation": "tanh"}
    encoder = {**ENCODER, "network": conv}
    decoder = {"network": conv, "given": ["z1"], "likelihood": {"kind": "bernoulli"}}
    experiment = Experiment.from_dict(table(kind, encoder=encoder, decoder=decoder))
    pair, x = experiment.build((1, 8, 8)), (torch.rand(5, 1, 8, 8) > 0.5).float()
    assert pair.check(x) == []
    assert pair.guide.encoder.shapes["z1"]["features"] == (10,)
    assert pair.guide.encoder.shapes["z2"]["features"] == (7,)
    assert pair.terms(x, particles=3).kl["z2"].shape == (3, 5)
    assert pair.model(size=4).shape == (4, 1, 8, 8)
    assert set(surgery(pair, x).latents) == {"z1", "z2", "z3"}


def test_the_way_down_may_be_convolutional():
    # A prior that reads a vector has no image; its dense features serve all the same.
    conv = {"kind": "conv", "channels": [4], "dense": 12}
    table_of_one = {
        "latents": {"z": {"dim": 2, "posterior": {"kind": "bidirectional"}}},
        "encoder": {"network": conv},
        "decoder": {"network": conv},
    }
    pair = Experiment.from_dict(table_of_one).build((1, 8, 8))
    assert pair.check((torch.rand(5, 1, 8, 8) > 0.5).float()) == []


@every_kind
def test_a_label_among_the_parents(kind):
    latents = {"z": {"dim": 3, "given": ["y"], "prior": CONDITIONAL, "posterior": {"kind": kind}}}
    changed = table(kind, latents=latents, covariates={"y": {"codes": 3}}, decoder=TANH)
    pair = Experiment.from_dict(changed).build((6,))
    data = torch.cat([rows(9), torch.arange(9)[:, None] % 3], 1)
    assert pair.check(data) == []
    other = data.clone()
    other[:, 6] = (other[:, 6] + 1) % 3
    at, moved = (normal_of(guide_sites(pair, d)["z"])[0] for d in (data, other))
    assert ((at - moved).abs() > 1e-6).any(1).all()


# ---------------------------------------------------------------------- refused


def above(kind: str, prior: Any = CONDITIONAL, **posterior: Any) -> dict[str, Any]:
    latents: dict[str, Any] = {"z2": {"dim": 2, "posterior": {"kind": kind}}}
    latents["z1"] = {"dim": 3, "given": ["z2"], "prior": prior, "posterior": {"kind": kind, **posterior}}
    return {"latents": latents}


def below_a_code(kind: str) -> dict[str, Any]:
    latents: dict[str, Any] = {"c": {"codes": 3}}
    latents["z"] = {"dim": 3, "given": ["c"], "prior": CONDITIONAL, "posterior": {"kind": kind}}
    return {"latents": latents, "decoder": TANH}


LINEAR_TABLE = {"kind": "conditional_normal", "network": {"kind": "table"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{kind}, nothing but parents": (
            above(kind, given=["z2"]),
            r"latents.z1.posterior.given: expected 'x', or a latent that is no parent in the model; got z2 alone",
        )
        for kind in ("ladder", "bidirectional")
    },
    **{
        f"{kind}, a code above": (
            below_a_code(kind),
            r"latents.z.posterior: expected parents that the guide samples, .*; got c, summed out by the model",
        )
        for kind in ("ladder", "bidirectional")
    },
    **{
        f"a {prior} at the top": (
            {"latents": {"z": {"dim": 2, "prior": {"kind": prior}, "posterior": {"kind": "bidirectional"}}}},
            r"latents.z.prior: expected a diagonal normal, standard_normal or conditional_normal, .*; got \w+Module",
        )
        for prior in ("mixture", "vamp", "exemplar", "realnvp", "block_autoregressive")
    },
    "no features above": (
        above("bidirectional", LINEAR_TABLE),
        r"latents.z1.prior.network: expected a network with features, mlp, gated_mlp or conv, .*; got TableModule",
    ),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=list(REFUSED))
def test_refused_declarations(changes, match):
    decoder = {**TANH, "given": ["z1"] if "z1" in changes["latents"] else None}
    changed = table("ladder", **{"encoder": {"kind": "shared", **TANH}, "decoder": decoder, **changes})
    with pytest.raises(DeclarationError, match=match):
        Experiment.from_dict(changed).build((6,))


@every_kind
def test_a_guide_that_goes_round_in_a_circle(kind):
    latents = {
        "z2": {"dim": 2, "posterior": {"kind": kind, "given": ["x", "z1"]}},
        "z1": {"dim": 3, "given": ["z2"], "prior": CONDITIONAL, "posterior": {"kind": kind}},
    }
    with pytest.raises(DeclarationError, match="posteriors: expected an acyclic graph; got a cycle among z1, z2"):
        Experiment.from_dict(table(kind, latents=latents))


# ---------------------------------------------------------------------- analysis


def small(kind: str) -> Pair:
    """Two levels of one number each: sums over both fit on a grid."""
    latents = {
        "z2": {"dim": 1, "posterior": {"kind": kind}},
        "z1": {"dim": 1, "given": ["z2"], "prior": CONDITIONAL, "posterior": {"kind": kind}},
    }
    pair = hierarchy(kind, latents=latents)
    with torch.no_grad():
        pair.model.decoder.network.head.weight.mul_(3)
    return pair


def log_p_on_a_grid(pair: Pair, x: Tensor) -> Tensor:
    axis = torch.linspace(-9, 9, 451)
    z2, z1 = torch.cartesian_prod(axis, axis).split(1, 1)
    with torch.no_grad():
        log_p = pair.model.priors["z2"]({}).log_prob(z2) + pair.model.priors["z1"]({"z2": z2}).log_prob(z1)
        log_x = torch.stack([pair.model.decoder({"z1": z1}).log_prob(row) for row in x])
    return (log_p + log_x).double().logsumexp(1) + 2 * math.log(18 / 450)


@every_kind
def test_evidence_lies_above_the_elbo_and_reaches_the_grid(kind):
    pair, x = small(kind), rows(6)
    require_bounds(pair, x, float(log_p_on_a_grid(pair, x).mean()))


@every_kind
def test_surgery_level_by_level(kind):
    pair, x = hierarchy(kind), rows(40)
    found = surgery(pair, x, samples=3)
    assert list(found.latents) == ["z3", "z2", "z1"]
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-9)
    total = sum(latent.kl.value for latent in found.latents.values())
    assert found.kl.value == pytest.approx(total, abs=1e-9)
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value, abs=1e-9)
    top = found.latents["z3"]
    assert top.kl_exact.kind == "exact"
    loc, scale = (t.double().numpy() for t in normal_of(guide_sites(pair, x)["z3"]))
    want = 0.5 * (scale**2 + loc**2 - 1 - 2 * np.log(scale)).sum(1).mean()
    assert top.kl_exact.value == pytest.approx(want, rel=1e-5)


def tiny(kind: str, **train: Any) -> Experiment:
    settings = {"epochs": 3, "batch_size": 20, "engine": "eager", **train}
    return Experiment.from_dict(table(kind, train=settings))


def fit(experiment: Experiment, where: Path) -> pvae.Run:
    return pvae.fit(experiment, data=rows(120), run_dir=where, device="cpu", progress=False)


@every_kind
def test_metrics_tell_the_levels_apart(kind, tmp_path: Path):
    run = fit(tiny(kind), tmp_path)
    for split, group in run.metrics.groupby("split"):
        levels = group[["kl/z1", "kl/z2", "kl/z3"]]
        assert levels.notna().all(axis=None), split
        if split == "validation":
            np.testing.assert_allclose(group["reconstruction"] - levels.sum(axis=1), group["elbo"], rtol=1e-5)
    assert {"train", "validation"} <= set(run.metrics["split"])


def test_an_interrupted_fit_resumes_bit_for_bit(tmp_path: Path):
    assert_resumes_exactly(tiny("bidirectional", average=0.9), tmp_path, 8, data=rows(120))
