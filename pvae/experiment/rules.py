"""Rules that concern several tables of a declaration together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pvae.component import Component
from pvae.distributions.codes import MAX_STATES
from pvae.errors import DeclarationError, near, text
from pvae.experiment.captions import unscored
from pvae.graph.site import OBSERVED, Values
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import EstimatedPosterior
from pvae.models.likelihoods import base, standard
from pvae.models.likelihoods.columns import support_of
from pvae.models.likelihoods.counts import LIBRARY, OWNERS, Counts
from pvae.models.priors.base import CategoricalPrior, Prior, UniformPrior
from pvae.nn.network import TableNetwork
from pvae.objectives.em import EM
from pvae.objectives.importance import IWAE
from pvae.pair import Dependencies

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment
    from pvae.experiment.plan import Latent, Plan

Finding = tuple[str, str, Any]
"""Problem of a declaration: its dotted path, the text of what is expected there, and the value found."""
COLDEST = 1e-6
"""Smallest temperature allowed: below it a relaxed one-hot in single precision is a hard one."""
MAX_LOG_STATES = math.log(MAX_STATES) + 1e-9
"""Largest logarithm of the number of states of an exact sum, with room for rounding."""
OF_CODES = "one of codes (categorical by scores, nearest_code)"
IN_WORDS: dict[Values, str] = {"real": "a vector", "index": "codes", "relaxed": "relaxed codes", "binary": "bits"}


def findings(e: Experiment) -> Iterator[Finding]:
    """Yield the problems that concern several tables of a declaration: path, expected value, value found."""
    names = set(e.latents)
    if both := names & set(e.covariates):
        yield "covariates", "names that no latent has", sorted(both)
        return
    if found := [*_unknown_parents(e, names)]:
        yield from found
        return
    try:
        e.sites(), e.guide_sites()
    except DeclarationError as error:
        yield "latents", str(error), sorted(names)
        return
    if e.objective.scores and not any(OBSERVED in z.posterior.given or z.posterior.summed for z in e.latents.values()):
        yield "latents", "at least one posterior given 'x': the guide never looks at the data", sorted(names)
    rules = [
        _unread, _misplaced_priors, _misplaced_posteriors, _unlike_sums, _negative_schedules, _likelihood_free,
        _columns, _sizes, _second_stage, _not_mean_field, _priced, _no_mixture, _observed, unscored, refused,
    ]  # fmt: skip
    for rule in rules:
        yield from rule(e)


def refused(plan: Plan) -> Iterator[Finding]:
    """Yield the settings of `train` that differ from their defaults although the objective does not use them."""
    for name in plan.objective.refuses:
        default, value = type(plan.train).model_fields[name].default, getattr(plan.train, name)
        if value != default:
            yield f"train.{name}", text("experiment.rules.unused", default=default, objective=plan.objective), value


# ---------------------------------------------------------------------- the graph


def _unknown_parents(e: Experiment, names: set[str]) -> Iterator[Finding]:
    """Yield the names in `given` that are no latent or covariate allowed there."""
    known = names | set(e.covariates)
    sampled = known - {name for name, latent in e.latents.items() if latent.posterior.summed}
    places = [("decoder.given", e.decoder.given or (), known)]
    for name, latent in e.latents.items():
        below = sampled - {name} | {OBSERVED}
        places += [(f"latents.{name}.given", latent.given, known - {name})]
        places += [(f"latents.{name}.posterior.given", latent.posterior.given, below)]
    for loc, given, allowed in places:
        for parent in (parent for parent in given if parent not in allowed):
            yield loc, text("experiment.rules.parents", allowed=sorted(allowed), hint=near(parent, allowed)), parent
    if e.decoder.given is not None and not set(e.decoder.given) & names:
        yield "decoder.given", "at least one latent", list(e.decoder.given)


def _unread(e: Experiment) -> Iterator[Finding]:
    """Yield latents that neither the decoder nor another prior reads: their posterior would equal their prior.

    After them come the covariates that no prior, posterior or decoder reads.
    """
    decoded, latents = set(e.decoder_given()), e.latents.values()
    heeded = decoded.union(*(z.given for z in latents if not z.prior.ignores_parents))
    for name in e.latents:
        if name not in heeded:
            yield "decoder.given", text("experiment.rules.unread", name=name), name
    read = decoded.union(e.decoder.likelihood.conditions, *((*z.given, *z.posterior.given) for z in latents))
    for name in e.covariates:
        if name not in read:
            yield f"covariates.{name}", "a covariate that a prior, a posterior or the decoder is given", name


# ---------------------------------------------------------------------- priors and posteriors


def _misplaced_priors(e: Experiment) -> Iterator[Finding]:
    """Yield priors over another value space than the latent's, and priors that do not suit its parents."""
    for name, latent in e.latents.items():
        prior, values, loc = latent.prior, latent.sampled.values, f"latents.{name}"
        of_codes = values == "relaxed" and getattr(latent.posterior, "kl", "") != "relaxed"  # the categoricals' KL
        if values not in prior.values and not (of_codes and "index" in prior.values):
            kinds = sorted(kind for kind, member in Prior.members.items() if values in member.values)
            yield f"{loc}.prior", text("experiment.rules.prior", words=IN_WORDS[values], kinds=kinds), prior.kind
            continue
        if of_codes and "index" not in prior.values:
            yield f"{loc}.posterior.kl", text("experiment.rules.relaxed_prior", kind=prior.kind), "categorical"
        if latent.given and not prior.reads_parents:
            yield f"{loc}.prior", text("experiment.rules.reads_parents", parents=latent.given), prior.kind
        if prior.reads_guide and latent.posterior.given != (OBSERVED,):
            wanted = f"['x'] alone, because the prior {prior.kind} is made of this posterior"
            yield f"{loc}.posterior.given", wanted, list(latent.posterior.given)
        if not latent.given and prior.needs_parents:
            yield f"{loc}.given", f"parents for the prior {prior.kind}, e.g. given = ['z2']", []


