"""Result of the population's interval: what a better prior can win on new data, and the information of the codes."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pvae.analysis.figures.estimate import Estimate, Figures
from pvae.analysis.figures.texts import short, text, texts
from pvae.util.files import plain

ON_NEW_DATA = "on new data"
"""Words that a remark on a missing interval contains."""
FLAT = 0.1
"""Slope of I_n in log n above which n rows cannot tell I_pi, and nothing is extrapolated."""


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
        return f"at least {short(low)}" if high is None else f"{short(low)} to {short(high)}"

    def sentence(self, known: Estimate | None = None) -> str:
        """Return the interval in words, beside `known`, the marginal KL on these rows alone, nats, if it is given."""
        above, knowing = self.gain_upper, ""
        if known is not None and above is not None:
            error = math.hypot(above.standard_error, known.standard_error)
            if not above.value + 2 * error >= known.value:
                knowing = "most" if self.gain.value + above.value < known.value else "part"
        return text("population.sentence", new=self, known=known, knowing=knowing)

    @property
    def remarks(self) -> tuple[str, ...]:
        said = texts("population.remarks", new=self, flat=FLAT, ceiling=2 * math.log(self.n))
        return (*said, *self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers and strings for JSON; `sizes` is a list of the figures of each subset."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}
