"""Latent variables of a declared graphical model, and the topological order of its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.graph.space import Space

OBSERVED = "x"
"""Name of the observed site, and of the data among the inputs of a posterior."""
EMBEDDED: Any = {"_embedded": True}
"""Entry of `infer` that marks the site of a quantised latent's codebook vector, which is no latent of its own."""


def embedded(name: str) -> str:
    """Return the name of the site with the codebook vector of a quantised latent; no declared latent can have it."""
    return f"{name}/embedded"


@dataclass(frozen=True)
class Site:
    """One latent variable of a declared graphical model, with its parents in model and guide."""

    name: str
    space: Space
    """Space of the values that the posterior samples: relaxed one-hots if the posterior relaxes codes."""
    given: tuple[str, ...] = ()
    """Parents in the model, p(name | given)."""
    guide_given: tuple[str, ...] = (OBSERVED,)
    """Parents in the guide, q(name | guide_given)."""
    carries: bool = False
    """True for a nearest-code (VQ) latent, whose codebook vector carries the gradient that its index cannot."""
    has_twin: bool = True
    """False for a relaxed latent whose prior is a density of relaxed one-hots, with no discrete counterpart."""
    summed: bool = False
    """True if the model sums the latent out exactly, so that the guide does not sample it."""

    @property
    def event(self) -> Shape:
        """Event shape of one sampled value."""
        return self.space.event

    @property
    def features(self) -> Shape:
        """Event shape of the features that child priors and the decoder receive; of codes, channels first."""
        return self.space.features


def topological(parents: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Return the names in topological order, parents first; ties keep the order of declaration.

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
