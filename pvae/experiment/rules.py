"""Whether a declaration makes sense as a whole: what no single table can know, each finding with its path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from pvae.component import Component
from pvae.distributions.codes import STATES
from pvae.errors import DeclarationError, near
from pvae.graph.site import OBSERVED, Values
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import EstimatedPosterior
from pvae.models.likelihoods.base import Likelihood
from pvae.models.likelihoods.columns import support_of
from pvae.models.likelihoods.determined import DeterminedLikelihood
from pvae.models.priors.base import Prior
from pvae.models.priors.codes import CategoricalPrior, UniformPrior
from pvae.nn.dense import Table as NetworkTable
from pvae.nn.schedules import Schedule
from pvae.objectives.em import EM
from pvae.objectives.iwae import IWAE

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment, Refit
    from pvae.experiment.latent import Latent
    from pvae.experiment.plan import Plan

Finding = tuple[tuple[str, ...], str, Any]


def findings(e: Experiment) -> Iterator[Finding]:
    """What is wrong with the graph, each with its path."""
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
    yield from _misplaced_priors(e)
    yield from _misplaced_posteriors(e)
    yield from _unlike_sums(e)
    yield from _negative_schedules(e)
    yield from _likelihood_free(e)
    yield from _columns(e)
    if e.refit is not None and e.objective.scores:
        yield from _second_stage(e, e.refit)
    yield from _not_mean_field(e)
    yield from _priced(e)
    if isinstance(e.objective, EM):
        yield from _no_mixture(e)
    yield from refused(e)


def refused(plan: Plan) -> Iterator[Finding]:
    """Keys of `train` that the objective has no use for, each with its path."""
    for name in plan.objective.refuses:
        default, value = type(plan.train).model_fields[name].default, getattr(plan.train, name)
        if value != default:
            kind = plan.objective.kind  # type: ignore[attr-defined]
            wanted = "nothing" if default is None else default
            why = "takes no gradient steps" if plan.objective.scores else "has no ELBO, no guide, and its own steps"
            yield ("train", name), f"{wanted}, because the objective {kind} {why}", value


def _no_mixture(e: Experiment) -> Iterator[Finding]:
    """What has no closed form: anything but one code, summed over exactly, and a table of components."""
    if len(e.latents) > 1:
        yield ("latents",), "exactly one latent, with codes, for the objective em", sorted(e.latents)
        return
    ((name, latent),) = e.latents.items()
    likelihood = e.decoder.likelihood
    closed = ", ".join(kind for kind, member in Likelihood.members.items() if member.closed_form)  # type: ignore[attr-defined]
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
    read = {name for z in e.latents.values() for name in (*z.given, *z.posterior.given)} | set(e.decoder_given())
    for name in e.covariates:
        if name not in read:
            yield ("covariates", name), "a covariate that a prior, a posterior or the decoder is given", name


WHAT: dict[Values, str] = {"real": "a vector", "index": "codes", "relaxed": "relaxed codes", "binary": "bits"}


def _relaxes(latent: Latent) -> bool:
    """Whether a prior of codes is to price relaxed ones: by the KL of the categoricals, which asks for no density."""
    return latent.sampled == "relaxed" and "index" in latent.prior.values and not _wants_density(latent)


def _wants_density(latent: Latent) -> bool:
    """Whether the KL of a relaxed latent is that of the densities."""
    return latent.posterior.kl == "relaxed"  # type: ignore[attr-defined]


def _misplaced_priors(e: Experiment) -> Iterator[Finding]:
    """Priors that cannot read the parents they have, or need parents that are not there."""
    for name, latent in e.latents.items():
        kind = latent.prior.kind  # type: ignore[attr-defined]
        if latent.sampled not in latent.prior.values and not _relaxes(latent):
            kinds = [k for k, member in Prior.members.items() if latent.sampled in member.values]  # type: ignore[attr-defined]
            yield ("latents", name, "prior"), f"a prior of {WHAT[latent.sampled]}: one of {', '.join(kinds)}", kind
            continue
        if latent.sampled == "relaxed" and "index" not in latent.prior.values and not _wants_density(latent):
            yield (
                ("latents", name, "posterior", "kl"),
                f"relaxed, because the prior {kind} is a density of relaxed codes and gives codes no probabilities",
                "categorical",
            )
        if latent.given and not latent.prior.reads_parents:
            yield (
                ("latents", name, "prior"),
                f"a prior that reads {', '.join(latent.given)}, such as conditional_normal",
                kind,
            )
        if latent.prior.reads_guide and latent.posterior.given != (OBSERVED,):
            yield (
                ("latents", name, "posterior", "given"),
                f"['x'] alone, because the prior {kind} is made of this posterior",
                list(latent.posterior.given),
            )
        if not latent.given and latent.prior.needs_parents:
            yield ("latents", name, "given"), f"parents for the prior {kind}, e.g. given = ['z2']", []


def _second_stage(e: Experiment, refit: Refit) -> Iterator[Finding]:
    for name in refit.priors:
        if name not in e.latents:
            yield ("refit", "priors", name), f"one of {', '.join(e.latents)}{near(name, e.latents)}", name
            return
    if refit.train.alternate:
        yield ("refit", "train", "alternate"), "0, because the guide is frozen", refit.train.alternate
    try:
        e.refitted(e.second_stage())
    except DeclarationError as error:
        yield ("refit",), f"a sound second stage; {'; '.join(error.problems)}", sorted(refit.priors)


def _misplaced_posteriors(e: Experiment) -> Iterator[Finding]:
    """Posteriors of other values than the latent's, and inverses without what they invert."""
    likelihood = e.decoder.likelihood
    for name, latent in e.latents.items():
        posterior, loc = latent.posterior, ("latents", name, "posterior")
        kind = posterior.kind  # type: ignore[attr-defined]
        if posterior.values != latent.values:
            kinds = [k for k, member in Posterior.members.items() if member.values == latent.values]  # type: ignore[attr-defined]
            yield loc, f"a posterior of {WHAT[latent.values]}: one of {', '.join(kinds)}", kind
            continue
        if posterior.infers and not posterior.given:
            yield (*loc, "given"), "'x', or latents that the guide has sampled before", []
        if _is_summed(latent) and latent.log_states > math.log(STATES) + 1e-9:
            yield (
                loc,
                f"a sum over at most {STATES} joint states for the posterior {kind} (fewer codes or positions), or "
                f"{'another posterior, such as categorical' if posterior.summed else 'estimator = score'}",
                f"{latent.codes or 2} ** {latent.bits or prod(latent.grid or ())}",
            )
        wanted = posterior.determines
        if wanted and (wanted != likelihood.kind or e.decoder.network.kind != "bijection"):  # type: ignore[attr-defined]
            yield (
                ("decoder",),
                f"the network bijection and the likelihood {wanted}, of which the posterior {kind} is the way back",
                f"{e.decoder.network.kind}, {likelihood.kind}",  # type: ignore[attr-defined]
            )
    if e.objective.scores and likelihood.is_point and not any(z.posterior.determines for z in e.latents.values()):
        yield (
            ("decoder", "likelihood"),
            "a density of x given z (normal, bernoulli, ...), unless the posterior is inverse or dequantised",
            likelihood.kind,  # type: ignore[attr-defined]
        )


