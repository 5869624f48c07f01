"""ELBO surgery: where every nat of the ELBO goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.decompose import codes
from pvae.analysis.decompose.aggregated import MEMORY, AggregatedPosterior, Kept, choose
from pvae.analysis.decompose.by_covariate import by_group
from pvae.analysis.decompose.collapse import active_units, kl_per_dimension
from pvae.analysis.decompose.coordinates import grid_error, marginal_log_prob
from pvae.analysis.decompose.draws import (
    Draw,
    LatentDraw,
    accept,
    draw,
    draw_chunk,
    quiet,
    relaxed_terms,
)
from pvae.analysis.decompose.result import ClassSurgery, Dimensions, LatentSurgery, Surgery
from pvae.analysis.figures.estimate import Estimate, Kind, exact, exact_mean, over_draws, over_whole_draws
from pvae.distributions.exponential import Members, Normals
from pvae.distributions.exponential_codes import ROW_COST, CertainCodes, Codes
from pvae.distributions.exponential_product import product
from pvae.errors import DataError
from pvae.pair.code_usage import perplexity
from pvae.pair.pair import Pair
from pvae.pair.structure import Dependencies
from pvae.util import seeds

GUIDE_ROWS = 512
"""Draws that are scored where every pair of draw and row runs the guide."""
GUIDE_PAIRS = 2**22
"""Most such pairs: with more rows than `GUIDE_PAIRS / GUIDE_ROWS`, components are a random subset."""
PRODUCTS = 2e12
"""Most multiplications of a matrix product over all pairs: above it, draws are a random subset."""
CLASSES = 1000
"""Most classes of labels."""


def surgery(
    pair: Pair,
    x: Tensor,
    samples: int = 1,
    seed: int = 0,
    *,
    labels: Tensor | None = None,
    train: Tensor | None = None,
    components: int | None = None,
    memory: int = MEMORY,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Surgery:
    r"""Take the ELBO of `pair` on the data `x` apart.

    (1/n) sum_i KL(q(z|x_i) || p(z)) = I_q[x, z] + KL(q_agg || p), with q_agg = (1/n) sum_i q(z|x_i) over all n
    rows. Each Monte Carlo term is a mean over the same draws z_i ~ q(z|x_i):

    - `kl`: log q(z_i|x_i) - log p(z_i)
    - `mutual_information`: log q(z_i|x_i) - log q_agg(z_i), with the sum over all rows in float64
    - `marginal_kl`: the difference of the two
    - `elbo`: log p(x_i|z_i) minus `kl`

    A code of at most 4096 joint states is summed over instead, and exact; so is one that is known for certain (a
    nearest code), whatever its size: rows of the same joint code are counted. Positions of a grid are exact one by one.
    Relaxed latents are taken as the codes they stand for, and `relaxed_elbo` is that of the relaxed ones.

    For a latent that reads no other, the marginal KL splits further: total correlation KL(q_agg || prod_d q_agg(z_d))
    and a sum over coordinates.

    Where the guide has several levels, q_agg is that of all levels together (each level's density is evaluated
    at the shared z), on a stated subset of draws; where rows are too many for that, components are a random subset
    too and I_q stands between two bounds (`AggregatedPosterior.information`).

    Weights that handlers put on sites (poutine.scale) are left out: the figures are of the ELBO itself. Global latents
    have one KL for all data, outside of q_agg; where the guide draws them at random, a draw of all data is one unit
    of error, and latents that read them have no information of their own.

    A model conditioned on covariates y is taken apart group by group: I_q[x, z | y] and E_y KL(q_agg(z|y) || p(z|y)),
    with log n the mean of the groups' own ceilings.

    Warning: with samples=1 a standard error cannot tell Monte Carlo noise from spread over the data; the total is
    given and called conservative.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Isolating Sources of Disentanglement (Chen et al., 2018), https://arxiv.org/abs/1802.04942

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: draws per datum.
        seed: of the draws; the same seed, the same numbers.
        labels: integers `(n,)`; the figures are then also given class by class.
        train: other rows `(m, *event)`, whose q_agg is tried as the prior of `x`.
        components: take this many rows, at random, for q_agg, and give bounds; default: as many as time allows.
        memory: bytes that scoring q_agg may take beside the draws, whatever n.
        on_progress: called with (draws done, draws in all).

    Returns:
        Surgery; figures are estimates in nats per datum, `kl_exact`, `log_n` and sums over codes exact.

    Raises:
        DataError: `x` has no rows, or labels do not fit it.
    """
    if samples < 1:
        raise DataError(f"surgery: expected at least one draw; got samples={samples}.")
    x = accept(pair, x)
    train = None if train is None else accept(pair, train)
    if not pair.layout.latents and not pair.layout.enumerated:
        raise DataError(f"surgery: expected latents of single data; got only global {', '.join(pair.layout.shared)}.")
    y = _labels(labels, x)
    pooled = by_group(
        pair, x, _labels(labels, x), train,
        lambda rows, y, other, own: surgery(
            pair, rows, samples, own, labels=y, train=other, components=components, memory=memory
        ),
        seed,
    )  # fmt: skip
    if pooled is not None:
        return pooled
    found = pair.dependencies(x)
    with quiet(pair, x, seed):
        first = draw(pair, x)
        account = _Account(pair, x, first, found, seed, components, memory)
        for done in range(1, samples + 1):
            account.take(_honest(first if done == 1 or account.certain else draw(pair, x), found.bottom_up))
            on_progress(done, samples)
    return account.close(y, train)


def _labels(labels: Any, x: Tensor) -> Tensor | None:
    """Labels as class numbers `(n,)`."""
    if labels is None:
        return None
    try:
        y = torch.as_tensor(labels, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"labels: expected {len(x)} integers; got something else: {type(labels).__name__}.") from None
    if y.shape != (len(x),) or y.is_floating_point():
        raise DataError(f"labels: expected {len(x)} integers; got shape {list(y.shape)} of {y.dtype}.")
    if len(y.unique()) > CLASSES:
        raise DataError(f"labels: expected at most {CLASSES} classes; got {len(y.unique())}.")
    return y


def _honest(d: Draw, bottom_up: Collection[str]) -> Draw:
    """A draw without closed forms that are no expectations: the prior reads what was inferred from the latent."""
    for name in bottom_up:
        if not d.latents[name].certain:  # nothing is averaged over
            d.latents[name].kl = d.latents[name].p = None
    return d


# ---------------------------------------------------------------------- draw by draw


@dataclass
class _Scored:
    """log q - log q_agg of a group of latents, `(m,)` for each draw."""

    mixture: AggregatedPosterior
    rows: Tensor
    """Which draws are scored, `(m,)`."""
    once: bool = False
    """Whether the first draw alone is scored."""
    lower: list[Tensor] = field(default_factory=list)
    upper: list[Tensor] = field(default_factory=list)
    leave_one_out: list[Tensor] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every row is a component."""
        return len(self.mixture) == self.mixture.total

    def take(self, d: Draw, names: Sequence[str]) -> None:
        """Score a draw."""
        if self.once and self.upper:
            return
        own = torch.stack([d.latents[name].log_q[self.rows] for name in names]).sum(0)
        found = self.mixture.information(d.flat(names)[self.rows], self.rows, own)
        self.lower.append(found.lower)
        self.upper.append(found.upper)
        self.leave_one_out.append(found.leave_one_out)


