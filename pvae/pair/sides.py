"""Latents of the two sides of a pair: those of the guide alone, of the model alone, and their problems."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.poutine.trace_struct import Trace

from pvae.errors import DeclarationError
from pvae.pair.layout import is_enumerable, is_point, samples
from pvae.pair.unpacking import Unpacked


@dataclass(frozen=True)
class Problem:
    """One problem found by `Pair.check`: the site and a message."""

    site: str
    message: str

    def __str__(self) -> str:
        return f"{self.site}: {self.message}"


def guide_only(guide_trace: Trace, model_trace: Trace, unpacked: Unpacked | None = None) -> list[str]:
    """Return the latents that the guide samples and the model lacks, without the auxiliary sites of unpacked latents.

    An auxiliary site whose density another latent takes over (a Delta with a log density, as AutoGuides write) is not
    among them.
    """
    guide, model = samples(guide_trace), samples(model_trace)
    used = {made.auxiliary for made in (unpacked or {}).values()}
    known = {name for name, node in model.items() if not node["is_observed"]}
    alone = [n for n, node in guide.items() if not node["is_observed"] and n not in known and n not in used]
    packed = sum(node["value"].numel() for n, node in guide.items() if n in known and is_point(node["fn"]))
    joint = [n for n in alone if guide[n]["infer"].get("is_auxiliary")]
    if sum(guide[n]["value"].numel() for n in joint) > packed:  # nothing unpacks them
        return alone
    return [n for n in alone if n not in joint]


def require_bound(alone: Collection[str]) -> None:
    """Refuse a guide with latents `alone` that the model lacks: log p(x, z) - log q(z, a | x) bounds nothing.

    Raises:
        DeclarationError: the message names the sites.
    """
    if alone:
        raise DeclarationError(
            f"{', '.join(alone)}: expected every latent of the guide in the model; got none of this name, so that "
            f"log p(x, z) - log q(z, a | x) exceeds the ELBO by the entropy of a and bounds nothing. Give the model a "
            f"distribution r(a | z) at this site, or leave the site out of the guide."
        )


def differing_sites(guide_trace: Trace, model_trace: Trace, unpacked: Unpacked | None = None) -> list[Problem]:
    """Return a problem for each latent in only one program; enumerated latents of the model alone are allowed."""
    nodes, sites = samples(model_trace), samples(guide_trace)
    guide = {n for n, node in sites.items() if not node["infer"].get("is_auxiliary") and not node["is_observed"]}
    model = {n for n, node in nodes.items() if not node["is_observed"]}
    only_guide = [
        Problem(name, f"expected a latent of this name in the model; got {_names(model)}")
        for name in guide_only(guide_trace, model_trace, unpacked)
    ]
    only_model = [
        Problem(name, f"expected a latent of this name in the guide; got {_names(guide)}{_or_enumerate(nodes[name])}")
        for name in model - guide
        if not is_enumerable(nodes[name])
    ]
    return sorted(only_guide + only_model, key=lambda problem: problem.site)


def _or_enumerate(node: Mapping[str, Any]) -> str:
    discrete = node["fn"].has_enumerate_support
    return '. Or have it summed over exactly: infer={"enumerate": "parallel"}' if discrete else ""


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