def _misplaced_posteriors(e: Experiment) -> Iterator[Finding]:
    """Yield posteriors over another value space than the latent's, and inverses without an invertible decoder.

    Posteriors that would sum over too many states are among them.
    """
    likelihood, network = e.decoder.likelihood, e.decoder.network
    for name, latent in e.latents.items():
        posterior, space, loc = latent.posterior, latent.space, f"latents.{name}.posterior"
        if posterior.values != space.values:
            kinds = sorted(kind for kind, member in Posterior.members.items() if member.values == space.values)
            yield loc, f"a posterior of {IN_WORDS[space.values]}: one of {', '.join(kinds)}", posterior.kind
            continue
        if posterior.infers and not posterior.given:
            yield f"{loc}.given", "'x', or latents that the guide has sampled before", []
        if _is_summed(latent) and space.log_states > MAX_LOG_STATES:
            found = f"{space.states} ** {math.prod(space.shape)}"
            yield loc, text("experiment.rules.states", most=MAX_STATES, posterior=posterior), found
        wanted = posterior.determines
        if wanted and (wanted != likelihood.kind or network.kind != "bijection"):
            found = f"{network.kind}, {likelihood.kind}"
            yield "decoder", text("experiment.rules.no_inverse", posterior=posterior), found
    if e.objective.scores and likelihood.is_point and not any(z.posterior.determines for z in e.latents.values()):
        yield "decoder.likelihood", text("experiment.rules.no_density"), likelihood.kind


def _is_summed(latent: Latent) -> bool:
    """Return True for a latent that is summed over exactly: by the model, or in the expectation under the guide."""
    posterior = latent.posterior
    return posterior.summed or (isinstance(posterior, EstimatedPosterior) and posterior.sums(latent.space.log_states))


def _unlike_sums(e: Experiment) -> Iterator[Finding]:
    """Yield latents whose exact sums cannot be combined with those of others, or with score-function estimators.

    Sums over too many joint states are among them.
    """
    exact = [name for name, z in e.latents.items() if z.posterior.summed]
    summed = [name for name, z in e.latents.items() if not z.posterior.summed and _is_summed(z)]
    for name in summed if exact else ():
        yield f"latents.{name}.posterior.estimator", text("experiment.rules.summed_out", exact=exact), "a sum"
    for names in (exact, summed):
        log_states = sum(e.latents[name].space.log_states for name in names)
        if len(names) > 1 and MAX_LOG_STATES < log_states < math.inf:
            found = f"{math.exp(min(log_states, 700)):.3g}"
            yield "latents", text("experiment.rules.joint_states", most=MAX_STATES, names=names), found
    for name, z in e.latents.items() if summed else ():
        if isinstance(z.posterior, EstimatedPosterior) and not _is_summed(z):
            wanted = text("experiment.rules.beside_sums", summed=summed)
            yield f"latents.{name}.posterior.estimator", wanted, "a score function"


