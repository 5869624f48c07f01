"""Every estimator on every model whose figures are known exactly: does this installation measure what it says?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from pvae.analysis.bounds.ais import ais, bracket
from pvae.analysis.bounds.evidence import Bounds, evidence, prior_evidence
from pvae.analysis.bounds.gap import gap
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.truths.models import Truth, standard
from pvae.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "too low", "too high", "not finite"]
ERRORS = 4.0
"""Standard errors that an estimate may lie off."""
PASSING_BY = 6.3e-5
"""Probability that a normal estimate lies further off."""
TOLERANCE = 1e-6
"""What rounding may add, relative to the larger of the figure and one nat: all truths are float64."""
SLACK = 0.05
"""Nats that annealing with few temperatures, and an optimiser with few steps, may leave on the table."""
ANNEALED = 20
"""Rows that are annealed, the slowest of all."""


# ---------------------------------------------------------------------- results


@final
@dataclass(frozen=True)
class Check:
    """One figure that is known, and what an estimator says of it."""

    truth: str
    estimator: str
    figure: str
    """As the estimator calls it."""
    exact: float
    """nats per datum."""
    estimate: Estimate
    below: float = 0.0
    """Nats that the estimate may lie below the exact figure, beside its error: what a bound may lack."""
    above: float = 0.0
    """The same above."""

    @property
    def error(self) -> float:
        """estimate - exact, nats."""
        return self.estimate.value - self.exact

    @property
    def tolerance(self) -> float:
        """What rounding may do, nats."""
        return TOLERANCE * max(1.0, abs(self.exact))

    @property
    def bias(self) -> float | None:
        """The error in standard errors; None where the estimate has none to speak of."""
        claimed = self.estimate.standard_error
        return self.error / claimed if claimed > self.tolerance else None

    @property
    def verdict(self) -> Verdict:
        """Whether the error is explained by noise, rounding, and what a bound may lack."""
        spread = ERRORS * self.estimate.standard_error + self.tolerance
        if not math.isfinite(self.error) or not math.isfinite(spread):
            return "not finite"
        if self.error < -spread - self.below:
            return "too low"
        return "too high" if self.error > spread + self.above else "ok"

    @property
    def ok(self) -> bool:
        """Whether it passes."""
        return self.verdict == "ok"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; an unbounded slack is None."""
        return {
            "truth": self.truth,
            "estimator": self.estimator,
            "figure": self.figure,
            "exact": self.exact,
            **{f"estimate_{name}": value for name, value in self.estimate.to_dict().items()},
            "error": _plain(self.error),
            "bias": None if self.bias is None else _plain(self.bias),
            "below": _plain(self.below),
            "above": _plain(self.above),
            "verdict": self.verdict,
        }

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        bias = f"{self.error:.0e} nats" if self.bias is None else f"{self.bias:+.2f}"
        error = f"{self.estimate.standard_error:.4f}" if self.bias is not None else ""
        numbers = (f"{self.exact:.4f}", f"{self.estimate.value:.4f}", error, bias)
        return (self.truth, f"{self.estimator}.{self.figure}", *numbers, self.verdict)


def _plain(value: float) -> float | None:
    """A number that JSON knows."""
    return value if math.isfinite(value) else None


