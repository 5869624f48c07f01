"""Rules that concern several tables of a declaration together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pvae.component import Component
from pvae.errors import DeclarationError, near
from pvae.experiment import latent_rules
from pvae.experiment.latent_rules import Finding
from pvae.graph.site import OBSERVED
from pvae.models.likelihoods.base import Likelihood
from pvae.models.likelihoods.columns import support_of
from pvae.models.likelihoods.determined import DeterminedLikelihood
from pvae.models.priors.codes import CategoricalPrior, UniformPrior
from pvae.nn.network import TableNetwork as NetworkTable
from pvae.nn.schedules import Schedule
from pvae.objectives.em import EM

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment, Refit
    from pvae.experiment.plan import Plan


def findings(e: Experiment) -> Iterator[Finding]:
    """Yield the problems that concern several tables of a declaration: path, expected value, value found."""
    names = set(e.latents)
    if both := names & set(e.covariates):
        yield ("covariates",), "names that no latent has", sorted(both)
        return
    found = [*_unknown_parents(e, names)]
    yield from found
    if found:
        return
    try:
        e.sites(), e.guide_sites()
    except DeclarationError as error:
        yield ("latents",), str(error), sorted(names)
        return
    if e.objective.scores and not any(OBSERVED in z.posterior.given or z.posterior.summed for z in e.latents.values()):
        yield ("latents",), "at least one posterior given 'x': the guide never looks at the data", sorted(names)
    yield from _unread(e)
    yield from _unread_covariates(e)
    yield from latent_rules.misplaced_priors(e)
    yield from latent_rules.misplaced_posteriors(e)
    yield from latent_rules.unlike_sums(e)
    yield from _negative_schedules(e)
    yield from _likelihood_free(e)
    yield from _columns(e)
    if e.refit is not None and e.objective.scores:
        yield from _second_stage(e, e.refit)
    yield from latent_rules.not_mean_field(e)
    yield from latent_rules.priced(e)
    if isinstance(e.objective, EM):
        yield from _no_mixture(e)
    yield from refused(e)


def refused(plan: Plan) -> Iterator[Finding]:
    """Yield the settings of `train` that differ from their defaults although the objective does not use them."""
    for name in plan.objective.refuses:
        default, value = type(plan.train).model_fields[name].default, getattr(plan.train, name)
        if value != default:
            kind = plan.objective.kind  # type: ignore[attr-defined]
            wanted = "nothing" if default is None else default
            why = "takes no gradient steps" if plan.objective.scores else "has no ELBO, no guide, and its own steps"
            yield ("train", name), f"{wanted}, because the objective {kind} {why}", value


def _no_mixture(e: Experiment) -> Iterator[Finding]:
    """Yield the components of a model to which the objective em has no closed-form step.

    EM needs exactly one discrete latent with an exact posterior, and a table of component parameters as the decoder.
    """
    if len(e.latents) > 1:
        yield ("latents",), "exactly one latent, with codes, for the objective em", sorted(e.latents)
        return
    ((name, latent),) = e.latents.items()
    likelihood = e.decoder.likelihood
    closed = ", ".join(sorted(k for k, member in Likelihood.members.items() if member.closed_form))  # type: ignore[attr-defined]
    wanted: list[tuple[tuple[str, ...], Component, bool, str]] = [
        (("latents", name, "prior"), latent.prior, isinstance(latent.prior, CategoricalPrior | UniformPrior),
         "categorical or uniform, of a latent with codes,"),
        (("latents", name, "posterior"), latent.posterior, latent.posterior.summed, "exact, of a latent with codes,"),
        (("decoder", "network"), e.decoder.network, isinstance(e.decoder.network, NetworkTable), "table"),
        (("decoder", "likelihood"), likelihood, likelihood.closed_form, f"one with a closed form ({closed})"),
    ]  # fmt: skip
    for loc, part, sound, what in wanted:
        if not sound:
            yield loc, f"{what} for the objective em", getattr(part, part.tag)


def _unknown_parents(e: Experiment, names: set[str]) -> Iterator[Finding]:
    """Yield the names in `given` that are no latent or covariate allowed there."""
    places: list[tuple[tuple[str, ...], tuple[str, ...], set[str]]]
    known = names | set(e.covariates)
    sampled = {name for name in names if not e.latents[name].posterior.summed} | set(e.covariates)
    places = [(("decoder", "given"), e.decoder.given or (), known)]
    for name, latent in e.latents.items():
        places.append((("latents", name, "given"), latent.given, known - {name}))
        places.append((("latents", name, "posterior", "given"), latent.posterior.given, sampled - {name} | {OBSERVED}))
    for loc, given, allowed in places:
        for parent in given:
            if parent not in allowed:
                wanted = ", ".join(sorted(allowed)) or "no name at all (there is no other latent)"
                yield loc, f"names among {wanted}{near(parent, allowed)}", parent
    if e.decoder.given is not None and not set(e.decoder.given) & names:
        yield ("decoder", "given"), "at least one latent", list(e.decoder.given)


def _unread_covariates(e: Experiment) -> Iterator[Finding]:
    """Yield covariates that no prior, posterior or decoder reads."""
    read = {name for z in e.latents.values() for name in (*z.given, *z.posterior.given)} | set(e.decoder_given())
    for name in e.covariates:
        if name not in read:
            yield ("covariates", name), "a covariate that a prior, a posterior or the decoder is given", name


def _second_stage(e: Experiment, refit: Refit) -> Iterator[Finding]:
    """Yield the problems of the second stage that a declaration has under `refit`."""
    for name in refit.priors:
        if name not in e.latents:
            yield ("refit", "priors", name), f"one of {', '.join(e.latents)}{near(name, e.latents)}", name
            return
    if refit.train.alternate:
        yield ("refit", "train", "alternate"), "0, because the guide is frozen", refit.train.alternate
    try:
        e.refitted(e.second_stage())
    except DeclarationError as error:
        yield ("refit",), f"a valid second stage; {'; '.join(error.problems)}", sorted(refit.priors)


COLDEST = 1e-6
"""Smallest temperature allowed: below it a relaxed one-hot in single precision is a hard one."""


def _negative_schedules(e: Experiment) -> Iterator[Finding]:
    """Yield schedules that become negative during training, and temperatures that fall below `COLDEST`."""
    epochs = float(e.train.epochs)
    asked: list[tuple[tuple[str, ...], Schedule, float, float, str]] = [
        (("objective", "beta"), e.objective.beta, 0.0, epochs, "a weight of the KL"),
        (("train", "schedule"), e.train.schedule, 0.0, epochs, "a factor on the learning rate"),
    ]
    if e.refit is not None:
        train = e.refit.train
        asked.append(
            (("refit", "train", "schedule"), train.schedule, 0.0, train.epochs, "a factor on the learning rate")
        )
    for name, latent in e.latents.items():
        if latent.temperature is not None:
            asked.append((("latents", name, "temperature"), latent.temperature, COLDEST, epochs, "a temperature"))
    for loc, schedule, least, length, what in asked:
        lowest = min(schedule.at(moment, length) for moment in schedule.extremes(length))
        if lowest < least:
            yield loc, f"{what} of at least {least:g} throughout training", lowest


def _likelihood_free(e: Experiment) -> Iterator[Finding]:
    """Yield the components that do not suit an objective with a likelihood, or the likelihood-free objective gan."""
    kind, likelihood = e.objective.kind, e.decoder.likelihood  # type: ignore[attr-defined]
    determined = isinstance(likelihood, DeterminedLikelihood)
    if e.objective.scores:
        for name, latent in e.latents.items():
            if not latent.posterior.infers:
                yield (
                    ("latents", name, "posterior"),
                    f"a posterior that reads x (normal, ...), because the objective {kind} fits a density of x",
                    latent.posterior.kind,  # type: ignore[attr-defined]
                )
        if isinstance(likelihood, DeterminedLikelihood) and likelihood.squash != "none":
            yield (
                ("decoder", "likelihood", "squash"),
                'none, because every other objective than gan inverts the decoder; use the network\'s squash = "logit"',
                likelihood.squash,
            )
        return
    if not determined:
        yield ("decoder", "likelihood"), f"determined, x = g(z), for the objective {kind}", likelihood.kind  # type: ignore[attr-defined]
    for name, latent in e.latents.items():
        if latent.posterior.infers:
            yield (
                ("latents", name, "posterior"),
                f"prior, because the objective {kind} infers nothing",
                latent.posterior.kind,  # type: ignore[attr-defined]
            )
    if e.refit is not None:
        yield (
            ("refit",),
            f"none, because the objective {kind} infers no latents to fit a prior to",
            sorted(e.refit.priors),
        )
    if e.analysis.every:
        yield ("analysis", "every"), f"0, because the objective {kind} has no ELBO", e.analysis.every


def _columns(e: Experiment) -> Iterator[Finding]:
    """Yield a likelihood that does not suit the columns of a declared table: their supports, or missing values."""
    likelihood, loc = e.decoder.likelihood, ("decoder", "likelihood")
    kind = likelihood.kind  # type: ignore[attr-defined]
    if likelihood.of_tables:
        if not e.data.table:
            yield loc, "another likelihood, unless the data are a table with data.columns", kind
        return
    for name, column in e.data.table.items():
        law = column.law(name)
        if law.masked:
            yield loc, f"columns, because values of {name!r} may be missing", kind
            return
        if support_of(law) is not likelihood.support:
            yield loc, f"columns, because {name!r} is {column.type}", kind  # type: ignore[attr-defined]
            return


def _unread(e: Experiment) -> Iterator[Finding]:
    """Yield latents that neither the decoder nor another prior reads: their posterior would equal their prior."""
    heeded = {above for z in e.latents.values() if not z.prior.ignores_parents for above in z.given}
    read = set(e.decoder_given()) | heeded
    for name in e.latents:
        if name not in read:
            wanted = "every latent read by the decoder or by another latent, through a prior that reads its parents"
            yield ("decoder", "given"), f"{wanted}; {name} is not", name
