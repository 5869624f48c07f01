"""Comparisons of estimates with exactly known values, and the result of `selfcheck`."""

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
"""Probability that a normally distributed estimate is off by more than `ALLOWED_ERRORS` standard errors."""
ROUNDING_TOLERANCE = 1e-6
"""Allowance for rounding, relative to the larger of the exact value and one nat; all test models are float64."""
CHECK_COLUMNS = ("truth", "figure", "exact", "estimate", "std error", "bias / s.e.", "verdict")


@final
@dataclass(frozen=True)
class FigureCheck:
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
    def verdict(self) -> Verdict:
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
        estimate = {f"estimate_{name}": value for name, value in self.estimate.to_dict().items()}
        numbers = {"error": self.error, "bias": self.bias, "below": self.below, "above": self.above}
        return {
            **{name: getattr(self, name) for name in ("truth", "estimator", "figure", "exact")},
            **estimate,
            **{name: None if number is None else finite(number) for name, number in numbers.items()},
            "verdict": self.verdict,
        }

    def cells(self) -> tuple[str, ...]:
        """Return the comparison as a table row of text, in the order of `CHECK_COLUMNS`."""
        bias = f"{self.error:.0e} nats" if self.bias is None else f"{self.bias:+.2f}"
        error = f"{self.estimate.standard_error:.4f}" if self.bias is not None else ""
        numbers = (f"{self.exact:.4f}", f"{self.estimate.value:.4f}", error, bias)
        return (self.truth, f"{self.estimator}.{self.figure}", *numbers, self.verdict)


@final
@dataclass(frozen=True, repr=False)
class SelfCheck:
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
        passed = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} figures ok"
        rule = f"ok: within {ALLOWED_ERRORS:g} standard errors, {ROUNDING_TOLERANCE:g} for rounding, slack of bounds"
        chance = f"by chance alone one run in {1 / self.failure_rate:.0f} fails" if self.failure_rate else "no noise"
        return (passed, rule, chance)

    def summary(self) -> str:
        """Return the outcome of the self-check in one sentence, with advice if a comparison fails."""
        if self.ok:
            return f"all {len(self.checks)} figures agree with their exact values"
        names = sorted({check.estimator for check in self.failed})
        return (
            f"{len(self.failed)} of {len(self.checks)} figures of {', '.join(names)} disagree with their exact values: "
            f"do not trust these on this device. By chance one run in {1 / max(self.failure_rate, CHANCE_FAILURE):.0f} "
            f"fails; see whether another --seed does too, and report it if so."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all comparisons and their summary as plain numbers and strings, for JSON."""
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
