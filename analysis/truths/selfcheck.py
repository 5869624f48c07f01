"""Self-check: every estimator applied to test models whose ELBO terms and evidence are known exactly.

`standard` gives the test models that `pvae selfcheck` runs the estimators on.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pvae.analysis.bounds import ais, evidence, gap, weights
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, refuse, text, texts
from pvae.analysis.truths import linear, structured
from pvae.analysis.truths.truth import EstimatorName, FloatArray, Truth
from pvae.util import Record, StageProgress, plain, replace, silent, threads


def digits(n: int | None = 1000) -> tuple[FloatArray, np.ndarray]:
    """Return the first n (None: all) of scikit-learn's 8 x 8 digits in [0, 1], `(n, 64)`, and their labels `(n,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data[:n] / 16, found.target[:n]


def standard() -> tuple[Truth, ...]:
    """Return the test models of `pvae selfcheck`, on the CPU: one member of every family, at fixed parameters.

    Each figure of each estimator that is known exactly for any test model is known for one of these.
    """
    (images, labels), random = digits(), np.random.default_rng(0)
    table, prior = random.dirichlet([2.0] * 4, (5, 3)), random.dirichlet([2.0] * 4, 3)
    w = np.array([[1.0, 0.7], [0.2, 0.8], [0.5, 0.4], [0.3, -0.2]])
    wrong = linear.widened(w, 0.7, 1.2, 0.2), random.standard_normal((20, 4))
    line = np.linspace(-2.5, 2.5, 200)
    return (
        linear.linear_vae(images, 2, labels),
        linear.gaussian_channel(2, 0.25, 100),
        structured.code("random code, 3 x 4", table, prior),
        linear.linear("wrong guide, 2 in 4", *wrong, estimators=get_args(EstimatorName)),
        structured.mixture_prior(np.array([0.4, 0.6]), np.array([-1.5, 1.0]), 0.6, 0.7, line, 0.6, 0.8),
        structured.hierarchy(np.array([0.9, -0.4]), 0.8, 0.6, 0.7, 1.3, 400),
    )


# ---------------------------------------------------------------------- the test models


ALLOWED_ERRORS = 4.0
"""Largest error of an estimate that passes, in standard errors."""
CHANCE_FAILURE = 6.3e-5
"""Probability that a normally distributed estimate is off by more than `ALLOWED_ERRORS` standard errors."""
ROUNDING_TOLERANCE = 1e-6
"""Allowance for rounding, relative to the larger of the exact value and one nat; all test models are float64."""
CHECK_COLUMNS = ("truth", "figure", "exact", "estimate", "std error", "bias / s.e.", "verdict")
BOUND_SLACK = 0.05
"""Slack, nats, for bounds that are not tight: of AIS with few temperatures, and of guides refined in few steps."""


class FigureCheck(Record):
    """Comparison of one estimate with the exactly known value of the same quantity."""

    truth: str
    """Name of the test model."""
    estimator: str
    """Name of the estimator."""
    figure: str
    """Name of the quantity in the result of the estimator."""
    exact: float
    """Exact value, nats per datum."""
    estimate: Estimate
    """Estimate of the same quantity, nats per datum."""
    below: float = 0.0
    """Slack, nats, by which the estimate may be too low (as a lower bound may), in addition to noise and rounding."""
    above: float = 0.0
    """Slack, nats, by which the estimate may be too high (as an upper bound may), in addition to noise and rounding."""

    @property
    def error(self) -> float:
        """Error of the estimate, estimate - exact, nats."""
        return self.estimate.value - self.exact

    @property
    def tolerance(self) -> float:
        """Allowance for rounding errors, nats."""
        return ROUNDING_TOLERANCE * max(1.0, abs(self.exact))

    @property
    def bias(self) -> float | None:
        """Error in units of the standard error; None if the standard error is no larger than the rounding allowance."""
        claimed = self.estimate.standard_error
        return self.error / claimed if claimed > self.tolerance else None

    @property
    def verdict(self) -> Literal["ok", "too low", "too high", "not finite"]:
        """Verdict on the estimate: "ok" if noise, rounding and the slack of a bound explain its error."""
        spread = ALLOWED_ERRORS * self.estimate.standard_error + self.tolerance
        if not math.isfinite(self.error) or not math.isfinite(spread):
            return "not finite"
        if self.error < -spread - self.below:
            return "too low"
        return "too high" if self.error > spread + self.above else "ok"

    @property
    def ok(self) -> bool:
        """True if the comparison passes."""
        return self.verdict == "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain numbers and strings, for JSON; an infinite slack is None."""
        named = {name: getattr(self, name) for name in ("truth", "estimator", "figure", "exact")}
        estimate = {f"estimate_{name}": value for name, value in self.estimate.to_dict().items()}
        found = {name: getattr(self, name) for name in ("error", "bias", "below", "above", "verdict")}
        return {**named, **estimate, **plain(found)}

    def cells(self) -> tuple[str, ...]:
        """Return the comparison as a table row of text, in the order of `CHECK_COLUMNS`."""
        bias = f"{self.error:.0e} nats" if self.bias is None else f"{self.bias:+.2f}"
        error = f"{self.estimate.standard_error:.4f}" if self.bias is not None else ""
        numbers = (f"{self.exact:.4f}", f"{self.estimate.value:.4f}", error, bias)
        return (self.truth, f"{self.estimator}.{self.figure}", *numbers, self.verdict)


