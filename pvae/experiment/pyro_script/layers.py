"""Source text of networks that are sequences of plain torch layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from pvae.nn.conv import ConvModule
from pvae.nn.network import Dense, Gated, NetworkModule


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
