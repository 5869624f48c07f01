"""Self-check: every estimator applied to test models whose ELBO terms and evidence are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.analysis.bounds.ais import ais, bracket
from pvae.analysis.bounds.evidence import evidence, prior_evidence
from pvae.analysis.bounds.gap import gap
from pvae.analysis.bounds.lower_bounds import Bounds
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.truths.figure_checks import FigureCheck, SelfCheck
from pvae.analysis.truths.standard import standard
from pvae.analysis.truths.truth import FloatArray, Truth
from pvae.errors import DataError
from pvae.util.progress import StageProgress, silent

BOUND_SLACK = 0.05
"""Slack, nats, for bounds that are not tight: of AIS with few temperatures, and of guides refined in few steps."""
ANNEALED_ROWS = 20
"""Number of rows whose log p(x) is estimated by annealed importance sampling, the slowest estimator."""


class Found(NamedTuple):
    """One estimate of an estimator, and what it is compared with."""

    figure: str
    """Name of the quantity in the result of the estimator."""
    estimate: Estimate | None
    """Its estimate; None if there is none, and nothing to compare."""
    known: str | float = ""
    """Exact value, or its name among those of the test model; default: the same name."""
    below: float = 0.0
    """Nats that the estimate may be too low as a lower bound."""
    above: float = 0.0
    """Nats that the estimate may be too high as an upper bound."""


def _surgery(truth: Truth, seed: int) -> Iterator[Found]:
    found = surgery(truth.pair, truth.x, truth.samples, seed, labels=truth.labels)
    parts = [latent.dimensions for latent in found.latents.values() if latent.dimensions is not None]
    grid = max((part.error for part in parts), default=0.0)
    for name, estimate, _ in found.known():
        slack = grid if name in ("total_correlation", "coordinate_kl") else 0.0
        yield Found(name, estimate, below=slack, above=slack)
    yield Found("kl_exact", found.kl_exact, "kl")
    # The information of n data bounds that of their distribution in expectation over the data.
    population = "population_mutual_information"
    yield Found("population_lower", _over_data(found.mutual_information), population, below=math.inf)
    yield Found("population_upper", _over_data(found.leave_one_out), population, above=math.inf)


def _over_data(estimate: Estimate | None) -> Estimate | None:
    """Return an estimate whose standard error includes that over the data."""
    if estimate is None:
        return None
    return replace(estimate, standard_error=math.hypot(estimate.standard_error, estimate.data_error or 0.0))


def _evidence(truth: Truth, seed: int) -> Iterator[Found]:
    found = evidence(truth.pair, truth.x, truth.draws, seed)
    yield Found("elbo", found.elbo)
    for k, bound in found.curve[1:]:
        yield Found(f"iwae_{k}", bound)
    yield _last(found)


def _prior_evidence(truth: Truth, seed: int) -> Iterator[Found]:
    found = prior_evidence(truth.pair, truth.x, 8 * truth.draws, seed)
    yield Found("jensen", found.jensen, "prior_jensen")
    yield _last(found)


def _last(found: Bounds) -> Found:
    k, bound = found.curve[-1]
    return Found(f"{found.names[1]}_{k}", bound, "log_evidence", below=_lacking(found.ess, found.samples))


def _lacking(ess: Tensor, samples: int) -> float:
    """Return a slack for the log of a mean of importance weights, nats, averaged over data: twice its first-order bias.

    The bias is half the squared coefficient of variation of the weights, divided by their number.
    """
    return float((1 / ess - 1 / samples).mean())


def _ais(truth: Truth, seed: int) -> Iterator[Found]:
    if truth.log_p is not None:
        x = truth.x[:ANNEALED_ROWS]
        found = ais(truth.pair, x, temperatures=12, chains=64, leapfrog=4, seed=seed)
        yield Found("lower", found.lower, _mean(truth.log_p, x), below=_lacking(found.ess, found.chains))


def _bracket(truth: Truth, seed: int) -> Iterator[Found]:
    if truth.log_p is not None:
        found = bracket(truth.pair, truth.x, rows=60, temperatures=30, chains=16, leapfrog=4, seed=seed)
        exact = _mean(truth.log_p, found.x)
        yield Found("lower", found.lower, exact, below=BOUND_SLACK)
        yield Found("upper", found.upper, exact, above=BOUND_SLACK)


def _mean(log_p: Callable[[FloatArray], FloatArray], x: Tensor) -> float:
    """Return the mean of the exact log p(x) over the rows x, nats."""
    return float(log_p(x.cpu().double().numpy()).mean())


def _gap(truth: Truth, seed: int) -> Iterator[Found]:
    found = gap(truth.pair, truth.x, steps=150, samples=400, evidence_samples=2000, seed=seed)
    yield Found("log_p", found.log_p, "log_evidence", below=BOUND_SLACK)
    yield Found("elbo", found.elbo)
    yield Found("inference", found.inference, "inference_gap", below=BOUND_SLACK)
    yield Found("amortisation", found.amortisation, "amortisation_gap", below=BOUND_SLACK)
    yield Found("approximation", found.approximation, "approximation_gap", below=BOUND_SLACK, above=BOUND_SLACK)


ESTIMATORS: Mapping[str, Callable[[Truth, int], Iterator[Found]]] = MappingProxyType(
    {f.__name__[1:]: f for f in (_surgery, _evidence, _prior_evidence, _ais, _bracket, _gap)}
)


@contextmanager
def single_thread() -> Iterator[None]:
    """Context that runs torch with one thread: tensors are small, and threads would mostly wait on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def selfcheck(
    device: str = "cpu", seed: int = 0, *, truths: Sequence[Truth] | None = None, on_progress: StageProgress = silent
) -> SelfCheck:
    r"""Run every estimator on test models whose quantities are known exactly, and compare.

    An estimate passes within 4 standard errors and 1e-6 for rounding. A bound may differ more on its own side, by a
    stated slack: the log of mean importance weights by twice its first-order bias, bounds of annealing and of optimised
    posteriors by 0.05 nats, the information of finite data by any amount. Exact results may differ by rounding only.

    Warning: correct estimators fail with probability `SelfCheck.failure_rate`, once in about a hundred seeds. The same
    seed gives the same numbers on the same machine.

    Arguments:
        device: "cpu" or "cuda[:i]".
        seed: seed of the samples.
        truths: the test models; default: `pvae.analysis.truths.standard.standard()`.
        on_progress: called with (estimators run, estimators to run, name of the test model).

    Returns:
        SelfCheck, nats per datum; `ok` if all estimates agree with their exact values.

    Raises:
        DataError: there are no test models.

    Example:
        >>> from pvae.analysis.truths.structured import symmetric_channel
        >>> selfcheck(truths=[symmetric_channel(2, 0.1)]).ok
        True
    """
    chosen = standard() if truths is None else tuple(truths)
    if not chosen:
        raise DataError("selfcheck: expected at least one truth; got none. Pass truths=None for the standard ones.")
    total, done, checks = sum(len(truth.estimators) for truth in chosen), 0, list[FigureCheck]()
    with single_thread():
        for truth in (truth.to(device) for truth in chosen):
            for estimator in truth.estimators:
                for figure, estimate, known, *slack in ESTIMATORS[estimator](truth, seed):
                    exact = truth.exact.get(known or figure) if isinstance(known, str) else known
                    if exact is not None and estimate is not None:
                        checks.append(FigureCheck(truth.name, estimator, figure, exact, estimate, *slack))
                done += 1
                on_progress(done, total, truth.name)
    return SelfCheck(str(device), seed, tuple(checks))
