"""Result of the population's interval: what a better prior can win on new data, and the information of the codes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pvae.analysis.figures.estimate import Estimate, Figures
from pvae.util.files import plain

ON_NEW_DATA = "on new data"
"""Words that a remark on a missing interval contains."""
FLAT = 0.1
"""Slope of I_n in log n above which n rows cannot tell I_pi, and nothing is extrapolated."""
HALF = 0.5
"""Share of the pairs bound below which its guard decides it, and above which a single row does."""


@dataclass(frozen=True)
class SubsetInformation:
    """Mutual information from a nested subset of the rows, nats: the law in n."""

    n: int
    information: Estimate
    """I_n = E[log q(z|x) - log q_agg(z)] with the own posterior among the n components: at most log n."""
    leave_one_out: Estimate | None
    """The same without the own posterior: an upper bound of I_pi in expectation."""


@dataclass(frozen=True, repr=False)
class Population(Figures):
    """Interval for M = KL(q_pi || p), what a better prior can win on new data with this encoder; nats per datum.

    q_pi(z) = E_pi q(z | x) is the aggregated posterior under the distribution pi that the rows were drawn from, and
    I_pi = E log q(z | x) - log q_pi(z) the mutual information under it. E KL(q(z | x) || p) = I_pi + M.
    """

    heading = "On new data, nats per datum (n = {0.n})"

    n: int
    gain: Annotated[Estimate, "new_gain", "new data: a better prior wins at least this"]
    """Lower bound of M: E[log r(z) - log p(z)] of a prior r that does not know the rows it is scored on."""
    gain_upper: Annotated[Estimate | None, "new_gain_upper", "and at most this, if new codes overlap as these do"]
    """Upper bound of M, the least of KL - I_n and KL - I_pairs; None where there is none below the KL."""
    information: Annotated[Estimate | None, "new_information", "I_pi[x, z] of new data, from below"]
    """Lower bound of I_pi, the largest of I_n and I_pairs."""
    information_upper: Annotated[Estimate, "new_information_upper", "I_pi[x, z] of new data, from above"]
    """Upper bound of I_pi: E[log q(z | x) - log r(z)]."""
    prior: str
    """The prior r in words, such as "kernels on the other rows, widened by 0.2, mixed with a normal"."""
    seen: float | None = None
    """Share of the pairs bound that comes from the pairs themselves, m / (m + g); below one half the upper end is that
    of the guard, not of the data. None without a pairs bound."""
    largest: float | None = None
    """Largest share of one row in m."""
    sizes: tuple[SubsetInformation, ...] = ()
    """The law in n, from small subsets to all rows."""
    slope: float | None = None
    """Slope of I_n in log n between the two largest sizes; above 0.1 nothing is extrapolated."""
    midpoint: Annotated[Estimate | None, "new_midpoint", "the same, where these rows can tell it"] = None
    """Estimate of I_pi, the middle of I_n and leave-one-out; None where they are 0.3 nats apart or more."""
    notes: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[float, float | None]:
        """Interval for M of a level of about 95 %: both bounds, each widened by two of its standard errors; nats."""
        low = max(self.gain.value - 2 * self.gain.standard_error, 0.0)
        if self.gain_upper is None:
            return low, None
        return low, max(self.gain_upper.value + 2 * self.gain_upper.standard_error, low)

    @property
    def interval(self) -> str:
        """The interval `ends` in words, "1.98 to 4.10"; "at least 1.98" without an upper end."""
        low, high = self.ends
        return f"at least {_number(low)}" if high is None else f"{_number(low)} to {_number(high)}"

    def sentence(self, known: Estimate | None = None) -> str:
        """Return the interval in words, beside `known`, the marginal KL on these rows alone, nats, if it is given."""
        if self.gain.value > 0:
            low = f"{_said(self.gain)} nats with this encoder (a stated prior does it: {self.prior})"
        else:
            low = f"0 nats with this encoder (the stated prior does not win, {_said(self.gain)}: {self.prior})"
        if self.gain_upper is None:
            high = "; no upper bound below the KL is known"
        else:
            high = (
                f", at most {_said(self.gain_upper)} (assuming codes of new rows overlap as those of these rows do; "
                f"without it no figure below KL - 2 log n can be given)"
            )
        said = f"On new data a better prior wins at least {low}{high}."
        return said if known is None else f"{said} {self._knowing(known)}"

    def _knowing(self, known: Estimate) -> str:
        """Return a sentence on the marginal KL on these rows alone, and on how much of it is knowing the rows."""
        said = f"On these {self.n} rows alone a prior that knows them would win {_number(known.value)}"
        above, error = self.gain_upper, known.standard_error
        if above is None or above.value + 2 * math.hypot(above.standard_error, error) >= known.value:
            return f"{said}."
        most = self.gain.value + above.value < known.value
        return f"{said}; {'most' if most else 'part'} of that is knowing the rows."

    @property
    def remarks(self) -> tuple[str, ...]:
        return (*self._size(), *self._pairs(), *self.notes)

    def _size(self) -> Iterator[str]:
        """Yield the sentence on the law in n: these rows can tell I_pi, or more of them would be needed."""
        if self.slope is not None and self.slope > FLAT:
            yield (
                f"I_n still grows by {self.slope:.2f} nats where log n grows by 1: {self.n} rows cannot tell the "
                f"information of new data, I_pi, and nothing is extrapolated. No bound that holds for every "
                f"distribution sees beyond about 2 log n = {2 * math.log(self.n):.1f} nats."
            )
        elif self.midpoint is not None:
            said = f"{self.n} rows tell the information of new data, I_pi: {_said(self.midpoint)} nats"
            yield f"{said}, midway between I_n and leave-one-out."

    def _pairs(self) -> Iterator[str]:
        if self.seen is not None and self.seen < HALF:
            yield (
                f"Only {100 * self.seen:.0f} % of the pairs bound come from pairs of rows, the rest from its guard: "
                f"the upper end may be loose."
            )
        if self.largest is not None and self.largest > HALF:
            yield f"One row alone gives {100 * self.largest:.0f} % of the pairs bound: the upper end is uncertain."

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers and strings for JSON; `sizes` is a list of the figures of each subset."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


def _number(value: float, digits: int = 2) -> str:
    """Return a number with `digits` decimal places, or 0."""
    return f"{value:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else "0"


def _said(e: Estimate) -> str:
    """Return an estimate with its error, as `2.04 +- 0.03`; with three decimal places where it is below 0.005."""
    digits = 2 if e.standard_error >= 0.005 else 3
    return f"{_number(e.value, digits)} +- {_number(e.standard_error, digits)}"