def _not_mean_field(e: Experiment) -> Iterator[Finding]:
    """Yield latents whose KL would be taken in closed form although the guide infers their model parents from them."""
    guide = Dependencies({site.name: frozenset(site.guide_given) for site in e.guide_sites()}, {})
    for name in guide.guide:
        latent, inferred = e.latents[name], guide.inferred_from(name)
        for parent in (parent for parent in latent.given if parent in inferred):
            why = text("experiment.rules.bottom_up", name=name, parent=parent)
            if e.objective.kind == "trace_mean_field_elbo":
                yield "objective.kind", f"trace_elbo: {why}", "trace_mean_field_elbo"
            elif _prices_codes(latent) and _is_drawn(latent):
                found = f"{latent.posterior.kind}, with the KL of its codes"
                yield f"latents.{name}.posterior", f"{OF_CODES}: {why}", found


def _prices_codes(latent: Latent) -> bool:
    """Return True if a relaxed latent has the KL of the categoricals, and a prior that reads its parents, if any."""
    reads = not latent.given or not latent.prior.ignores_parents
    return reads and getattr(latent.posterior, "kl", None) == "categorical"


def _is_drawn(latent: Latent) -> bool:
    """Return True for a relaxed latent that the guide samples with noise, and does not compute from x."""
    return bool(getattr(latent.posterior, "noise", True))


def _priced(e: Experiment) -> Iterator[Finding]:
    """Yield relaxed latents with the KL of the categoricals where it cannot be used.

    That is in the importance weights of iwae, and for a latent with a parent that is summed out.
    """
    for name, latent in e.latents.items():
        if getattr(latent.posterior, "kl", None) != "categorical":
            continue
        loc = f"latents.{name}.posterior"
        if isinstance(e.objective, IWAE) and _is_drawn(latent):
            yield f"{loc}.kl", text("experiment.rules.iwae"), "categorical"
        for parent in latent.given if _prices_codes(latent) else ():
            if parent in e.latents and e.latents[parent].posterior.summed:
                wanted = f"{OF_CODES}, because p({name}) reads {parent}, which is summed out; or samples of {parent}"
                yield loc, wanted, f"{latent.posterior.kind}, with the KL of its codes"


def _observed(e: Experiment) -> Iterator[Finding]:
    """Yield latents that cannot take the values that some rows have, and a weight of theirs where there are none."""
    names = [name for name, latent in e.latents.items() if latent.observed is not None]
    for name in names:
        latent, loc = e.latents[name], f"latents.{name}"
        posterior, values = latent.posterior, latent.sampled.values
        if latent.bits is not None or latent.grid is not None:
            yield loc, "dim or codes, without a grid, for a latent that is observed in some rows", "another"
        elif values == "relaxed" or posterior.carries or posterior.summed or posterior.kind == "delta":
            yield f"{loc}.posterior", text("experiment.rules.observed", codes=latent.codes), posterior.kind
        for parent in posterior.given:
            if parent in e.latents and _is_summed(e.latents[parent]) and e.objective.classification:
                yield f"{loc}.posterior.given", text("experiment.rules.classified", parent=parent), parent
    settings = {"data.labelled": e.data.labelled, "train.labelled": e.train.labelled}
    settings["objective.classification"] = e.objective.classification or None
    for loc, value in settings.items():
        if value is not None and not names:
            yield loc, "a latent with observed = 'label', which is known in some rows; or none", value


# ---------------------------------------------------------------------- objective, schedules, data


def _no_mixture(e: Experiment) -> Iterator[Finding]:
    """Yield the components of a model to which the objective em has no closed-form step.

    EM needs exactly one discrete latent with an exact posterior, and a table of component parameters as the decoder.
    """
    if not isinstance(e.objective, EM):
        return
    if len(e.latents) > 1:
        yield "latents", "exactly one latent, with codes, for the objective em", sorted(e.latents)
        return
    ((name, latent),) = e.latents.items()
    likelihood, network = e.decoder.likelihood, e.decoder.network
    closed = ", ".join(sorted(kind for kind, member in base.Likelihood.members.items() if member.closed_form))
    weights = isinstance(latent.prior, CategoricalPrior | UniformPrior)
    wanted: list[tuple[str, Component, Any, str]] = [
        (f"latents.{name}.prior", latent.prior, weights, "categorical or uniform, of a latent with codes,"),
        (f"latents.{name}.posterior", latent.posterior, latent.posterior.summed, "exact, of a latent with codes,"),
        ("decoder.network", network, isinstance(network, TableNetwork), "table"),
        ("decoder.likelihood", likelihood, likelihood.closed_form, f"one with a closed form ({closed})"),
    ]
    yield from ((loc, f"{what} for the objective em", part.kind) for loc, part, sound, what in wanted if not sound)