@dataclass
class _Level:
    """What draws leave behind of one latent, one entry for each draw."""

    log_q: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    closed: list[Tensor] = field(default_factory=list)
    kl_per_dimension: list[tuple[float, ...]] = field(default_factory=list)
    aggregated: list[Tensor] = field(default_factory=list)
    """sum_d log q_agg(z_d), `(n,)`."""
    information: list[Tensor] = field(default_factory=list)
    """Mean over rows of log q(z_d|x) - log q_agg(z_d), `(D,)`."""
    marginal: list[Tensor] = field(default_factory=list)
    """Mean over rows of log q_agg(z_d) - log p(z_d), `(D,)`."""
    grid_error: float | None = None

    def take(self, latent: LatentDraw) -> None:
        """Note the densities of a draw."""
        self.log_q.append(latent.log_q)
        self.log_p.append(latent.log_p)
        if latent.kl is not None:
            self.closed.append(latent.kl)
        found = kl_per_dimension([latent])
        if found is not None:
            self.kl_per_dimension.append(found)

    def take_coordinates(self, latent: LatentDraw, q: Normals, factorised: bool) -> None:
        """Score a draw coordinate by coordinate."""
        aggregated = marginal_log_prob(q.loc, q.scale, latent.value)
        if self.grid_error is None:
            self.grid_error = grid_error(q.loc, q.scale, latent.value, aggregated)
        own = torch.distributions.Normal(q.loc, q.scale).log_prob(latent.value)
        self.aggregated.append(aggregated.sum(1))
        self.information.append((own - aggregated).mean(0))
        if factorised and isinstance(latent.p, Normals):
            prior = torch.distributions.Normal(latent.p.loc, latent.p.scale).log_prob(latent.value)
            self.marginal.append((aggregated - prior).mean(0))


