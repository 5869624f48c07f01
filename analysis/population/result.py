"""Result of the population's interval: what a better prior can win on new data, and the information of the codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pvae.analysis.figures.estimate import Estimate, Figures, Row


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

    n: int
    gain: Estimate
    """Lower bound of M: E[log r(z) - log p(z)] of a prior r that does not know the rows it is scored on."""
    gain_upper: Estimate | None
    """Upper bound of M, the least of KL - I_n and KL - I_pairs; None where there is none below the KL."""
    information: Estimate | None
    """Lower bound of I_pi, the largest of I_n and I_pairs."""
    information_upper: Estimate
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
    midpoint: Estimate | None = None
    """Estimate of I_pi, the middle of I_n and leave-one-out; None where they are 0.3 nats apart or more."""
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"On new data, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        yield "population_gain", self.gain, f"at least this is won by {self.prior}"
        yield "population_gain_upper", self.gain_upper, "no prior wins more, if codes of new rows overlap as these do"
        yield "population_information", self.information, "I_pi[x, z] from below"
        yield "population_information_upper", self.information_upper, "I_pi[x, z] from above"
        yield "population_midpoint", self.midpoint, "I_pi[x, z], where n rows can tell"