def _sizes(e: Experiment) -> Iterator[Finding]:
    """Yield sizes and owners of dispersions of counts that are no entries of a row of the kind that they need."""
    if not isinstance(likelihood := e.decoder.likelihood, Counts):
        return
    single = {name: entry.codes > 0 for name, entry in e.entries().items() if entry.width == 1 and not entry.latent}
    wanted = [("size", likelihood.size, ("learned",), False), ("dispersion", likelihood.dispersed_by, OWNERS[1:], True)]
    for field, name, words, coded in wanted:
        raw = {name for name, c in e.covariates.items() if coded or c.transform == "none"} | {LIBRARY}
        allowed = [*words, *(entry for entry, codes in single.items() if codes == coded and entry in raw)]
        if name and name not in allowed:
            yield f"decoder.likelihood.{field}", text("experiment.rules.size", field=field, allowed=allowed), name
    if likelihood.size and isinstance(e.objective, EM):
        yield "decoder.likelihood.size", "none, for the objective em", likelihood.size


def _second_stage(e: Experiment) -> Iterator[Finding]:
    """Yield the problems of the second stage that a declaration has under `refit`."""
    if e.refit is None or not e.objective.scores:
        return
    for name in e.refit.priors:
        if name not in e.latents:
            yield f"refit.priors.{name}", f"one of {', '.join(e.latents)}{near(name, e.latents)}", name
            return
    if e.refit.train.alternate:
        yield "refit.train.alternate", "0, because the guide is frozen", e.refit.train.alternate
    try:
        e.refitted(e.second_stage())
    except DeclarationError as error:
        yield "refit", f"a valid second stage; {'; '.join(error.problems)}", sorted(e.refit.priors)


def _negative_schedules(e: Experiment) -> Iterator[Finding]:
    """Yield schedules that become negative during training, and temperatures that fall below `COLDEST`."""
    asked = [("objective.beta", e.objective.beta, 0.0, e.train.epochs, "a weight of the KL")]
    for loc, train in [("train", e.train), *([("refit.train", e.refit.train)] if e.refit else [])]:
        asked.append((f"{loc}.schedule", train.schedule, 0.0, train.epochs, "a factor on the learning rate"))
    for name, z in e.latents.items():
        if z.temperature is not None:
            asked.append((f"latents.{name}.temperature", z.temperature, COLDEST, e.train.epochs, "a temperature"))
    for loc, schedule, least, epochs, what in asked:
        lowest = min(schedule.at(moment, float(epochs)) for moment in schedule.extremes(float(epochs)))
        if lowest < least:
            yield loc, f"{what} of at least {least:g} throughout training", lowest


def _likelihood_free(e: Experiment) -> Iterator[Finding]:
    """Yield the components that do not suit an objective with a likelihood, or the likelihood-free objective gan."""
    kind, likelihood, scores = e.objective.kind, e.decoder.likelihood, e.objective.scores
    if not scores and not isinstance(likelihood, standard.DeterminedLikelihood):
        yield "decoder.likelihood", f"determined, x = g(z), for the objective {kind}", likelihood.kind
    wanted = text("experiment.rules.infers", kind=kind, scores=scores)
    for name, latent in e.latents.items():
        if latent.posterior.infers != scores:
            yield f"latents.{name}.posterior", wanted, latent.posterior.kind
    if scores and isinstance(likelihood, standard.DeterminedLikelihood) and likelihood.squash != "none":
        yield "decoder.likelihood.squash", text("experiment.rules.squash"), likelihood.squash
    if not scores and e.refit is not None:
        yield "refit", text("experiment.rules.no_refit", kind=kind), sorted(e.refit.priors)
    if not scores and e.analysis.every:
        yield "analysis.every", f"0, because the objective {kind} has no ELBO", e.analysis.every


def _columns(e: Experiment) -> Iterator[Finding]:
    """Yield a likelihood that does not suit the columns of a declared table: their supports, or missing values."""
    likelihood, loc, columns = e.decoder.likelihood, "decoder.likelihood", e.data.table
    if likelihood.of_tables and not columns:
        yield loc, "another likelihood, unless the data are a table with data.columns", likelihood.kind
    holed, em = e.observed().takes_missing, isinstance(e.objective, EM)
    if e.decoder.missingness != "random" and not holed:
        yield "decoder.missingness", text("experiment.rules.never_missing"), e.decoder.missingness
    if holed and (likelihood.is_point or em or LIBRARY in likelihood.conditions):
        yield "data.missing", text("experiment.rules.holes", likelihood=likelihood, em=em), "mask"
    for name, column in columns.items() if not likelihood.of_tables else ():
        if (law := column.law(name)).masked or support_of(law) is not likelihood.support:
            yield loc, text("experiment.rules.columns", name=name, law=law, column=column), likelihood.kind
            return