@final
@dataclass(frozen=True, repr=False)
class SelfCheck:
    """Known figures beside what the estimators of this installation say of them."""

    device: str
    seed: int
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that do not pass."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def ok(self) -> bool:
        """Whether all pass."""
        return not self.failed

    @property
    def failure_rate(self) -> float:
        """At most how often sound estimators fail with a new seed: the sum over all figures that have noise."""
        return PASSING_BY * sum(check.bias is not None for check in self.checks)

    @property
    def title(self) -> str:
        """What this is."""
        return f"estimators against exact figures, nats per datum ({self.device}, seed {self.seed})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """How many pass, and how often one fails by chance."""
        passed = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} figures ok"
        rule = f"ok: within {ERRORS:g} standard errors, {TOLERANCE:g} for rounding, and what a bound may lack"
        chance = f"by chance alone one run in {1 / self.failure_rate:.0f} fails" if self.failure_rate else "no noise"
        return (passed, rule, chance)

    def summary(self) -> str:
        """The outcome in one sentence."""
        if self.ok:
            return f"all {len(self.checks)} figures agree with their exact values"
        names = sorted({check.estimator for check in self.failed})
        return (
            f"{len(self.failed)} of {len(self.checks)} figures of {', '.join(names)} disagree with their exact values: "
            f"do not trust these on this device. By chance one run in {1 / max(self.failure_rate, PASSING_BY):.0f} "
            f"fails; see whether another --seed does too, and report it if so."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "device": self.device,
            "seed": self.seed,
            "ok": self.ok,
            "failed": len(self.failed),
            "failure_rate": self.failure_rate,
            "checks": [check.to_dict() for check in self.checks],
        }

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), caption=Text("\n".join(self.remarks)), caption_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("truth", "figure", "verdict") else "right")
        last = ""
        for check in self.checks:
            truth, *cells = check.cells()
            style = "" if check.ok else "bold red"
            table.add_row(Text("" if truth == last else truth), *map(Text, cells), style=style)
            last = truth
        return table

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [COLUMNS, *(check.cells() for check in self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, *self.remarks])


COLUMNS = ("truth", "figure", "exact", "estimate", "std error", "bias / s.e.", "verdict")


# ---------------------------------------------------------------------- the estimators, one by one


@final
@dataclass(frozen=True)
class Asked:
    """One estimator asked about one truth."""

    truth: Truth
    estimator: str

    def check(
        self, figure: str, estimate: Estimate | None, known: str = "", *, below: float = 0.0, above: float = 0.0
    ) -> Iterator[Check]:
        """A comparison with the figure `known` (of the same name unless said); none where either is missing."""
        exact = self.truth.exact.get(known or figure)
        if exact is not None and estimate is not None:
            yield Check(self.truth.name, self.estimator, figure, exact, estimate, below, above)


def _surgery(asked: Asked, seed: int) -> Iterator[Check]:
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


def _population(asked: Asked, figure: str, estimate: Estimate | None, **slack: float) -> Iterator[Check]:
    """A figure of finite data as a bound, in expectation over the data, of that under their law."""
    yield from asked.check(figure, _over_data(estimate), "population_mutual_information", **slack)


def _over_data(estimate: Estimate | None) -> Estimate | None:
    if estimate is None:
        return None
    error = math.hypot(estimate.standard_error, estimate.data_error or 0.0)
    return Estimate(estimate.value, error, estimate.kind, estimate.data_error, estimate.note)


def _evidence(asked: Asked, seed: int) -> Iterator[Check]:
    found = evidence(asked.truth.pair, asked.truth.x, asked.truth.draws, seed)
    yield from asked.check("elbo", found.elbo)
    for k, bound in found.curve[1:]:
        yield from asked.check(f"iwae_{k}", bound)
    yield from _last(asked, found)


def _prior_evidence(asked: Asked, seed: int) -> Iterator[Check]:
    found = prior_evidence(asked.truth.pair, asked.truth.x, 8 * asked.truth.draws, seed)
    yield from asked.check("jensen", found.jensen, "prior_jensen")
    yield from _last(asked, found)


def _last(asked: Asked, found: Bounds) -> Iterator[Check]:
    k, bound = found.curve[-1]
    yield from asked.check(f"{found.names[1]}_{k}", bound, "log_evidence", below=_lacking(found.ess, found.samples))


def _lacking(ess: Tensor, samples: int) -> float:
    """Twice what the log of a mean of weights lacks to first order, half their squared variation over their number."""
    return float((1 / ess - 1 / samples).mean())


def _ais(asked: Asked, seed: int) -> Iterator[Check]:
    truth = asked.truth
    if truth.log_p is not None:
        x = truth.x[:ANNEALED]
        found = ais(truth.pair, x, temperatures=12, chains=64, leapfrog=4, seed=seed)
        lacking = _lacking(found.ess, found.chains)
        yield Check(truth.name, asked.estimator, "lower", _log_p(truth, x), found.lower, below=lacking)


def _bracket(asked: Asked, seed: int) -> Iterator[Check]:
    truth = asked.truth
    found = bracket(truth.pair, truth.x, rows=60, temperatures=30, chains=16, leapfrog=4, seed=seed)
    if truth.log_p is not None:
        exact = _log_p(truth, found.x)
        yield Check(truth.name, asked.estimator, "lower", exact, found.lower, below=SLACK)
        yield Check(truth.name, asked.estimator, "upper", exact, found.upper, above=SLACK)


def _log_p(truth: Truth, x: Tensor) -> float:
    """Mean log p(x) of other rows, nats."""
    assert truth.log_p is not None  # noqa: S101 - the callers have looked
    return float(truth.log_p(x.cpu().double().numpy()).mean())


def _gap(asked: Asked, seed: int) -> Iterator[Check]:
    found = gap(asked.truth.pair, asked.truth.x, steps=150, samples=400, evidence_samples=2000, seed=seed)
    yield from asked.check("log_p", found.log_p, "log_evidence", below=SLACK)
    yield from asked.check("elbo", found.elbo)
    yield from asked.check("inference", found.inference, "inference_gap", below=SLACK)
    yield from asked.check("amortisation", found.amortisation, "amortisation_gap", below=SLACK)
    yield from asked.check("approximation", found.approximation, "approximation_gap", below=SLACK, above=SLACK)


ESTIMATORS: Mapping[str, Callable[[Asked, int], Iterator[Check]]] = MappingProxyType(
    {
        "surgery": _surgery,
        "evidence": _evidence,
        "prior_evidence": _prior_evidence,
        "ais": _ais,
        "bracket": _bracket,
        "gap": _gap,
    }
)


# ---------------------------------------------------------------------- all of them


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch: these tensors are small, and on a busy machine threads would mostly wait for each other."""
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
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> SelfCheck:
    r"""Run every estimator on models whose figures are known exactly, and compare.

    An estimate passes within 4 of its standard errors and 1e-6 for rounding. What is a bound of the known figure
    may lie on its side by a stated slack: log-mean weights by their own delta-method bias, annealing and optimised
    posteriors by 0.05 nats, information of finite data by any amount. What claims to be exact has rounding alone.

    Warning: a run of sound estimators fails with the probability `SelfCheck.failure_rate`, once in some hundred
    seeds; the same seed gives the same numbers on the same machine.

    Arguments:
        device: "cpu" or "cuda[:i]".
        seed: of the draws.
        truths: what to measure against; default: `pvae.analysis.truths.models.standard()`.
        on_progress: called with (estimators run, estimators to run, name of the truth).

    Returns:
        SelfCheck; figures in nats per datum, `ok` when all agree.

    Raises:
        DataError: no truths.

    Example:
        >>> from pvae.analysis.truths.models import symmetric_channel
        >>> selfcheck(truths=[symmetric_channel(2, 0.1)]).ok
        True
    """
    chosen = standard() if truths is None else tuple(truths)
    if not chosen:
        raise DataError("selfcheck: expected at least one truth; got none. Pass truths=None for the standard ones.")
    total, done, checks = sum(len(truth.estimators) for truth in chosen), 0, list[Check]()
    with single_thread():
        for truth in chosen:
            moved = truth.to(torch.device(device))
            for estimator in truth.estimators:
                checks += ESTIMATORS[estimator](Asked(moved, estimator), seed)
                done += 1
                on_progress(done, total, truth.name)
    return SelfCheck(str(device), seed, tuple(checks))
