"""Results of annealed importance sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from pvae.analysis.bounds.targets import Start
from pvae.analysis.figures.estimate import Estimate, Figures, Row, finite


@dataclass(frozen=True, repr=False)
class _Annealing(Figures):
    """Base class of results of annealing: settings, lower bound on log p(x), and acceptance of the transitions."""

    counts = ("n", "temperatures", "chains", "leapfrog", "start")

    n: int
    """Number of data."""
    temperatures: int
    """Number of temperatures T."""
    chains: int
    """Number of chains per datum."""
    leapfrog: int
    """Number of leapfrog steps per Hamiltonian Monte Carlo transition."""
    start: Start
    """Distribution the chains start from: "guide" or "prior"."""
    lower: Estimate
    """Lower bound, in expectation, of the mean log p(x), nats per datum."""
    acceptance: Tensor
    """Mean acceptance of the (forward) transitions of every datum, `(n,)`; NaN with one temperature."""

    @property
    def accepted(self) -> str:
        """Sentence part with the mean acceptance of the transitions, or that there are none."""
        mean = float(self.acceptance.mean())
        return "no transitions" if math.isnan(mean) else f"mean acceptance {mean:.2f}"

    def to_dict(self) -> dict[str, Any]:
        acceptance = finite(self.acceptance.mean())
        return {"unit": "nats per datum", **self.facts(), "figures": self.figures(), "acceptance": acceptance}


@final
@dataclass(frozen=True, repr=False)
class Annealed(_Annealing):
    """Lower bound on the mean log p(x) by annealed importance sampling, nats per datum; the result of `ais`."""

    log_p: Tensor
    """Log of the mean weight of every datum, nats, `(n,)`, float64 on the CPU."""
    log_weights: Tensor
    """Log importance weight of every chain and datum, `(chains, n)`."""
    ess: Tensor
    """Effective sample size of the chains' weights of every datum, `(n,)`, at most `chains`."""

    @property
    def title(self) -> str:
        return f"annealed importance sampling, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        how = f"{self.chains} chains from the {self.start}, {self.temperatures} temperatures"
        yield f"ais_{self.temperatures}", self.lower, f"lower bound on log p(x), {how}"

    @property
    def remarks(self) -> tuple[str, ...]:
        return (f"{self.accepted}; effective chains {self.ess.median():.1f} of {self.chains} (median)",)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "ess_median": float(self.ess.median()), "ess_min": float(self.ess.min())}


@final
@dataclass(frozen=True, repr=False)
class Bracket(_Annealing):
    """Lower and upper bound on the mean log p(x) of simulated data, nats per datum; the result of `bracket`."""

    upper: Estimate
    """Upper bound in expectation, from annealing back from exact posterior samples."""
    width: Estimate
    """Width of the bracket, upper - lower: in expectation at least the bias of the lower bound."""
    x: Tensor
    """Simulated data, `(n, *event)`."""
    lower_per_datum: Tensor
    """Lower bound of every datum, nats, `(n,)`, float64 on the CPU."""
    upper_per_datum: Tensor
    """Upper bound of every datum, nats, `(n,)`."""

    @property
    def title(self) -> str:
        return f"bidirectional Monte Carlo on simulated data, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        how = f"{self.chains} chains, {self.temperatures} temperatures"
        yield "lower", self.lower, f"lower bound on log p(x): annealed from the {self.start}, {how}"
        yield "upper", self.upper, f"upper bound on log p(x): annealed back from exact posterior samples, {how}"
        yield "width", self.width, "upper - lower: on average at least the bias of the lower bound"

    @property
    def remarks(self) -> tuple[str, ...]:
        return (self.accepted,)
