"""Priors, posteriors and likelihoods that torch and Pyro have, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pvae.graph.site import Site
from pvae.nn.dense import MLP

if TYPE_CHECKING:
    from pvae.experiment.pyro_script.plain import PlainScript

Expression = tuple[list[str], str]
"""Statements, and an expression after them."""


class NotPlainError(Exception):
    """A part cannot be written out, and cannot be built without the other side of the pair."""


# ---------------------------------------------------------------------- distributions


def normal(parameters: str, bounds: tuple[float, float]) -> Expression:
    """Return a diagonal normal of parameters `(..., 2 dim)`."""
    low, high = bounds
    scale = f"(log_variance.clamp({low:g}, {high:g}) / 2).exp()"
    return [f"loc, log_variance = {parameters}.chunk(2, -1)"], f"dist.Normal(loc, {scale}).to_event(1)"


def standard_normal(_script: PlainScript, _name: str, site: Site, _declared: Any, _module: Any) -> Expression:
    """Return N(0, I)."""
    return [], f"dist.Normal(torch.zeros({site.event[0]}), 1.0).to_event(1)"


def conditional_normal(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return N(mu(parents), diag sigma^2(parents))."""
    given = {above: script.seen(above) for above in site.given}
    return normal(script.network(name, declared.network, module.network, given, module.network.output), module.bounds)


def codes(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return the categorical of a code, or its relaxation, with learned or equal weights."""
    logits = f"torch.zeros{tuple(module.logits.shape)}".replace(",)", ")")
    if declared.kind == "categorical":
        script.parts[name], logits = f'nn.ParameterDict({{"logits": {logits}}})', f'{name}["logits"]'
    if site.space.values == "relaxed":
        return [], relaxed(script, site, logits)
    if site.space.grid:
        raise NotPlainError
    return [], f"dist.Categorical(logits={logits})"


def relaxed(script: PlainScript, site: Site, logits: str) -> str:
    """Return Pyro's relaxed one-hot of some logits."""
    event = f".to_event({len(site.space.grid)})" if site.space.grid else ""
    return f"dist.RelaxedOneHotCategorical({script.temperature(site.name)}, logits={logits}){event}"


def mixture(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return a mixture of learned normals."""
    (count, dim), (low, high) = module.loc.shape, declared.log_variance
    zeros = f'"log_variance": torch.zeros({count}, {dim}), "logits": torch.zeros({count})'
    script.parts[name] = f'nn.ParameterDict({{"loc": torch.randn({count}, {dim}), {zeros}}})'
    scale = f'({name}["log_variance"].clamp({low:g}, {high:g}) / 2).exp()'
    lines = [f'components = dist.Normal({name}["loc"], {scale}).to_event(1)']
    return lines, f'dist.MixtureSameFamily(dist.Categorical(logits={name}["logits"]), components)'


def vamp(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return the mixture of the guide's posteriors at pseudo-inputs."""
    shape = ", ".join(map(str, module.pseudo_inputs.shape))
    script.parts[name] = f'nn.ParameterDict({{"pseudo_inputs": torch.rand({shape})}})'
    read = f'{name}["pseudo_inputs"]' + (".clamp(0, 1)" if module.bounded else "")
    lines, components = script.posterior(site, read)
    if not components.startswith("dist.Normal"):
        raise NotPlainError
    weights = f"dist.Categorical(logits=torch.zeros({len(module.pseudo_inputs)}))"
    return [*lines, f"components = {components}"], f"dist.MixtureSameFamily({weights}, components)"


def flow(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return N(0, I) pushed through Pyro's own transforms."""
    (dim,), hidden = site.event, list(declared.hidden)
    step = {
        "realnvp": f"affine_coupling({dim}, {hidden})",
        "spline_coupling": f"spline_coupling({dim}, {dim // 2}, {hidden}, {{}})",
    }.get(declared.kind, f"affine_autoregressive({dim}, {hidden})")
    if declared.kind == "spline_coupling":
        step = step.format(f"count_bins={declared.bins}, bound={declared.bound:g}")
    script.imports.setdefault("pvae.distributions.bijections", set()).add("near_identity")
    script.parts[name] = f"nn.ModuleList(near_identity(T.{step}) for _ in range({declared.layers}))"
    lines = [
        f"flip = T.Permute(torch.arange({dim}).flip(0))",
        f"steps = [move for step in {name} for move in (step{'.inv' if declared.inward else ''}, flip)]",
    ]
    return lines, f"dist.TransformedDistribution(dist.Normal(torch.zeros({dim}), 1.0).to_event(1), steps)"


def normal_posterior(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return N(mu(x), diag sigma^2(x))."""
    network = module.network
    return normal(script.network(name, declared.network or LINEAR, network, inputs, network.output), module.bounds)


def point(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return the point of an autoencoder."""
    network = module.network
    call = script.network(name, declared.network or LINEAR, network, inputs, network.output)
    return [], f"dist.Delta({call}, event_dim={len(site.event)})"


def categorical(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return the categorical of a code, or its relaxation; a grid of codes has its values in the last dimension."""
    network = module.network
    if site.space.values == "index" and site.space.grid or getattr(declared, "kl", "relaxed") != "relaxed":
        raise NotPlainError
    logits = script.network(name, declared.network or LINEAR, network, inputs, network.output)
    if site.space.grid:
        logits = f"{logits}.movedim({-1 - len(site.space.grid)}, -1)"
    return [], relaxed(script, site, logits) if site.space.values == "relaxed" else f"dist.Categorical(logits={logits})"


LINEAR = MLP(hidden=())
PRIORS: dict[tuple[str, str], Callable[[PlainScript, str, Site, Any, Any], Expression]] = {
    ("standard_normal", "real"): standard_normal,
    ("conditional_normal", "real"): conditional_normal,
    ("mixture", "real"): mixture,
    ("vamp", "real"): vamp,
    ("categorical", "index"): codes,
    ("categorical", "relaxed"): codes,
    ("uniform", "index"): codes,
    ("uniform", "relaxed"): codes,
    ("realnvp", "real"): flow,
    ("spline_coupling", "real"): flow,
    ("maf", "real"): flow,
    ("iaf", "real"): flow,
}
"""Priors that are written out, by kind and values of the latent; any other is built by name."""
POSTERIORS: dict[tuple[str, str], Callable[[PlainScript, str, Site, Any, Any, Mapping[str, str]], Expression]] = {
    ("normal", "real"): normal_posterior,
    ("delta", "real"): point,
    ("categorical", "index"): categorical,
    ("relaxed_onehot", "relaxed"): categorical,
}
"""Posteriors that are written out, likewise."""


# ---------------------------------------------------------------------- likelihoods


def normal_likelihood(script: PlainScript, declared: Any, h: str) -> str:
    """Return independent normal elements of one scale."""
    if declared.scale == "fixed":
        return f"dist.Normal({h}, {declared.value:g})"
    script.parts["likelihood"] = f'nn.ParameterDict({{"log_scale": torch.tensor({declared.value:g}).log()}})'
    return f'dist.Normal({h}, likelihood["log_scale"].exp().clamp(min={declared.floor:g}))'


LIKELIHOODS: dict[tuple[str, str], Callable[[PlainScript, Any, str], str]] = {
    ("bernoulli", ""): lambda _script, _declared, h: f"dist.Bernoulli(logits={h})",
    ("normal", "fixed"): normal_likelihood,
    ("normal", "shared"): normal_likelihood,
}
"""Likelihoods that are written out, by kind and scale, before their event dimensions are declared."""
