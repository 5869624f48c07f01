"""Python expressions of the networks, priors and posteriors that torch and Pyro provide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pvae.distributions.bijections import near_identity
from pvae.experiment.pyro_script.page import named
from pvae.graph.site import Site
from pvae.nn.conv import ConvModule
from pvae.nn.network import MLP, Dense, Gated, NetworkModule

if TYPE_CHECKING:
    from pvae.experiment.pyro_script.programs import PlainScript

Expression = tuple[list[str], str]
"""Statements that a script runs first, and the expression of a distribution that uses them."""


class NotPlainError(Exception):
    """A component can neither be written in plain Pyro nor be built apart from the other components of the pair."""


@dataclass(frozen=True)
class Part:
    """Prior or posterior of a latent that a script writes out.

    Arguments:
        script: generator of the script.
        name: variable of the prior or posterior in the script.
        site: the latent.
        declared: declaration of the prior or posterior.
        module: the module that pvae builds from the declaration.
        inputs: expressions of the inputs of its network, by name.
    """

    script: PlainScript
    name: str
    site: Site
    declared: Any
    module: Any
    inputs: Mapping[str, str]

    def network(self) -> str:
        """Return the expression that applies the network of the prior or posterior to its inputs."""
        built = self.module.network
        return self.script.network(self.name, self.declared.network or MLP(hidden=()), built, self.inputs, built.output)

    def parameters(self, **made: str) -> None:
        """Add a dictionary of learned tensors to the script, each given by the expression of its first value."""
        self.script.parts[self.name] = f"nn.ParameterDict({named(made)})"

    def relaxed(self, logits: str) -> str:
        """Return the expression of Pyro's `RelaxedOneHotCategorical` with the given logits."""
        event = f".to_event({len(self.site.space.grid)})" if self.site.space.grid else ""
        return f"dist.RelaxedOneHotCategorical({self.script.temperature(self.site.name)}, logits={logits}){event}"


# ---------------------------------------------------------------------- priors and posteriors


def standard_normal(part: Part) -> Expression:
    """Return the expression of the standard normal N(0, I)."""
    return [], f"dist.Normal(torch.zeros({part.site.event[0]}), 1.0).to_event(1)"


def normal(part: Part) -> Expression:
    """Return the expression of a diagonal normal whose location and log-variance a network computes."""
    low, high = part.module.bounds
    scale = f"(log_variance.clamp({low:g}, {high:g}) / 2).exp()"
    return [f"loc, log_variance = {part.network()}.chunk(2, -1)"], f"dist.Normal(loc, {scale}).to_event(1)"


def point(part: Part) -> Expression:
    """Return the expression of a `Delta` at the output of a network, the posterior of an autoencoder."""
    return [], f"dist.Delta({part.network()}, event_dim=1)"


def weights_of_codes(part: Part) -> Expression:
    """Return the expression of a categorical prior, or its relaxation, with learned or equal weights."""
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
    """Return the expression of a categorical posterior, or its relaxation, whose logits a network computes.

    Networks have the dimension of the codes before those of the grid, Pyro has it last.
    """
    if part.site.space.values == "relaxed" and part.declared.kl == "relaxed":
        grid = len(part.site.space.grid)
        return [], part.relaxed(part.network() + (f".movedim({-1 - grid}, -1)" if grid else ""))
    if part.site.space.values == "relaxed" or part.site.space.grid:
        raise NotPlainError
    return [], f"dist.Categorical(logits={part.network()})"


def mixture(part: Part) -> Expression:
    """Return the expression of a mixture of normals with learned weights, locations and log-variances."""
    (count, dim), (low, high), name = part.module.loc.shape, part.declared.log_variance, part.name
    zeros = f"torch.zeros({count}, {dim})"
    part.parameters(loc=f"torch.randn({count}, {dim})", log_variance=zeros, logits=f"torch.zeros({count})")
    scale = f'({name}["log_variance"].clamp({low:g}, {high:g}) / 2).exp()'
    lines = [f'components = dist.Normal({name}["loc"], {scale}).to_event(1)']
    return lines, f'dist.MixtureSameFamily(dist.Categorical(logits={name}["logits"]), components)'


def vamp(part: Part) -> Expression:
    """Return the expression of a VampPrior, the mixture of the guide's posteriors at learned pseudo-inputs."""
    shape = part.module.pseudo_inputs.shape
    part.parameters(pseudo_inputs=f"torch.rand({', '.join(map(str, shape))})")
    read = f'{part.name}["pseudo_inputs"]' + (".clamp(0, 1)" if part.module.bounded else "")
    lines, components = part.script.posterior(part.site, read)
    if not components.startswith("dist.Normal"):
        raise NotPlainError
    weights = f"dist.Categorical(logits=torch.zeros({shape[0]}))"
    return [*lines, f"components = {components}"], f"dist.MixtureSameFamily({weights}, components)"


def flow(part: Part) -> Expression:
    """Return the expression of a flow: N(0, I) through Pyro's transforms, the coordinates reversed after each."""
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
    **{(kind, values): weights_of_codes for kind in ("categorical", "uniform") for values in ("index", "relaxed")},
    **{(kind, "real"): flow for kind in ("realnvp", "spline_coupling", "maf", "iaf")},
}
"""Functions that write a prior in plain Pyro, by kind of prior and value space of the latent; a script builds any
other prior from its pvae class."""
POSTERIORS: Rules = {
    ("normal", "real"): normal,
    ("delta", "real"): point,
    ("categorical", "index"): inferred_codes,
    ("relaxed_onehot", "relaxed"): inferred_codes,
}
"""Functions that write a posterior in plain Pyro, by kind of posterior and value space of the latent."""


# ---------------------------------------------------------------------- networks


def layers_of(module: NetworkModule) -> list[str]:
    """Return the constructor calls of the layers of a network, from its one input to its output.

    The list is empty for a network that is no sequence of torch layers or has several inputs.
    """
    if not isinstance(module, Dense | ConvModule) or len(module.inputs) != 1:
        return []
    ((name, shape),) = module.inputs.items()
    flat = [f"nn.Flatten({-len(shape)})"] if len(shape) > 1 else []
    unflat = [f"nn.Unflatten(-1, {module.output})"] if len(module.output) > 1 else []
    if isinstance(module, Dense):
        return [*flat, *leaves([*(module.branches or []), module.trunk, module.head]), *unflat]
    if name not in module.encoders or unflat:
        return []
    return [*leaves([module.encoders[name]]), "nn.Flatten(-3)", *leaves([module.dense, module.head])]


def leaves(modules: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the constructor calls of the layers inside some modules, in order."""
    for module in modules:
        if isinstance(module, nn.Linear):
            yield f"nn.Linear({module.in_features}, {module.out_features})"
        elif any(True for _ in module.children()):
            yield from leaves(module.children())
            if isinstance(module, Gated):
                yield "nn.GLU()"
        elif not isinstance(module, nn.Identity | nn.Sequential):
            yield f"nn.{module!r}"


def chain(layers: Sequence[str]) -> str:
    """Return the expression of a sequence of layers, with a line for each layer with weights and those after it."""
    if len(layers) == 1:
        return layers[0]
    lines: list[str] = []
    for layer in layers:
        if lines and not layer.startswith(("nn.Linear", "nn.Conv")):
            lines[-1] += f", {layer}"
        else:
            lines.append(layer)
    return "nn.Sequential(\n" + "".join(f"    {line},\n" for line in lines) + ")"
