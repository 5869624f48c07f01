"""Construction of the Pyro pair (model and guide) of a declaration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pvae.component import Shape
from pvae.errors import DeclarationError, is_refused_draw
from pvae.graph.frame import Frame
from pvae.graph.link import Link
from pvae.graph.site import OBSERVED
from pvae.guides.graph import GraphGuide
from pvae.models.graph import GraphModel
from pvae.models.priors.factorised import prior_of
from pvae.nn.schedules import Constant, Scheduled
from pvae.pair.pair import Pair
from pvae.util.memory import weighed

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment


def build_pair(experiment: Experiment, frame: Frame) -> Pair:
    """Return the pair of model and guide of a declaration, ready to run.

    Its weights are initialised after `torch.manual_seed(experiment.seed)`.

    Raises:
        DeclarationError: it would not fit into memory, or a distribution is not finite before training.
    """
    link = weighed(lambda: linked_parts(experiment, frame))
    link.building = True
    try:
        pair = Pair(link.model, link.guide).adopt(torch.zeros(2, *frame.row))
    except (RuntimeError, ValueError) as error:
        if not is_refused_draw(error):
            raise
        raise DeclarationError(
            f"Expected distributions that are finite before training; got: {str(error).splitlines()[0][:200]}. "
            f"Look at scales, log_variance bounds and temperatures."
        ) from error
    experiment.objective.attach(pair)
    link.building = False
    return pair


def linked_parts(experiment: Experiment, frame: Frame) -> Link:
    """Return model and guide of a declaration, before their first run; their weights are a function of its seed."""
    torch.manual_seed(experiment.seed)
    link, latents, declared = Link(), experiment.latents, experiment.observed()
    sites, guide_sites = experiment.sites(), experiment.guide_sites()
    link.frame, link.support = frame, declared.support
    known: dict[str, Shape] = {OBSERVED: frame.x, **frame.shapes}
    known |= {site.name: site.features for site in sites}
    priors = {}
    for site in sites:
        with at(f"latents.{site.name}.prior"):
            above = {name: known[name] for name in site.given}
            priors[site.name] = prior_of(latents[site.name].prior, site, above, link)
    with at("decoder"):
        decoder = declared.build({name: known[name] for name in experiment.decoder_given()}, frame.x)
    codebooks = {
        site.name: latents[site.name].posterior.codebook(site.space.states, site.space.embedding)
        for site in sites
        if site.space.embedding is not None
    }
    relaxed = [site.name for site in sites if site.space.values == "relaxed"]
    temperatures = {name: Scheduled(latents[name].temperature or Constant(value=2 / 3)) for name in relaxed}
    link.model = GraphModel(sites, priors, decoder, frame, codebooks, temperatures)
    reader = declared.likelihood.reader()
    known[OBSERVED] = frame.x if reader is None else reader.output
    reading = [site for site in guide_sites if latents[site.name].posterior.reads_features]
    with at("encoder"):
        encoder = experiment.encoder.build(known, reading) if reading else None
    posteriors = {}
    for site in guide_sites:
        inputs = {name: known[name] for name in site.guide_given}
        if encoder is not None:
            inputs = encoder.shapes.get(site.name, inputs)
        with at(f"latents.{site.name}.posterior"):
            posteriors[site.name] = latents[site.name].posterior.build(site, inputs, link)
    link.guide = GraphGuide(guide_sites, encoder, posteriors, frame, link, reader)
    return link


@contextmanager
def at(path: str) -> Iterator[None]:
    """Put the path of a table before the problems of a DeclarationError, unless they name a latent themselves."""
    try:
        yield
    except DeclarationError as error:
        raise DeclarationError([_located(problem, path) for problem in error.problems]) from None


def _located(problem: str, path: str) -> str:
    if problem.startswith("latents."):
        return problem
    return f"{path}.{problem}" if re.match(r"\w+: ", problem) else f"{path}: {problem}"