class SelfCheck(Record, repr=False):
    """Comparisons of this installation's estimates with exactly known values; the result of `selfcheck`."""

    device: str
    """Device that the estimators ran on."""
    seed: int
    """Seed of the samples."""
    checks: tuple[FigureCheck, ...]
    """Comparisons of all estimates with their exact values."""

    @property
    def failed(self) -> tuple[FigureCheck, ...]:
        """Comparisons that do not pass."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def ok(self) -> bool:
        """True if all comparisons pass."""
        return not self.failed

    @property
    def failure_rate(self) -> float:
        """Upper bound on the probability that correct estimators fail with a new seed: a sum over noisy estimates."""
        return CHANCE_FAILURE * sum(check.bias is not None for check in self.checks)

    @property
    def title(self) -> str:
        """Title of the table of comparisons."""
        return f"estimators against exact figures, nats per datum ({self.device}, seed {self.seed})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences below the table: number of passed comparisons, rule for passing, and rate of failures by chance."""
        return texts("selfcheck.remarks", found=self, errors=ALLOWED_ERRORS, rounding=ROUNDING_TOLERANCE)

    def summary(self) -> str:
        """Return the outcome of the self-check in one sentence, with advice if a comparison fails."""
        return text("selfcheck.summary", found=self, rate=max(self.failure_rate, CHANCE_FAILURE))

    def to_dict(self) -> dict[str, Any]:
        """Return all comparisons and their summary as plain numbers and strings, for JSON."""
        found = {name: getattr(self, name) for name in ("device", "seed", "ok", "failure_rate")}
        checks = [check.to_dict() for check in self.checks]
        return {"unit": "nats per datum", **found, "failed": len(self.failed), "checks": checks}

    def __rich__(self) -> Table:
        table = Table(title=Text(self.title), caption=Text("\n".join(self.remarks)), caption_justify="left")
        for column in CHECK_COLUMNS:
            table.add_column(column, justify="left" if column in ("truth", "figure", "verdict") else "right")
        for truth, checks in groupby(self.checks, lambda check: check.truth):
            for i, check in enumerate(checks):
                cells = ("" if i else truth, *check.cells()[1:])
                table.add_row(*map(Text, cells), style="" if check.ok else "bold red")
        return table

    def __str__(self) -> str:
        rows = [CHECK_COLUMNS, *(check.cells() for check in self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, *self.remarks])

    __repr__ = __str__


# ---------------------------------------------------------------------- the estimators


class Found(NamedTuple):
    """One estimate of an estimator, and what it is compared with."""

    figure: str
    """Name of the quantity in the result of the estimator."""
    estimate: Estimate | None
    """Its estimate; None if there is none, and nothing to compare."""
    known: str | float | None = ""
    """Exact value, or its name among those of the test model; default: the same name; None if it is unknown."""
    below: float = 0.0
    """Nats that the estimate may be too low as a lower bound."""
    above: float = 0.0
    """Nats that the estimate may be too high as an upper bound."""


def _surgery(truth: Truth, seed: int) -> Iterator[Found]:
    found = surgery(truth.pair, truth.x, truth.samples, seed, labels=truth.labels, population=None)
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
    found = evidence.evidence(truth.pair, truth.x, truth.draws, seed)
    yield Found("elbo", found.elbo)
    for k, bound in found.curve[1:]:
        yield Found(f"iwae_{k}", bound)
    yield _last(found)