COLDEST = 1e-6
"""Least temperature: below it single precision holds no relaxed one-hot but a hard one."""


def _negative_schedules(e: Experiment) -> Iterator[Finding]:
    """Weights and rates that would turn a minimum into a maximum, and temperatures without a meaning."""
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
            yield loc, f"{what} of at least {least:g} all through training", lowest


def _is_summed(latent: Latent) -> bool:
    """Whether its gradient is that of a sum over its states: by the model, or in expectation under the guide."""
    posterior = latent.posterior
    return posterior.summed or (isinstance(posterior, EstimatedPosterior) and posterior.sums(latent.log_states))


def _unlike_sums(e: Experiment) -> Iterator[Finding]:
    """Sums go with draws that carry a gradient, or with sums of their own kind, over few joint states."""
    exact = [name for name, z in e.latents.items() if z.posterior.summed]
    summed = [name for name, z in e.latents.items() if not z.posterior.summed and _is_summed(z)]
    if exact:
        for name in summed:
            yield (
                ("latents", name, "posterior", "estimator"),
                f"score, because {', '.join(exact)} is summed out given its draws; or a relaxed posterior",
                "a sum",
            )
    for names in (exact, summed):
        log_states = sum(e.latents[name].log_states for name in names)
        if len(names) > 1 and math.log(STATES) + 1e-9 < log_states < math.inf:
            yield (
                ("latents",),
                f"at most {STATES} joint states of {', '.join(names)}, which are summed over; infer some by another "
                f"posterior, such as relaxed_onehot",
                f"{math.exp(min(log_states, 700)):.3g}",
            )
    scored = [z for z in e.latents.items() if isinstance(z[1].posterior, EstimatedPosterior) and not _is_summed(z[1])]
    for name, _ in scored if summed else ():
        yield (
            ("latents", name, "posterior", "estimator"),
            f"draws that carry a gradient beside {', '.join(summed)}, which is summed over: a sum, or a relaxed "
            f"posterior",
            "a score function",
        )