@dataclass(frozen=True)
class _Posteriors:
    """The posteriors of several codes, batch after batch: those kept, or read off the programs again."""

    pair: Pair
    x: Tensor
    names: tuple[str, ...]
    latents: list[LatentDraw]

    def __iter__(self) -> Iterator[list[Codes]]:
        kept = [latent.q for latent in self.latents]
        if None not in kept:
            yield [_as_codes(q) for q in kept]
            return
        with quiet(self.pair, self.x, 0):
            for part in self.x.split(self.pair.structure.rows_at_once()):
                found = draw_chunk(self.pair, part, len(self.x)).latents
                yield [_as_codes(found[name].q) for name in self.names]


def _as_codes(q: Members | None) -> Codes:
    """Probabilities of codes, of certain ones too."""
    if isinstance(q, CertainCodes):
        return q.codes()
    assert isinstance(q, Codes)  # noqa: S101 - asked of those that have a tally alone
    return q


class _Account:
    """Draws come in, densities per datum stay; the figures are made when all are there."""

    def __init__(
        self, pair: Pair, x: Tensor, first: Draw, found: Dependencies, seed: int, components: int | None, memory: int
    ) -> None:
        self.pair, self.x, self.first = pair, x, first
        self.guide_roots, self.model_roots = found.guide_roots, found.model_roots
        self.seed, self.components, self.memory = seed, components, memory
        self.names = tuple(first.latents)
        self.levels = {name: _Level() for name in self.names}
        self.joint: dict[tuple[str, ...], codes.Joint | None] = {}
        self.reconstruction: list[Tensor] = []
        self.shared: list[dict[str, float]] = []
        alone = [(name,) for name in self.names if name in self.guide_roots]
        groups = alone if alone == [self.names] else [*alone, self.names]
        self.scored = {group: made for group in groups if (made := self._scored(group)) is not None}

    def _scored(self, names: tuple[str, ...]) -> _Scored | None:
        """How a group of latents is scored; None where it cannot be."""
        if any(self.first.latents[name].point for name in names):
            return None
        latents = [self.first.latents[name] for name in names]
        known = [latent.q for latent in latents if latent.q is not None]
        if set(names) <= self.guide_roots and len(known) == len(names):
            rows = choose(len(self.x), self.components, self.seed, self.x.device)
            q = product(known)
            mixture = AggregatedPosterior(q if rows is None else q.rows(rows), len(self.x), rows, self.memory)
            return _Scored(mixture, self._some(int(PRODUCTS / (len(mixture) * q.work))))
        guided = set(names) <= self.guide_roots & set(self.pair.layout.latents)
        if guided and all(latent.q is not None or latent.tally is not None for latent in latents):
            mixture = self._streamed(names)
            work = sum(_work(latent) for latent in latents)
            return _Scored(mixture, self._some(int(PRODUCTS / (len(mixture) * work))))
        if not set(names) <= set(self.pair.layout.latents) or not self.first.points:
            return None  # with random global latents q(z|x) is a mixture over them
        rows = self._some(GUIDE_ROWS)
        count = self.components or max(2, GUIDE_PAIRS // len(rows))
        mixture = AggregatedPosterior.of(
            self.pair, self.x, latents=names, components=count, seed=self.seed, memory=self.memory
        )
        return _Scored(mixture, rows, once=True)

    def _streamed(self, names: Sequence[str]) -> AggregatedPosterior:
        """q_agg of codes whose probabilities are too many to keep."""
        return AggregatedPosterior.of(
            self.pair, self.x, latents=names, components=self.components, seed=self.seed, memory=self.memory
        )

    def _some(self, most: int) -> Tensor:
        return seeds.subset(len(self.x), most, seeds.mix(self.seed, seeds.ANALYSIS, 1)).to(self.x.device)

    def take(self, d: Draw) -> None:
        """Score one draw of all rows."""
        self.reconstruction.append(d.reconstruction)
        self.shared.append(d.shared)
        for name, latent in d.latents.items():
            self.levels[name].take(latent)
            if name in self.guide_roots and latent.normal is not None and latent.value.shape[1] > 1:
                self.levels[name].take_coordinates(latent, latent.normal, name in self.model_roots)
        for names, scored in self.scored.items():
            scored.take(d, names)

    # ------------------------------------------------------------------ figures

    def close(self, y: Tensor | None, train: Tensor | None) -> Surgery:
        """The figures of all draws."""
        whole = self._group(self.names)
        latents = {name: self._latent(name) for name in self.names}
        closed = [latent.kl_exact for latent in latents.values()]
        reconstruction = self._reconstruction()
        return Surgery(
            n=len(self.x),
            samples=len(self.reconstruction),
            reconstruction=reconstruction,
            **whole,  # type: ignore[arg-type]
            kl_exact=_total([c for c in closed if c is not None]) if closed and None not in closed else None,
            label_information=None if y is None else self._label_information(y),
            train_gain=None if train is None else self._train_gain(train),
            elbo=self._elbo(reconstruction, whole["kl"]),
            log_n=exact(math.log(len(self.x))),
            latents=latents,
            classes={} if y is None else self._classes(y),
            shared={name: sum(d[name] for d in self.shared) / len(self.shared) for name in self.first.shared},
            global_kl=self._global_kl(),
            elements=self.pair.structure.elements,
            relaxed_elbo=self._relaxed_elbo(),
            notes=tuple(self._notes()),
        )

    def _kl(self, names: Sequence[str]) -> Tensor:
        """log q - log p of a group of latents, `(samples, n)`."""
        levels = [self.levels[name] for name in names]
        return torch.stack([torch.stack(v.log_q) - torch.stack(v.log_p) for v in levels]).sum(0)

    @property
    def certain(self) -> bool:
        """Whether all that is inferred is a function of x: one draw is as good as many."""
        latents = self.first.latents.values()
        return all(z.certain for z in latents) and set(self.names) <= self.guide_roots and self.first.points

    @property
    def _nothing_drawn(self) -> bool:
        """Whether every latent is summed over or certain: the reconstruction, too, is then an expectation."""
        summed = not self.pair.layout.latents and self.names[0] in self.guide_roots and self.first.points
        return summed or self.certain

    def _reconstruction(self) -> Estimate:
        return (
            exact_mean(self.reconstruction[0]) if self._nothing_drawn else self._over(torch.stack(self.reconstruction))
        )

    def _elbo(self, reconstruction: Estimate, kl: Estimate | None) -> Estimate:
        """reconstruction - kl - global kl; its error is that of the terms together."""
        assert kl is not None  # noqa: S101 - every group has one
        terms = torch.stack(self.reconstruction) - self._kl_terms() - self._shares()
        found = exact_mean(terms[0]) if self._nothing_drawn else self._over(terms)
        return replace(found, value=reconstruction.value - kl.value - float(self._shares().mean()))

    def _relaxed_elbo(self) -> Estimate | None:
        """The ELBO of the relaxed latents themselves, by as many draws."""
        found = relaxed_terms(self.pair, self.x, len(self.reconstruction), self.seed)
        return None if found is None else self._over(found)

    def _kl_terms(self) -> Tensor:
        """KL of all latents per datum, exact where it is summed, `(samples, n)` or `(n,)`."""
        joint = self._joint_codes(self.names)
        return self._kl(self.names) if joint is None else joint.kl

    def _shares(self) -> Tensor:
        """KL of the global latents of every draw, divided by n, `(samples, 1)`."""
        shares = [[sum(d.values()) / len(self.x)] for d in self.shared]
        return torch.tensor(shares, dtype=torch.float64, device=self.x.device)

    def _global_kl(self) -> Estimate | None:
        if not self.first.shared:
            return None
        found = over_whole_draws(self._shares())
        return exact(found.value) if self.first.points else replace(found, data_error=None)

    def _over(self, terms: Tensor, kind: Kind = "estimate") -> Estimate:
        """The mean of terms `(samples, rows)`; all data share the noise of random global latents."""
        return over_draws(terms, kind, len(self.x)) if self.first.points else over_whole_draws(terms, kind)

    def _joint_codes(self, names: tuple[str, ...]) -> codes.Joint | None:
        """What is exact for every datum: certain codes, or the sum over all joint states of codes that read nothing.

        None for other latents.
        """
        if names not in self.joint:
            self.joint[names] = self._made_joint(names)
        return self.joint[names]

    def _made_joint(self, names: tuple[str, ...]) -> codes.Joint | None:
        latents = [self.first.latents[name] for name in names]
        if not set(names) <= self.guide_roots:
            return None
        if all(latent.certain for latent in latents):
            q = product([latent.q for latent in latents if latent.q is not None])
            aggregated = AggregatedPosterior(q, memory=self.memory).log_prob(self.first.flat(names))
            return codes.Joint(self._kl(names)[0], -aggregated)
        known = [latent.prior for latent in latents if latent.prior is not None]
        if len(known) < len(latents) or not set(names) <= self.model_roots:
            return None
        return codes.joint(_Posteriors(self.pair, self.x, names, latents), known)

    def _group(self, names: tuple[str, ...]) -> dict[str, Estimate | None]:
        """KL, information and marginal KL of a group of latents, with bounds where components are a subset."""
        out: dict[str, Estimate | None] = dict.fromkeys(
            ("mutual_information", "mutual_information_lower", "marginal_kl", "marginal_kl_upper", "leave_one_out")
        )
        joint, scored = self._joint_codes(names), self.scored.get(names)
        kl = self._kl(names)
        whole = self._over(kl) if joint is None else exact_mean(joint.kl)
        out["kl"] = whole
        if scored is not None:
            out |= self._bounds(kl, whole.value, scored)
        if points := [name for name in names if self.first.latents[name].point]:
            out["mutual_information"] = self._distinct(points, names)
        if joint is not None:
            out["mutual_information"] = exact_mean(joint.information)
            out["marginal_kl"] = exact_mean(joint.kl - joint.information)
            out["mutual_information_lower"] = out["marginal_kl_upper"] = None
        return out

    def _distinct(self, points: list[str], names: tuple[str, ...]) -> Estimate | None:
        """I_q[x, z] of deterministic codes: the entropy of which rows share one, log n where all differ.

        None where codes coincide and other latents tell the rows apart, or where a point follows a draw.
        """
        if not set(points) <= self.guide_roots:
            return None
        n = len(self.x)
        same = _row_numbers(self.x)  # equal rows may get codes that differ in the last bit, from batches of other sizes
        first = torch.zeros(int(same.max()) + 1, dtype=torch.int64, device=same.device)
        first[same] = torch.arange(n, device=same.device)
        code = self.first.flat(points)[first].unique(dim=0, return_inverse=True)[1][same]
        shares = code.bincount().double() / n
        if len(shares) < n and len(points) < len(names):
            return None
        return exact(float(-(shares * shares.log()).sum()))

    def _bounds(self, kl: Tensor, mean_kl: float, scored: _Scored) -> dict[str, Estimate | None]:
        upper, lower = torch.stack(scored.upper), torch.stack(scored.lower)
        loo = torch.stack(scored.leave_one_out)
        out: dict[str, Estimate | None] = {}
        if bool(loo.isfinite().all()):
            out["leave_one_out"] = self._over(loo, "upper_bound")
        if scored.whole:
            out["mutual_information"] = self._over(upper)
            out["marginal_kl"] = self._marginal(kl, mean_kl, upper, scored, "estimate")
            return out
        out["mutual_information"] = self._over(upper, "upper_bound")
        out["mutual_information_lower"] = self._over(lower, "lower_bound")
        out["marginal_kl"] = self._marginal(kl, mean_kl, upper, scored, "lower_bound")
        out["marginal_kl_upper"] = self._marginal(kl, mean_kl, lower, scored, "upper_bound")
        return out

    def _marginal(self, kl: Tensor, mean_kl: float, information: Tensor, scored: _Scored, kind: Kind) -> Estimate:
        """kl - information: the errors term by term where every draw is scored, else those of the means."""
        value = mean_kl - float(information.mean())
        if kl.shape == information.shape:
            parts = self._over(kl - information, kind)
            return Estimate(value, parts.standard_error, kind, parts.data_error, parts.note)
        found = self._over(information)
        return Estimate(value, math.hypot(self._over(kl).standard_error, found.standard_error), kind, None, found.note)

    def _latent(self, name: str) -> LatentSurgery:
        latent, level, group = self.first.latents[name], self.levels[name], self._group((name,))
        first, prior_first = name in self.guide_roots, name in self.model_roots
        kl_exact = None
        if len(level.closed) == len(level.log_q):
            kl_exact = exact_mean(level.closed[0]) if first and prior_first else self._over(torch.stack(level.closed))
        per_dimension = torch.tensor(level.kl_per_dimension, dtype=torch.float64)
        counted = latent.tally if first else None
        use = None if counted is None or counted.bits else codes.usage(counted)
        assert group["kl"] is not None  # noqa: S101 - every group has one
        return LatentSurgery(
            kl=group["kl"],
            kl_exact=kl_exact,
            mutual_information=group["mutual_information"],
            marginal_kl=group["marginal_kl"] if prior_first else None,
            kl_per_dimension=tuple(per_dimension.mean(0).tolist()) if len(per_dimension) else None,
            active_units=active_units(latent),
            dimensions=self._dimensions(name, group["mutual_information"]),
            perplexity=None if counted is None else tuple(perplexity(counted.share).tolist()),
            states=None if counted is None else counted.states,
            pooled_perplexity=None if use is None else use.perplexity,
            used=None if use is None else use.used,
        )

    def _dimensions(self, name: str, information: Estimate | None) -> Dimensions | None:
        """Coordinate by coordinate: normals on a grid, codes by their own sums."""
        latent, level, scored = self.first.latents[name], self.levels[name], self.scored.get((name,))
        if scored is None or information is None:
            return None
        if level.aggregated:
            return _of_normals(level, scored)
        if latent.tally is not None and latent.tally.positions > 1:
            against = latent.tally.prior if name in self.model_roots else None
            joint = None if _is_factorised(latent) else self._group((name,))["marginal_kl"]
            return _of_codes(codes.positions(latent.tally, against), information, joint)
        return None

    # ------------------------------------------------------------------ labels, another prior

    def _classes(self, y: Tensor) -> dict[int, ClassSurgery]:
        """The terms of every label's rows."""
        reconstruction, kl = torch.stack(self.reconstruction), self._kl_terms().reshape(-1, len(y))
        joint = self._joint_codes(self.names)
        scored = self.scored.get(self.names)
        out = {}
        for label in y.unique().tolist():
            mine = y == label
            information = None
            if joint is not None:
                information = joint.information[None, mine]
            elif scored is not None and scored.whole and len(scored.rows) == len(y):
                information = torch.stack(scored.upper)[:, mine]
            out[int(label)] = ClassSurgery(
                n=int(mine.sum()),
                elbo=over_draws((reconstruction - kl - self._shares())[:, mine]),
                reconstruction=over_draws(reconstruction[:, mine]),
                kl=over_draws(kl[:, mine]),
                mutual_information=None if information is None else over_draws(information),
                marginal_kl=None if information is None else over_draws(kl[: len(information), mine] - information),
            )
        return out

    def _label_information(self, y: Tensor) -> Estimate | None:
        """I_q[y, z] = E[log q_agg(z | y) - log q_agg(z)], on the first draw; q_agg(z | y) over the rows of a label."""
        scored, value = self.scored.get(self.names), self.first.flat(self.names)
        known = [q for name in self.names if (q := self.first.latents[name].q) is not None]
        if scored is None or not scored.whole or scored.once or len(known) < len(self.names):
            return None
        q, terms = product(known), torch.empty(len(scored.rows), dtype=torch.float64, device=y.device)
        labels = y[scored.rows]
        for label in labels.unique().tolist():
            mine = labels == label
            within = AggregatedPosterior(q.rows((y == label).nonzero()[:, 0]), memory=self.memory)
            terms[mine] = within.log_prob(value[scored.rows[mine]])
        own = torch.stack([self.levels[name].log_q[0][scored.rows] for name in self.names]).sum(0)
        return over_draws((terms - (own - scored.upper[0]))[None])

    def _train_gain(self, train: Tensor) -> Estimate | None:
        """E[log q_agg(z) - log p(z)] of the first draw, with q_agg over other rows."""
        scored = self.scored.get(self.names)
        if scored is None or not set(self.names) <= set(self.pair.layout.latents):
            return None
        count = max(2, GUIDE_PAIRS // len(scored.rows)) if scored.once else None
        mixture = AggregatedPosterior.of(
            self.pair, train, latents=self.names, components=count, seed=self.seed, memory=self.memory
        )
        log_p = torch.stack([self.levels[name].log_p[0] for name in self.names]).sum(0)
        terms = mixture.log_prob(self.first.flat(self.names)[scored.rows]) - log_p[scored.rows]
        if missing := int((terms == -math.inf).sum()):
            return Estimate(-math.inf, 0.0, note=f"{missing} of {len(terms)} have codes that no training row has")
        return over_draws(terms[None])

    def _notes(self) -> list[str]:
        """What was left out, and what stands for it."""
        notes = []
        scored, n = self.scored.get(self.names), len(self.x)
        if scored is not None and (len(scored.rows) < n or scored.once):
            levels = f" over {len(self.names)} levels" if len(self.names) > 1 else ""
            components = f"all {n}" if scored.whole else f"{len(scored.mixture)} of {n}"
            notes.append(f"joint I_q{levels}: {len(scored.rows)} of {n} draws, each under {components} components")
        if scored is not None and not scored.whole:
            bias = float((torch.stack(scored.upper) - torch.stack(scored.lower)).mean())
            notes.append(f"components are a subset: I_q stands between two bounds {bias:.4f} nats apart")
        if scored is not None and isinstance(scored.mixture.components, Kept):
            rounding = scored.mixture.components.rounding(self.first.flat(self.names)[scored.rows])
            if rounding > 1e-3:
                notes.append(f"scales are very small: log q_agg is known to {rounding:.1e} nats")
        if points := [name for name, latent in self.first.latents.items() if latent.point]:
            notes.append(
                f"{', '.join(points)}: a deterministic code, so that kl is -log p(z), less a log determinant where z "
                f"determines x; the marginal KL of points to a density is not defined"
            )
        certain = [name for name, latent in self.first.latents.items() if latent.certain and name in self.guide_roots]
        if certain:
            distinct = len(self.first.flat(certain).unique(dim=0))
            notes.append(
                f"{', '.join(certain)}: certain codes ({distinct} distinct ones), so that kl is -log p(c) and I_q the "
                f"entropy of the joint code"
            )
        for name, level in self.levels.items():
            if level.grid_error is not None and level.grid_error > 1e-3:
                notes.append(f"{name}: densities of single coordinates are known to {level.grid_error:.1e} nats")
        return notes


def _row_numbers(x: Tensor) -> Tensor:
    """A number for every row, the same for rows that are equal bit for bit, `(n,)`: by an exact hash of 64 bits."""
    bits = x.reshape(len(x), -1).contiguous().view(torch.int64 if x.element_size() == 8 else torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (2, bits.shape[1]), generator=generator).mul(2).add(1).to(x.device)
    mixed = (bits ^ (bits >> 15)) * odd[0]
    return ((mixed ^ (mixed >> 29)) * odd[1]).sum(1).unique(return_inverse=True)[1]


def _work(latent: LatentDraw) -> int:
    """Multiplications of one density of a latent (`Members.work`), of one that was not kept too."""
    if latent.q is not None:
        return latent.q.work
    assert latent.tally is not None  # noqa: S101 - others are scored by the guide
    return latent.tally.positions * ROW_COST


def _total(parts: list[Estimate]) -> Estimate:
    """The sum of closed-form KLs: exact when each is, else an estimate whose error adds up conservatively."""
    kind: Kind = "exact" if all(p.kind == "exact" for p in parts) else "estimate"
    if len(parts) == 1:
        return parts[0]
    return Estimate(sum(p.value for p in parts), sum(p.standard_error for p in parts), kind)


def _of_normals(level: _Level, scored: _Scored) -> Dimensions:
    """Total correlation and coordinates of a normal posterior, from the same draws as everything else."""
    count = len(scored.upper)
    log_q, aggregated = torch.stack(level.log_q), torch.stack(level.aggregated)
    joint = log_q[:count, scored.rows] - torch.stack(scored.upper)
    marginal = torch.stack(level.marginal).mean(0) if level.marginal else None
    return Dimensions(
        mutual_information=tuple(torch.stack(level.information).mean(0).tolist()),
        marginal_kl=None if marginal is None else tuple(marginal.tolist()),
        total_correlation=over_draws(
            joint - aggregated[:count, scored.rows], "estimate" if scored.whole else "lower_bound", len(log_q[0])
        ),
        coordinate_kl=None if marginal is None else over_draws(aggregated - torch.stack(level.log_p)),
        error=level.grid_error or 0.0,
    )


def _is_factorised(latent: LatentDraw) -> bool:
    """Whether the posterior of a grid of codes is one of independent positions: not where the model sums it out."""
    return not isinstance(latent.q, Codes) or latent.tally is None or latent.q.positions == latent.tally.positions


def _of_codes(found: codes.Positions, information: Estimate, joint: Estimate | None) -> Dimensions:
    """Positions exactly.

    Of independent positions the informations exceed the joint one by the total correlation. Of others it is what the
    `joint` marginal KL has beyond those of the positions.
    """
    marginal = found.marginal_kl
    total = float(found.information.sum()) - information.value
    if joint is not None:
        total = math.nan if marginal is None else joint.value - float(marginal.sum())
    kind: Kind = "lower_bound" if information.kind == "upper_bound" else information.kind
    return Dimensions(
        mutual_information=tuple(found.information.tolist()),
        marginal_kl=None if marginal is None else tuple(marginal.tolist()),
        total_correlation=Estimate(total, information.standard_error, kind, None, information.note),
        coordinate_kl=None if marginal is None else exact(float(marginal.sum())),
        error=0.0,
    )
