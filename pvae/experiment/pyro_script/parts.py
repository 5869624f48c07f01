"""Priors, posteriors and likelihoods that torch and Pyro have, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvae.distributions.bijections import near_identity
from pvae.experiment.pyro_script.expressions import named
from pvae.graph.site import Site
from pvae.nn.dense import MLP

if TYPE_CHECKING:
    from pvae.experiment.pyro_script.plain import PlainScript

Expression = tuple[list[str], str]
"""Statements, and an expression after them."""


class NotPlainError(Exception):
    """A part cannot be written out, and cannot be built without the other side of the pair."""


@dataclass(frozen=True)
class Part:
    """Prior or posterior of a latent, for a script.

    Arguments:
        script: the script in the making.
        name: of the part in the script.
        site: the latent.
        declared: the part as it is declared.
        module: the part as pvae builds it.
        inputs: expressions that it reads, by name.
    """

    script: PlainScript
    name: str
    site: Site
    declared: Any
    module: Any
    inputs: Mapping[str, str]

    def network(self) -> str:
        """Return the call of the part's own network on its inputs."""
        built = self.module.network
        return self.script.network(self.name, self.declared.network or MLP(hidden=()), built, self.inputs, built.output)

    def parameters(self, **made: str) -> None:
        """Add learned tensors, each by the expression that makes it."""
        self.script.parts[self.name] = f"nn.ParameterDict({named(made)})"

    def relaxed(self, logits: str) -> str:
        """Return Pyro's relaxed one-hot of some logits."""
        event = f".to_event({len(self.site.space.grid)})" if self.site.space.grid else ""
        return f"dist.RelaxedOneHotCategorical({self.script.temperature(self.site.name)}, logits={logits}){event}"


# ---------------------------------------------------------------------- priors and posteriors


def standard_normal(part: Part) -> Expression:
    """Return N(0, I)."""
    return [], f"dist.Normal(torch.zeros({part.site.event[0]}), 1.0).to_event(1)"


def normal(part: Part) -> Expression:
    """Return a normal whose network gives location and log-variance."""
    low, high = part.module.bounds
    scale = f"(log_variance.clamp({low:g}, {high:g}) / 2).exp()"
    return [f"loc, log_variance = {part.network()}.chunk(2, -1)"], f"dist.Normal(loc, {scale}).to_event(1)"


def point(part: Part) -> Expression:
    """Return the point of an autoencoder."""
    return [], f"dist.Delta({part.network()}, event_dim=1)"


def weights_of_codes(part: Part) -> Expression:
    """Return the categorical of a code, or its relaxation, with learned or equal weights."""
    logits = f"torch.zeros({', '.join(map(str, part.module.logits.shape))})"
    if part.declared.kind == "categorical":
        part.parameters(logits=logits)
        logits = f'{part.name}["logits"]'
    if part.site.space.values == "relaxed":
        return [], part.relaxed(logits)
    if part.site.space.grid:
        raise NotPlainError
    return [], f"dist.Categorical(logits={logits})"


def inferred_codes(part: Part) -> Expression:
    """Return the categorical of a code, or its relaxation, given x; networks have the codes before the grid."""
    if part.site.space.values == "relaxed" and part.declared.kl == "relaxed":
        grid = len(part.site.space.grid)
        return [], part.relaxed(part.network() + (f".movedim({-1 - grid}, -1)" if grid else ""))
    if part.site.space.values == "relaxed" or part.site.space.grid:
        raise NotPlainError
    return [], f"dist.Categorical(logits={part.network()})"


def mixture(part: Part) -> Expression:
    """Return a mixture of learned normals."""
    (count, dim), (low, high), name = part.module.loc.shape, part.declared.log_variance, part.name
    zeros = f"torch.zeros({count}, {dim})"
    part.parameters(loc=f"torch.randn({count}, {dim})", log_variance=zeros, logits=f"torch.zeros({count})")
    scale = f'({name}["log_variance"].clamp({low:g}, {high:g}) / 2).exp()'
    lines = [f'components = dist.Normal({name}["loc"], {scale}).to_event(1)']
    return lines, f'dist.MixtureSameFamily(dist.Categorical(logits={name}["logits"]), components)'


def vamp(part: Part) -> Expression:
    """Return the mixture of the guide's posteriors at pseudo-inputs."""
    shape = part.module.pseudo_inputs.shape
    part.parameters(pseudo_inputs=f"torch.rand({', '.join(map(str, shape))})")
    read = f'{part.name}["pseudo_inputs"]' + (".clamp(0, 1)" if part.module.bounded else "")
    lines, components = part.script.posterior(part.site, read)
    if not components.startswith("dist.Normal"):
        raise NotPlainError
    weights = f"dist.Categorical(logits=torch.zeros({shape[0]}))"
    return [*lines, f"components = {components}"], f"dist.MixtureSameFamily({weights}, components)"


def flow(part: Part) -> Expression:
    """Return N(0, I) pushed through Pyro's own transforms, coordinates reversed between them."""
    declared, dim = part.declared, part.site.event[0]
    sizes = f"{dim}, {list(declared.hidden)}"
    step = f"affine_autoregressive({sizes})"
    if declared.kind == "realnvp":
        step = f"affine_coupling({sizes})"
    elif declared.kind == "spline_coupling":
        sizes = f"{dim}, {dim // 2}, {list(declared.hidden)}"
        step = f"spline_coupling({sizes}, count_bins={declared.bins}, bound={declared.bound:g})"
    init = part.script.imported(near_identity)
    part.script.parts[part.name] = f"nn.ModuleList({init}(T.{step}) for _ in range({declared.layers}))"
    lines = [
        f"flip = T.Permute(torch.arange({dim}).flip(0))",
        f"steps = [move for step in {part.name} for move in (step{'.inv' if declared.inward else ''}, flip)]",
    ]
    return lines, f"dist.TransformedDistribution(dist.Normal(torch.zeros({dim}), 1.0).to_event(1), steps)"


Rules = dict[tuple[str, str], Callable[[Part], Expression]]
PRIORS: Rules = {
    ("standard_normal", "real"): standard_normal,
    ("conditional_normal", "real"): normal,
    ("mixture", "real"): mixture,
    ("vamp", "real"): vamp,
    ("categorical", "index"): weights_of_codes,
    ("categorical", "relaxed"): weights_of_codes,
    ("uniform", "index"): weights_of_codes,
    ("uniform", "relaxed"): weights_of_codes,
    **{(kind, "real"): flow for kind in ("realnvp", "spline_coupling", "maf", "iaf")},
}
"""Priors that are written out, by kind and values of the latent; any other is built by name."""
POSTERIORS: Rules = {
    ("normal", "real"): normal,
    ("delta", "real"): point,
    ("categorical", "index"): inferred_codes,
    ("relaxed_onehot", "relaxed"): inferred_codes,
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