def _likelihood_free(e: Experiment) -> Iterator[Finding]:
    """A generator needs a critic, a point for x and a guide that infers nothing; none goes without the others."""
    kind, likelihood = e.objective.kind, e.decoder.likelihood  # type: ignore[attr-defined]
    determined = isinstance(likelihood, DeterminedLikelihood)
    if e.objective.scores:
        for name, latent in e.latents.items():
            if not latent.posterior.infers:
                yield (
                    ("latents", name, "posterior"),
                    f"a posterior that is inferred from x (normal, ...), for the objective {kind} scores data",
                    latent.posterior.kind,  # type: ignore[attr-defined]
                )
        if isinstance(likelihood, DeterminedLikelihood) and likelihood.squash != "none":
            yield (
                ("decoder", "likelihood", "squash"),
                'none, for only the objective gan never asks for the way back; use the network\'s squash = "logit"',
                likelihood.squash,
            )
        return
    if not determined:
        yield ("decoder", "likelihood"), f"determined, x = g(z), for the objective {kind}", likelihood.kind  # type: ignore[attr-defined]
    for name, latent in e.latents.items():
        if latent.posterior.infers:
            yield (
                ("latents", name, "posterior"),
                f"prior, for the objective {kind} infers nothing",
                latent.posterior.kind,  # type: ignore[attr-defined]
            )
    if e.refit is not None:
        yield ("refit",), f"none, for the objective {kind} has no codes to fit a prior to", sorted(e.refit.priors)
    if e.analysis.every:
        yield ("analysis", "every"), f"0, for the objective {kind} has no ELBO to take apart", e.analysis.every


def _columns(e: Experiment) -> Iterator[Finding]:
    """The likelihood `columns` is that of a declared table, and a table needs no other unless it is of one kind."""
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
    """A latent that neither the decoder nor another latent's prior reads can only equal its prior."""
    heeded = {above for z in e.latents.values() if not z.prior.ignores_parents for above in z.given}
    read = set(e.decoder_given()) | heeded
    for name in e.latents:
        if name not in read:
            wanted = "every latent read by the decoder or by another latent, through a prior that heeds its parents"
            yield ("decoder", "given"), f"{wanted}; {name} is not", name


def _not_mean_field(e: Experiment) -> Iterator[Finding]:
    """Latents whose model parents are inferred from them: a closed-form KL would not be an expectation."""
    below: dict[str, set[str]] = {}
    for site in e.guide_sites():
        below[site.name] = {site.name}
        for ancestor in below:
            if ancestor in site.guide_given or any(p in below[ancestor] for p in site.guide_given):
                below[ancestor].add(site.name)
    closed = e.objective.kind == "trace_mean_field_elbo"  # type: ignore[attr-defined]
    for name, inferred in below.items():
        for parent in e.latents[name].given:
            if parent not in inferred:
                continue
            why = (
                f"the guide infers {parent} from {name} while the model has {name} given {parent}, so "
                f"KL(q({name}) || p({name} | {parent})) has no closed form"
            )
            if closed:
                yield ("objective", "kind"), f"trace_elbo: {why}", "trace_mean_field_elbo"
            elif _prices_codes(latent := e.latents[name]) and _is_drawn(latent):
                yield ("latents", name, "posterior"), f"{OF_CODES}: {why}", f"{_kind(latent)}, with the KL of its codes"


OF_CODES = "one of codes (categorical by scores, nearest_code)"


def _prices_codes(latent: Latent) -> bool:
    """Whether the KL of a relaxed latent is that of its codes, under a prior that reads its parents if it has some."""
    reads = not latent.given or not latent.prior.ignores_parents
    return reads and getattr(latent.posterior, "kl", None) == "categorical"


def _is_drawn(latent: Latent) -> bool:
    """Whether a relaxed latent is no point given x."""
    return bool(getattr(latent.posterior, "noise", True))


def _kind(latent: Latent) -> str:
    return str(latent.posterior.kind)  # type: ignore[attr-defined]


def _priced(e: Experiment) -> Iterator[Finding]:
    """Where the KL of the codes of a relaxed latent is none of the objective's: inside weights, and inside a sum."""
    exact = [name for name, z in e.latents.items() if z.posterior.summed]
    for name, latent in e.latents.items():
        if getattr(latent.posterior, "kl", None) != "categorical":
            continue
        at = ("latents", name, "posterior")
        if isinstance(e.objective, IWAE) and _is_drawn(latent):
            wanted = "relaxed with iwae, whose weights are densities at draws; or trace_elbo"
            yield (*at, "kl"), wanted, "categorical"
        for parent in latent.given if _prices_codes(latent) else ():
            if parent in exact:
                why = f"because p({name}) reads {parent}, which is summed out"
                yield at, f"{OF_CODES}, {why}; or draws of {parent}", f"{_kind(latent)}, with the KL of its codes"
