"""Python expressions of the networks, priors and posteriors that torch and Pyro provide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from pvae.distributions.bijections import near_identity
from pvae.graph.site import Site
from pvae.nn.conv import ConvModule
from pvae.nn.network import MLP, Dense, Gated, NetworkModule
from pvae.util import Record

if TYPE_CHECKING:
    from pvae.experiment.pyro_script.programs import PlainScript

Expression = tuple[list[str], str]
"""Statements that a script runs first, and the expression of a distribution that uses them."""


class NotPlainError(Exception):
    """A component can neither be written in plain Pyro nor be built apart from the other components of the pair."""


class Part(Record):
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

    def steps(self, transform: str, count: int) -> str:
        """Add the bijections of a flow to the script, `count` of Pyro's transform; return what they are called."""
        initialise = self.script.imported(near_identity)
        self.script.parts[self.name] = f"nn.ModuleList({initialise}(T.{transform}) for _ in range({count}))"
        return self.name

    def refuse(self) -> NoReturn:
        """Refuse to write this prior or posterior out."""
        raise NotPlainError

    def written(self, rule: Callable[[Part], str]) -> Expression:
        """Return the prior or posterior as a rule of the template `parts.py.j2` writes it."""
        *lines, distribution = filter(None, rule(self).splitlines())
        return lines, distribution


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
