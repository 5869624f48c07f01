"""Comparisons of estimates with exactly known figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from pvae.analysis.figures.estimate import Estimate, finite

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "too low", "too high", "not finite"]
ALLOWED_ERRORS = 4.0
"""Largest error of an estimate that passes, in standard errors."""
CHANCE_FAILURE = 6.3e-5
"""Probability that a normal estimate exceeds it."""
ROUNDING_TOLERANCE = 1e-6
"""Allowance for rounding, relative to the larger of the figure and one nat; all truths are float64."""
CHECK_COLUMNS = ("truth", "figure", "exact", "estimate", "std error", "bias / s.e.", "verdict")


@final
@dataclass(frozen=True)
class FigureCheck:
    """An exactly known figure and its estimate."""

    truth: str
    """Name of the truth."""
    estimator: str
    """Name of the estimator."""
    figure: str
    """Name of the figure in the estimator's result."""
    exact: float
    """Exact value, nats per datum."""
    estimate: Estimate
    below: float = 0.0
    """Nats that the estimate may lie below the exact value in addition to its error, as a bound may."""
    above: float = 0.0
    """Nats that the estimate may lie above the exact value in addition to its error."""

    @property
    def error(self) -> float:
        """estimate - exact, nats."""
        return self.estimate.value - self.exact

    @property
    def tolerance(self) -> float:
        """Error that rounding may cause, nats."""
        return ROUNDING_TOLERANCE * max(1.0, abs(self.exact))

    @property
    def bias(self) -> float | None:
        """Error in units of the standard error; None where the standard error is negligible."""
        claimed = self.estimate.standard_error
        return self.error / claimed if claimed > self.tolerance else None

    @property
    def verdict(self) -> Verdict:
        """Verdict: ok if the error is explained by noise, rounding and the slack of a bound."""
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
        """Plain numbers and strings, for JSON; an unbounded slack is None."""
        return {
            "truth": self.truth,
            "estimator": self.estimator,
            "figure": self.figure,
            "exact": self.exact,
            **{f"estimate_{name}": value for name, value in self.estimate.to_dict().items()},
            "error": finite(self.error),
            "bias": None if self.bias is None else finite(self.bias),
            "below": finite(self.below),
            "above": finite(self.above),
            "verdict": self.verdict,
        }

    def cells(self) -> tuple[str, ...]:
        """Row of a table."""
        bias = f"{self.error:.0e} nats" if self.bias is None else f"{self.bias:+.2f}"
        error = f"{self.estimate.standard_error:.4f}" if self.bias is not None else ""
        numbers = (f"{self.exact:.4f}", f"{self.estimate.value:.4f}", error, bias)
        return (self.truth, f"{self.estimator}.{self.figure}", *numbers, self.verdict)


@final
@dataclass(frozen=True, repr=False)
class SelfCheck:
    """Exactly known figures beside the estimates of this installation; the result of `selfcheck`."""

    device: str
    """Device the estimators ran on."""
    seed: int
    """Seed of the samples."""
    checks: tuple[FigureCheck, ...]
    """All comparisons."""

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
        """Upper bound on the probability that correct estimators fail with a new seed: a sum over all noisy figures."""
        return CHANCE_FAILURE * sum(check.bias is not None for check in self.checks)

    @property
    def title(self) -> str:
        """Title of the table."""
        return f"estimators against exact figures, nats per datum ({self.device}, seed {self.seed})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Number of passed comparisons, the rule, and the rate of failures by chance."""
        passed = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} figures ok"
        rule = f"ok: within {ALLOWED_ERRORS:g} standard errors, {ROUNDING_TOLERANCE:g} for rounding, slack of bounds"
        chance = f"by chance alone one run in {1 / self.failure_rate:.0f} fails" if self.failure_rate else "no noise"
        return (passed, rule, chance)

    def summary(self) -> str:
        """Outcome in one sentence."""
        if self.ok:
            return f"all {len(self.checks)} figures agree with their exact values"
        names = sorted({check.estimator for check in self.failed})
        return (
            f"{len(self.failed)} of {len(self.checks)} figures of {', '.join(names)} disagree with their exact values: "
            f"do not trust these on this device. By chance one run in {1 / max(self.failure_rate, CHANCE_FAILURE):.0f} "
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
        for column in CHECK_COLUMNS:
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
        rows = [CHECK_COLUMNS, *(check.cells() for check in self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, *self.remarks])