def _prior_evidence(truth: Truth, seed: int) -> Iterator[Found]:
    found = evidence.prior_evidence(truth.pair, truth.x, 8 * truth.draws, seed)
    yield Found("jensen", found.jensen, "prior_jensen")
    yield _last(found)


def _last(found: weights.Bounds) -> Found:
    k, bound = found.curve[-1]
    return Found(f"{found.names[1]}_{k}", bound, "log_evidence", below=_lacking(found.ess, found.samples))


def _lacking(ess: Tensor, samples: int) -> float:
    """Return a slack for the log of a mean of importance weights, nats, averaged over data: twice its first-order bias.

    The bias is half the squared coefficient of variation of the weights, divided by their number.
    """
    return float((1 / ess - 1 / samples).mean())


def _ais(truth: Truth, seed: int) -> Iterator[Found]:
    x = truth.x[:20]  # the slowest estimator
    found = ais.ais(truth.pair, x, temperatures=12, chains=64, leapfrog=4, seed=seed)
    yield Found("lower", found.lower, truth.mean_log_p(x), below=_lacking(found.ess, found.chains))


def _bracket(truth: Truth, seed: int) -> Iterator[Found]:
    found = ais.bracket(truth.pair, truth.x, rows=60, temperatures=30, chains=16, leapfrog=4, seed=seed)
    exact = truth.mean_log_p(found.x)
    yield Found("lower", found.lower, exact, below=BOUND_SLACK)
    yield Found("upper", found.upper, exact, above=BOUND_SLACK)


def _gap(truth: Truth, seed: int) -> Iterator[Found]:
    found = gap.gap(truth.pair, truth.x, steps=150, samples=400, evidence_samples=2000, seed=seed)
    yield Found("log_p", found.log_p, "log_evidence", below=BOUND_SLACK)
    yield Found("elbo", found.elbo)
    yield Found("inference", found.inference, "inference_gap", below=BOUND_SLACK)
    yield Found("amortisation", found.amortisation, "amortisation_gap", below=BOUND_SLACK)
    yield Found("approximation", found.approximation, "approximation_gap", below=BOUND_SLACK, above=BOUND_SLACK)


ESTIMATORS = {f.__name__[1:]: f for f in (_surgery, _evidence, _prior_evidence, _ais, _bracket, _gap)}


def selfcheck(
    device: str = "cpu", seed: int = 0, *, truths: Sequence[Truth] | None = None, on_progress: StageProgress = silent
) -> SelfCheck:
    r"""Run every estimator on test models whose quantities are known exactly, and compare.

    An estimate passes within 4 standard errors and 1e-6 for rounding. A bound may differ more on its own side, by a
    stated slack: the log of mean importance weights by twice its first-order bias, bounds of annealing and of optimised
    posteriors by 0.05 nats, the information of finite data by any amount. Exact results may differ by rounding only.

    Warning: correct estimators fail with probability `SelfCheck.failure_rate`, once in about two hundred seeds. The
    same seed gives the same numbers on the same machine.

    Arguments:
        device: "cpu" or "cuda[:i]".
        seed: seed of the samples.
        truths: the test models; default: `pvae.analysis.truths.selfcheck.standard()`.
        on_progress: called with (estimators run, estimators to run, name of the test model).

    Returns:
        SelfCheck, nats per datum; `ok` if all estimates agree with their exact values.

    Raises:
        DataError: there are no test models.

    Example:
        >>> from pvae.analysis.truths.linear import gaussian_channel
        >>> selfcheck(truths=[gaussian_channel(1, 0.25, 50)]).ok
        True
    """
    chosen = standard() if truths is None else tuple(truths)
    refuse(not chosen, "selfcheck: expected at least one truth; got none. Pass truths=None for the standard ones.")
    total, done, checks = sum(len(truth.estimators) for truth in chosen), 0, list[FigureCheck]()
    with threads.threads(1):
        for truth in (truth.to(device) for truth in chosen):
            for estimator in truth.estimators:
                for figure, estimate, known, *slack in ESTIMATORS[estimator](truth, seed):
                    exact = truth.exact.get(known or figure) if isinstance(known, str) else known
                    if exact is not None and estimate is not None:
                        checks.append(FigureCheck(truth.name, estimator, figure, exact, estimate, *slack))
                done += 1
                on_progress(done, total, truth.name)
    return SelfCheck(str(device), seed, tuple(checks))
