"""Self-check: every estimator applied to test models whose ELBO terms and evidence are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

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
from pvae.analysis.truths.truth import Truth
from pvae.errors import DataError
from pvae.util.progress import StageProgress, silent

BOUND_SLACK = 0.05
"""Slack, nats, for bounds that are not tight: of AIS with few temperatures, and of guides refined in few steps."""
ANNEALED_ROWS = 20
"""Number of rows whose log p(x) is estimated by annealed importance sampling, the slowest estimator."""


@final
@dataclass(frozen=True)
class Question:
    """Pair of a test model and the name of an estimator that is applied to it."""

    truth: Truth
    estimator: str

    def check(
        self, figure: str, estimate: Estimate | None, known: str = "", *, below: float = 0.0, above: float = 0.0
    ) -> Iterator[FigureCheck]:
        """Yield the comparison of an estimate with its exact value; nothing if the estimate or the value is missing.

        Arguments:
            figure: name of the quantity in the result of the estimator.
            estimate: its estimate, or None.
            known: name of the exact value; default: the same name.
            below: nats that the estimate may be too low as a lower bound.
            above: nats that the estimate may be too high as an upper bound.
        """
        exact = self.truth.exact.get(known or figure)
        if exact is not None and estimate is not None:
            yield FigureCheck(self.truth.name, self.estimator, figure, exact, estimate, below, above)


def _surgery(asked: Question, seed: int) -> Iterator[FigureCheck]:
    truth = asked.truth
    found = surgery(truth.pair, truth.x, truth.samples, seed, labels=truth.labels)
    parts = [latent.dimensions for latent in found.latents.values() if latent.dimensions is not None]
    grid = max((part.error for part in parts), default=0.0)
    for name, estimate, _ in found.known():
        slack = grid if name in ("total_correlation", "coordinate_kl") else 0.0
        yield from asked.check(name, estimate, below=slack, above=slack)
    yield from asked.check("kl_exact", found.kl_exact, "kl")
    yield from _population(asked, "population_lower", found.mutual_information, below=math.inf)
    yield from _population(asked, "population_upper", found.leave_one_out, above=math.inf)


def _population(asked: Question, figure: str, estimate: Estimate | None, **slack: float) -> Iterator[FigureCheck]:
    """Yield the comparison of a mutual information of n data with its exact value under the data distribution.

    The estimate is a bound in expectation over the data: `slack` allows any difference on the side of the bound.
    """
    yield from asked.check(figure, _over_data(estimate), "population_mutual_information", **slack)


def _over_data(estimate: Estimate | None) -> Estimate | None:
    if estimate is None:
        return None
    error = math.hypot(estimate.standard_error, estimate.data_error or 0.0)
    return Estimate(estimate.value, error, estimate.kind, estimate.data_error, estimate.note)


def _evidence(asked: Question, seed: int) -> Iterator[FigureCheck]:
    found = evidence(asked.truth.pair, asked.truth.x, asked.truth.draws, seed)
    yield from asked.check("elbo", found.total)
    for k, bound in found.curve[1:]:
        yield from asked.check(f"iwae_{k}", bound)
    yield from _last(asked, found)


def _prior_evidence(asked: Question, seed: int) -> Iterator[FigureCheck]:
    found = prior_evidence(asked.truth.pair, asked.truth.x, 8 * asked.truth.draws, seed)
    yield from asked.check("jensen", found.jensen, "prior_jensen")
    yield from _last(asked, found)


def _last(asked: Question, found: Bounds) -> Iterator[FigureCheck]:
    k, bound = found.curve[-1]
    yield from asked.check(f"{found.names[1]}_{k}", bound, "log_evidence", below=_lacking(found.ess, found.samples))


def _lacking(ess: Tensor, samples: int) -> float:
    """Return a slack for the log of a mean of importance weights, nats, averaged over data: twice its first-order bias.

    The bias is half the squared coefficient of variation of the weights, divided by their number.
    """
    return float((1 / ess - 1 / samples).mean())


def _ais(asked: Question, seed: int) -> Iterator[FigureCheck]:
    truth = asked.truth
    if truth.log_p is not None:
        x = truth.x[:ANNEALED_ROWS]
        found = ais(truth.pair, x, temperatures=12, chains=64, leapfrog=4, seed=seed)
        lacking = _lacking(found.ess, found.chains)
        yield FigureCheck(truth.name, asked.estimator, "lower", _log_p(truth, x), found.lower, below=lacking)


def _bracket(asked: Question, seed: int) -> Iterator[FigureCheck]:
    truth = asked.truth
    found = bracket(truth.pair, truth.x, rows=60, temperatures=30, chains=16, leapfrog=4, seed=seed)
    if truth.log_p is not None:
        exact = _log_p(truth, found.x)
        yield FigureCheck(truth.name, asked.estimator, "lower", exact, found.lower, below=BOUND_SLACK)
        yield FigureCheck(truth.name, asked.estimator, "upper", exact, found.upper, above=BOUND_SLACK)


def _log_p(truth: Truth, x: Tensor) -> float:
    """Return the mean of the exact log p(x) over the rows x, nats."""
    assert truth.log_p is not None  # noqa: S101 - the callers have looked
    return float(truth.log_p(x.cpu().double().numpy()).mean())


def _gap(asked: Question, seed: int) -> Iterator[FigureCheck]:
    found = gap(asked.truth.pair, asked.truth.x, steps=150, samples=400, evidence_samples=2000, seed=seed)
    yield from asked.check("log_p", found.log_p, "log_evidence", below=BOUND_SLACK)
    yield from asked.check("elbo", found.total)
    yield from asked.check("inference", found.inference, "inference_gap", below=BOUND_SLACK)
    yield from asked.check("amortisation", found.amortisation, "amortisation_gap", below=BOUND_SLACK)
    yield from asked.check(
        "approximation", found.approximation, "approximation_gap", below=BOUND_SLACK, above=BOUND_SLACK
    )


ESTIMATORS: Mapping[str, Callable[[Question, int], Iterator[FigureCheck]]] = MappingProxyType(
    {
        "surgery": _surgery,
        "evidence": _evidence,
        "prior_evidence": _prior_evidence,
        "ais": _ais,
        "bracket": _bracket,
        "gap": _gap,
    }
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
    device: str = "cpu",
    seed: int = 0,
    *,
    truths: Sequence[Truth] | None = None,
    on_progress: StageProgress = silent,
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
        for truth in chosen:
            moved = truth.to(torch.device(device))
            for estimator in truth.estimators:
                checks += ESTIMATORS[estimator](Question(moved, estimator), seed)
                done += 1
                on_progress(done, total, truth.name)
    return SelfCheck(str(device), seed, tuple(checks))
