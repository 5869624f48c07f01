"""Log densities that an ELBO surgery needs, collected from one sample of the latents after another."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior, Information, choose, grid_error, marginal_log_prob
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.codes import JointCodes, joint_codes
from pvae.analysis.decompose.posterior_draws import Draw, LatentDraw, draw_chunk
from pvae.analysis.figures.estimate import Estimate, Kind, misdeclared, over_draws, over_whole_draws
from pvae.distributions import CertainCodes, Codes, Normals, product
from pvae.pair import Dependencies, Pair
from pvae.util import seeds

GUIDE_ROWS = 512
"""Number of samples scored under q_agg where every pair of a sample and a row needs a run of the guide."""
GUIDE_PAIRS = 2**22
"""Largest number of pairs of a sample and a row that the guide scores; with more than `GUIDE_PAIRS / GUIDE_ROWS` rows,
the components of q_agg are a random subset of them."""
MULTIPLICATIONS = 2e12
"""Largest number of multiplications in scoring samples under all components of q_agg; above it, only a random subset of
the samples is scored."""


UNSEEN_PAIRS = 3
"""Upper limit, at a level of 95 %, of the mean of a Poisson count that was found to be 0."""


@dataclass
class Scored:
    """Pointwise mutual information, log q(z | x) - log q_agg(z), of a group of latents: `(m,)` for each sample."""

    mixture: AggregatedPosterior
    rows: Tensor
    """Indices of the rows whose samples are scored, `(m,)`."""
    once: bool = False
    """True if only the first sample of the data is scored."""
    lower: list[Tensor] = field(default_factory=list)
    upper: list[Tensor] = field(default_factory=list)
    leave_one_out: list[Tensor] = field(default_factory=list)
    left_out: list[Information] = field(default_factory=list)
    """Sums over the samples of the same terms with one group of components after another left out."""

    @property
    def whole(self) -> bool:
        """True if every row is a component of q_agg."""
        return len(self.mixture) == self.mixture.total

    def take(self, d: Draw, names: Sequence[str]) -> None:
        """Score one sample of the latents `names` under q_agg, and append the terms."""
        if self.once and self.upper:
            return
        own = torch.stack([d.latents[name].log_q[self.rows] for name in names]).sum(0)
        found = self.mixture.information(d.flat(names)[self.rows], self.rows, own)
        for term in ("lower", "upper", "leave_one_out"):
            getattr(self, term).append(getattr(found, term))
        if found.left_out is not None:
            self.left_out = [found.left_out if not self.left_out else self.left_out[0].plus(found.left_out)]

    def with_components(
        self, figure: Estimate, term: str, rest: Tensor | None = None, mine: Tensor | None = None
    ) -> Estimate:
        """Return the mean of one of the terms (or `rest` minus that term) with the error that the components add.

        The choice of a subset of M of n components is Monte Carlo noise that all m scored samples share: it does not
        average over them. Its error is that of the jackknife over groups of components, to which a floor is added:
        where few samples lie near any component, M components may show no such pair. One pair moves a bounded term by
        at most log(1 + (n - 1) / M) / m, and of a Poisson count that was seen as 0 up to 3 may be there at a level of
        95 %, so that the floor is sqrt(3) of these. Leave-one-out terms have no bound, and no floor. With 10 components
        the error is on average 1 to 1.7 times the spread over subsets, more where the floor decides it.

        If all rows are components they are so in another data set as well.

        Arguments:
            figure: the mean over the scored samples, with the errors of independent terms.
            term: "lower", "upper" or "leave_one_out".
            rest: terms by row that it is subtracted from, `(m,)`.
            mine: mask of the scored rows that the mean is taken over, `(m,)`; default: all.
        """
        if not self.left_out:
            return figure
        terms = getattr(self.left_out[0], term) / len(self.upper)
        terms = terms if rest is None else rest - terms
        kept = torch.ones_like(terms, dtype=torch.bool) if mine is None else mine.expand_as(terms)
        groups = self.mixture.components.groups
        if self.whole:  # another data set lacks these rows and their posteriors
            kept = kept & (groups.of[self.rows] != torch.arange(groups.count, device=kept.device)[:, None])
        error = self.mixture.error((terms * kept).sum(1) / kept.sum(1))
        if self.whole:
            return replace(figure, data_error=None if figure.data_error is None or math.isnan(error) else error)
        if (data_error := figure.data_error) is not None:
            share = len(self.mixture) / self.mixture.total
            data_error = math.hypot(data_error, error * math.sqrt(share / (1 - share)))
        if term != "leave_one_out":
            largest = math.log1p((self.mixture.total - 1) / len(self.mixture)) / kept[0].sum().item()
            error = math.hypot(error, math.sqrt(UNSEEN_PAIRS) * largest)
        return replace(figure, standard_error=math.hypot(figure.standard_error, error), data_error=data_error)


@dataclass
class LevelTerms:
    """Log densities and closed-form KLs of one latent, with one entry per sample of the data."""

    log_q: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    closed: list[Tensor] = field(default_factory=list)
    kl_per_dimension: list[Tensor] = field(default_factory=list)
    aggregated: list[Tensor] = field(default_factory=list)
    """Sum over coordinates of the log aggregated posterior, sum_d log q_agg(z_d), `(n,)`."""
    information: list[Tensor] = field(default_factory=list)
    """Mutual information of every coordinate: mean over rows of log q(z_d | x) - log q_agg(z_d), `(D,)`."""
    marginal: list[Tensor] = field(default_factory=list)
    """Marginal KL of every coordinate: mean over rows of log q_agg(z_d) - log p(z_d), `(D,)`."""
    grid_error: float | None = None

    def take(self, latent: LatentDraw) -> None:
        """Append the log densities of one sample of this latent."""
        self.log_q.append(latent.log_q)
        self.log_p.append(latent.log_p)
        self.closed += [] if latent.kl is None else [latent.kl]
        self.kl_per_dimension += [] if (kl := latent.coordinate_kl) is None else [kl.mean(0)]

    def take_coordinates(self, latent: LatentDraw, q: Normals, factorised: bool) -> None:
        """Score a sample of a latent with normal posteriors `q` under the aggregated posterior of every coordinate."""
        aggregated = marginal_log_prob(q.loc, q.scale, latent.value)
        if self.grid_error is None:
            self.grid_error = grid_error(q.loc, q.scale, latent.value, aggregated)
        own = torch.distributions.Normal(q.loc, q.scale).log_prob(latent.value)
        self.aggregated.append(aggregated.sum(1))
        self.information.append((own - aggregated).mean(0))
        if factorised and isinstance(latent.p, Normals):
            prior = torch.distributions.Normal(latent.p.loc, latent.p.scale).log_prob(latent.value)
            self.marginal.append((aggregated - prior).mean(0))


class Account:
    """Log densities, by row and sample, from which the terms of an ELBO surgery are computed.

    Arguments:
        pair: the pair.
        x: data `(n, *event)`.
        first: the first sample of the latents of all rows.
        found: dependencies between the latents, in guide and model.
        seed: seed of the random choice of rows and components.
        components: number of rows, chosen at random, whose posteriors form q_agg; None for as many as time allows.
        memory: bytes that scoring q_agg may take.
        by_row: latents whose prior differs from row to row.
        every: all latents of a draw, also those that no row has; default: those of `first`.
    """

    def __init__(
        self, pair: Pair, x: Tensor, first: Draw, found: Dependencies, seed: int, components: int | None, memory: int,
        by_row: frozenset[str] = frozenset(), every: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.by_row, self.every = by_row, every or frozenset(first.latents)
        self.pair, self.x, self.first = pair, x, first
        self.guide_roots, self.model_roots = found.guide_roots, found.model_roots
        self.seed, self.components, self.memory = seed, components, memory
        self.names = tuple(first.latents)
        self.levels = {name: LevelTerms() for name in self.names}
        self.joint: dict[tuple[str, ...], JointCodes | None] = {}
        self.reconstruction: list[Tensor] = []
        self.shared: list[dict[str, float]] = []
        alone = [(name,) for name in self.names if name in self.guide_roots]
        groups = alone if alone == [self.names] or not self.names else [*alone, self.names]
        self.scored = {group: made for group in groups if (made := self._scored(group)) is not None}

    def _scored(self, names: tuple[str, ...]) -> Scored | None:
        """Choose how a group of latents is scored under its aggregated posterior; None where that is not possible."""
        latents = [self.first.latents[name] for name in names]
        if any(latent.point or latent.partial for latent in latents):
            return None
        known = [latent.q for latent in latents if latent.q is not None]
        roots, in_guide = self.guide_roots.issuperset(names), {*self.pair.layout.latents}.issuperset(names)
        if roots and len(known) == len(names):
            rows, q = choose(len(self.x), self.components, self.seed, self.x.device), product(known)
            mixture = AggregatedPosterior(q if rows is None else q.rows(rows), len(self.x), rows, self.memory)
            return Scored(mixture, self._as_many_as(mixture, latents))
        if roots and in_guide and all(latent.q is not None or latent.tally is not None for latent in latents):
            mixture = self.mixture_of(self.x, names, self.components)  # too many code probabilities to keep
            return Scored(mixture, self._as_many_as(mixture, latents))
        if not in_guide or not self.first.points or self.pair.structure.rows is not None:
            return None  # with random global latents q(z|x) is a mixture over them
        rows = self._some(GUIDE_ROWS)
        return Scored(self.mixture_of(self.x, names, self.components or guide_components(rows)), rows, once=True)

    def mixture_of(self, x: Tensor, names: tuple[str, ...], components: int | None) -> AggregatedPosterior:
        """Return the aggregated posterior of the latents `names` over `components` random rows of `x` (None: all)."""
        how: dict[str, Any] = {"components": components, "seed": self.seed, "memory": self.memory}
        return AggregatedPosterior.of(self.pair, x, latents=names, **how)

    def _as_many_as(self, mixture: AggregatedPosterior, latents: Sequence[LatentDraw]) -> Tensor:
        """Return indices of random rows whose samples are scored, as many as `MULTIPLICATIONS` allows."""
        return self._some(int(MULTIPLICATIONS / (len(mixture) * sum(latent.work for latent in latents))))

    def _some(self, most: int) -> Tensor:
        return seeds.subset(len(self.x), most, seeds.mix(self.seed, seeds.ANALYSIS, 1)).to(self.x.device)

    def take(self, d: Draw) -> None:
        """Score one sample of the latents of all rows, and append its log densities."""
        misdeclared(d is not self.first and d.latents.keys() != self.every, "refused.changing_latents", of=self, draw=d)
        self.reconstruction.append(d.reconstruction)
        self.shared.append(d.shared)
        for name in self.names:
            latent = d.latents[name]
            self.levels[name].take(latent)
            if name in self.guide_roots and latent.normal is not None and latent.value.shape[1] > 1:
                self.levels[name].take_coordinates(latent, latent.normal, name in self.model_roots - self.by_row)
        for names, scored in self.scored.items():
            scored.take(d, names)

    def kl(self, names: Collection[str]) -> Tensor:
        """Return log q - log p of a group of latents for every sample and row, `(samples, n)`, nats."""
        if not (levels := [self.levels[name] for name in names]):  # global latents only
            return torch.zeros_like(torch.stack(self.reconstruction))
        return torch.stack([torch.stack(v.log_q) - torch.stack(v.log_p) for v in levels]).sum(0)

    @property
    def certain(self) -> bool:
        """True if all latents are discrete codes that x determines, so that one sample suffices."""
        latents = self.first.latents.values()
        return all(z.certain for z in latents) and self.guide_roots.issuperset(self.names) and self.first.points

    def kl_terms(self) -> Tensor:
        """Return the KL of all latents per row, nats: `(n,)` if it is exact (discrete latents), else `(samples, n)`."""
        joint = self.joint_codes(self.names)
        return self.kl(self.names) if joint is None else joint.kl

    def shares(self) -> Tensor:
        """Return the KL of the global latents for every sample, divided by n, `(samples, 1)`, nats per datum."""
        shares = [[sum(d.values()) / self.first.size] for d in self.shared]
        return torch.tensor(shares, dtype=torch.float64, device=self.x.device)

    def over(self, terms: Tensor, kind: Kind = "estimate") -> Estimate:
        """Return the mean of terms `(samples, rows)`; the error allows for global latents shared by all rows."""
        return over_draws(terms, kind, len(self.x)) if self.first.points else over_whole_draws(terms, kind)

    def joint_codes(self, names: tuple[str, ...]) -> JointCodes | None:
        """Return the exact KL and information of every row for a group of discrete latents; None for other latents.

        They are sums over all joint states, or counts of rows with the same code if x determines the codes. None also
        for posteriors that depend on other latents, and for too many joint states.
        """
        if names not in self.joint:
            self.joint[names] = self._made_joint(names)
        return self.joint[names]

    def _made_joint(self, names: tuple[str, ...]) -> JointCodes | None:
        latents = [self.first.latents[name] for name in names]
        if not names or not self.guide_roots.issuperset(names) or any(latent.partial for latent in latents):
            return None
        if all(latent.certain for latent in latents):
            q = product([latent.q for latent in latents if latent.q is not None])
            aggregated = AggregatedPosterior(q, memory=self.memory).log_prob(self.first.flat(names))
            return JointCodes(self.kl(names)[0], -aggregated)
        known = [latent.prior for latent in latents if latent.prior is not None]
        if len(known) < len(latents) or not self.model_roots.issuperset(names):
            return None
        return joint_codes(lambda: self._posteriors(names), known)

    def _posteriors(self, names: tuple[str, ...]) -> Iterator[list[Codes]]:
        """Yield the posteriors of several discrete latents by batches of rows, kept or from rerunning the guide."""
        kept = [self.first.latents[name].q for name in names]
        if None not in kept:
            yield [_as_codes(q) for q in kept]
            return
        with quiet(self.pair, self.x, 0):
            for part in self.x.split(self.pair.structure.rows_at_once()):
                found = draw_chunk(self.pair, part, len(self.x)).latents
                yield [_as_codes(found[name].q) for name in names]


def guide_components(rows: Tensor) -> int:
    """Return the number of components of q_agg under which the guide may score one sample of each of `rows`."""
    return max(2, GUIDE_PAIRS // len(rows))


def _as_codes(q: Any) -> Codes:
    """Return the posterior of a discrete latent as probabilities; a deterministic code has probability one."""
    return q.codes() if isinstance(q, CertainCodes) else q
