"""Captions that a model scores: which prior does, and the rule that one can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pvae.words import text

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment


def scored(e: Experiment) -> dict[str, str]:
    """Return the caption that the model of a declaration scores, with the latent whose prior does; {} without one.

    It is the first latent that is given the caption, beside covariates alone, and has a prior that can.
    """
    able = [(name, z.given) for name, z in e.latents.items() if z.prior.scores_captions]
    wanted = [name for name, covariate in e.covariates.items() if covariate.scored and covariate.length != 1]
    found = [(name, latent) for name in wanted for latent, given in able if {name} <= {*given} <= e.covariates.keys()]
    return dict(found[:1])


def unscored(e: Experiment) -> Iterator[tuple[str, str, Any]]:
    """Yield the captions to be scored that no prior can score, nor one of the second stage, which has its own rules."""
    later = e.refit is not None and any(prior.scores_captions for prior in e.refit.priors.values())
    for name in [name for name, y in e.covariates.items() if y.scored and not later and name not in scored(e)]:
        yield f"covariates.{name}.scored", text("experiment.rules.scored"), True
