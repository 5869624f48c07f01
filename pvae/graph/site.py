"""Latent variables as model and guide know them, and the order of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.graph.space import Space

OBSERVED = "x"
"""The name of the observed site, and of the data among a posterior's inputs."""
EMBEDDED: Any = {"_embedded": True}
"""Marks the site of a nearest code's row: part of the code, no latent of its own."""


def embedded(name: str) -> str:
    """The site that holds the row of a latent's nearest code; no latent can be declared by this name."""
    return f"{name}/embedded"


@dataclass(frozen=True)
class Site:
    """One latent variable of a declared graph."""

    name: str
    space: Space
    """The values that are sampled."""
    given: tuple[str, ...] = ()
    """Parents in the model, p(name | given)."""
    guide_given: tuple[str, ...] = (OBSERVED,)
    """Parents in the guide, q(name | guide_given)."""
    carries: bool = False
    """True for a nearest code, whose embedding in the guide carries a gradient that its index cannot."""
    has_twin: bool = True
    """False for a relaxed latent whose prior is a density of relaxed one-hots: it has no discrete twin."""
    summed: bool = False
    """True where the model sums the latent out exactly, so that the guide does not sample it."""

    @property
    def event(self) -> Shape:
        """Shape of one sampled value."""
        return self.space.event

    @property
    def features(self) -> Shape:
        """Shape that children and the decoder see."""
        return self.space.features


def topological(parents: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Names in an order where parents come first; declaration order where the graph leaves it open.

    Raises:
        DeclarationError: the graph has a cycle; the message names its members.
    """
    order: list[str] = []
    waiting = {name: [p for p in above if p in parents] for name, above in parents.items()}
    while waiting:
        ready = [name for name, above in waiting.items() if all(p in order for p in above)]
        if not ready:
            raise DeclarationError(
                f"{what}: expected an acyclic graph; got a cycle among {', '.join(sorted(waiting))}. "
                f"Remove one of their `given` entries."
            )
        order.append(ready[0])
        del waiting[ready[0]]
    return order
