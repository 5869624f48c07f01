"""Rules of the latents of a declaration: value spaces, priors, posteriors, and sums over discrete states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from pvae.distributions.codes import MAX_STATES
from pvae.graph.site import OBSERVED, Values
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import EstimatedPosterior
from pvae.models.priors.base import Prior
from pvae.objectives.iwae import IWAE

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment
    from pvae.experiment.latent import Latent

Finding = tuple[tuple[str, ...], str, Any]
"""Problem of a declaration: its path, the text of what is expected there, and the value found."""


IN_WORDS: dict[Values, str] = {
    "real": "a vector",
    "index": "codes",
    "relaxed": "relaxed codes",
    "binary": "bits",
}


def _relaxes(latent: Latent) -> bool:
    """Return True for a categorical prior with a relaxed posterior whose KL is that of the categoricals."""
    return latent.sampled.values == "relaxed" and "index" in latent.prior.values and not _wants_density(latent)


def _wants_density(latent: Latent) -> bool:
    """Return True if the KL of a relaxed latent is that of the relaxed (Concrete) densities."""
    return latent.posterior.kl == "relaxed"  # type: ignore[attr-defined]


def misplaced_priors(e: Experiment) -> Iterator[Finding]:
    """Yield priors over another value space than the latent's, and priors that do not suit its parents."""
    for name, latent in e.latents.items():
        kind = latent.prior.kind  # type: ignore[attr-defined]
        if latent.sampled.values not in latent.prior.values and not _relaxes(latent):
            kinds = sorted(k for k, member in Prior.members.items() if latent.sampled.values in member.values)  # type: ignore[attr-defined]
            yield (
                ("latents", name, "prior"),
                f"a prior of {IN_WORDS[latent.sampled.values]}: one of {', '.join(kinds)}",
                kind,
            )
            continue
        if latent.sampled.values == "relaxed" and "index" not in latent.prior.values and not _wants_density(latent):
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


def misplaced_posteriors(e: Experiment) -> Iterator[Finding]:
    """Yield posteriors over another value space than the latent's, and inverses without an invertible decoder.

    Posteriors that would sum over too many states are among them.
    """
    likelihood = e.decoder.likelihood
    for name, latent in e.latents.items():
        posterior, loc = latent.posterior, ("latents", name, "posterior")
        kind = posterior.kind  # type: ignore[attr-defined]
        if posterior.values != latent.space.values:
            kinds = sorted(k for k, member in Posterior.members.items() if member.values == latent.space.values)  # type: ignore[attr-defined]
            yield loc, f"a posterior of {IN_WORDS[latent.space.values]}: one of {', '.join(kinds)}", kind
            continue
        if posterior.infers and not posterior.given:
            yield (*loc, "given"), "'x', or latents that the guide has sampled before", []
        if _is_summed(latent) and latent.space.log_states > math.log(MAX_STATES) + 1e-9:
            yield (
                loc,
                f"a sum over at most {MAX_STATES} joint states for the posterior {kind} (fewer codes or positions), or "
                f"{'another posterior, such as categorical' if posterior.summed else 'estimator = score'}",
                f"{latent.space.states} ** {prod(latent.space.shape)}",
            )
        wanted = posterior.determines
        if wanted and (wanted != likelihood.kind or e.decoder.network.kind != "bijection"):  # type: ignore[attr-defined]
            yield (
                ("decoder",),
                f"the network bijection and the likelihood {wanted}, which the posterior {kind} inverts",
                f"{e.decoder.network.kind}, {likelihood.kind}",  # type: ignore[attr-defined]
            )
    if e.objective.scores and likelihood.is_point and not any(z.posterior.determines for z in e.latents.values()):
        yield (
            ("decoder", "likelihood"),
            "a density of x given z (normal, bernoulli, ...), unless the posterior is inverse or dequantised",
            likelihood.kind,  # type: ignore[attr-defined]
        )


def _is_summed(latent: Latent) -> bool:
    """Return True for a latent that is summed over exactly: by the model, or in the expectation under the guide."""
    posterior = latent.posterior
    return posterior.summed or (isinstance(posterior, EstimatedPosterior) and posterior.sums(latent.space.log_states))


def unlike_sums(e: Experiment) -> Iterator[Finding]:
    """Yield latents whose exact sums cannot be combined with those of others, or with score-function estimators.

    Sums over too many joint states are among them.
    """
    exact = [name for name, z in e.latents.items() if z.posterior.summed]
    summed = [name for name, z in e.latents.items() if not z.posterior.summed and _is_summed(z)]
    if exact:
        for name in summed:
            yield (
                ("latents", name, "posterior", "estimator"),
                f"score, because {', '.join(exact)} is summed out given its samples; or a relaxed posterior",
                "a sum",
            )
    for names in (exact, summed):
        log_states = sum(e.latents[name].space.log_states for name in names)
        if len(names) > 1 and math.log(MAX_STATES) + 1e-9 < log_states < math.inf:
            yield (
                ("latents",),
                f"at most {MAX_STATES} joint states of {', '.join(names)}, which are summed over; infer some by "
                f"another posterior, such as relaxed_onehot",
                f"{math.exp(min(log_states, 700)):.3g}",
            )
    scored = [z for z in e.latents.items() if isinstance(z[1].posterior, EstimatedPosterior) and not _is_summed(z[1])]
    for name, _ in scored if summed else ():
        yield (
            ("latents", name, "posterior", "estimator"),
            f"samples with a gradient beside {', '.join(summed)}, which is summed over: a sum, or a relaxed posterior",
            "a score function",
        )


def not_mean_field(e: Experiment) -> Iterator[Finding]:
    """Yield latents whose KL would be taken in closed form although the guide infers their model parents from them."""
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
    """Return True if a relaxed latent has the KL of the categoricals, and a prior that reads its parents, if any."""
    reads = not latent.given or not latent.prior.ignores_parents
    return reads and getattr(latent.posterior, "kl", None) == "categorical"


def _is_drawn(latent: Latent) -> bool:
    """Return True for a relaxed latent that the guide samples with noise, and does not compute from x."""
    return bool(getattr(latent.posterior, "noise", True))


def _kind(latent: Latent) -> str:
    return str(latent.posterior.kind)  # type: ignore[attr-defined]


def priced(e: Experiment) -> Iterator[Finding]:
    """Yield relaxed latents with the KL of the categoricals where it cannot be used.

    That is in the importance weights of iwae, and for a latent with a parent that is summed out.
    """
    exact = [name for name, z in e.latents.items() if z.posterior.summed]
    for name, latent in e.latents.items():
        if getattr(latent.posterior, "kl", None) != "categorical":
            continue
        at = ("latents", name, "posterior")
        if isinstance(e.objective, IWAE) and _is_drawn(latent):
            wanted = "relaxed with iwae, whose weights are densities at samples; or trace_elbo"
            yield (*at, "kl"), wanted, "categorical"
        for parent in latent.given if _prices_codes(latent) else ():
            if parent in exact:
                why = f"because p({name}) reads {parent}, which is summed out"
                yield at, f"{OF_CODES}, {why}; or samples of {parent}", f"{_kind(latent)}, with the KL of its codes"
