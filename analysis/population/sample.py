"""Rows that neither encoder nor prior has seen, one sample of the latents each; and priors that do not know them.

Also priors of several latents made of priors of some of them, priors by covariate value, and mixtures of priors.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.distributions.exponential import Members
from pvae.util import Record, replace

FOLDS = 3
"""Number of folds of the rows, in a circle: any two rows are in one fold or in neighbours, and the third knows
neither."""


class NewRows(Record):
    """One sample z_i ~ q(z | x_i) of all latents for each of n rows, with its log densities; float64, nats."""

    value: Tensor
    """Sampled values, flat, `(n, D)`."""
    own: Tensor
    """Log posterior density log q(z_i | x_i), `(n,)`."""
    log_p: Tensor
    """Log prior density log p(z_i), `(n,)`."""
    kl: Tensor
    """KL(q(z | x_i) || p), `(n,)`: in closed form where there is one, else log q - log p, averaged over the samples."""
    q: Members | None
    """Posteriors of all n rows as members of an exponential family; None for others, whose pairs of a value and a row
    are not scored here."""
    information: Tensor | None = None
    """Pointwise information log q(z_i | x_i) - log q_agg(z_i) of the rows that could be scored, `(m,)`, with all rows
    as components (or a random subset, so that it is a lower bound), if `q` is None; else None."""
    parts: tuple["NewRows", ...] = ()
    """The latents without parents in the model alone, in groups of one kind (real, discrete); for priors that leave the
    others as they are. Their posteriors `q` are those at each row's own sample of the latents that they read."""
    group: Tensor | None = None
    """Number of the covariate value of every row, `(n,)`; None without covariates."""

    def __len__(self) -> int:
        return len(self.value)

    def rows(self, index: Tensor) -> "NewRows":
        """Return the chosen rows."""
        cut = {name: getattr(self, name)[index] for name in ("value", "own", "log_p", "kl")}
        parts, q = tuple(part.rows(index) for part in self.parts), None if self.q is None else self.q.rows(index)
        group = None if self.group is None else self.group[index]
        return replace(self, **cut, q=q, information=None, parts=parts, group=group)

    def joined(self, others: "NewRows") -> "NewRows":
        """Return these rows, followed by others; without parts and groups."""
        q = None if self.q is None or others.q is None else self.q.joined([others.q])
        names = ("value", "own", "log_p", "kl")
        both = {name: torch.cat([getattr(self, name), getattr(others, name)]) for name in names}
        return replace(self, **both, q=q, information=None, parts=(), group=None)


class HonestScores(NamedTuple):
    """Log densities of samples under priors r that were chosen without their rows; nats."""

    log_r: Tensor
    """log r(z_i) with an r chosen without row i, `(n,)`."""
    influence: Tensor
    """Derivative of sum_i log r(z_i) in the weight of row j among the rows that r is made of, up to a constant, `(n,)`
    (the column sums of the shares, in a mixture of kernels on the other rows); 0 where r is of other rows."""
    apart: Tensor
    """log r(z_i) with an r made of the fold after that of row i alone, which knows no row of the fold of row i nor of
    the one before, `(n,)`: for the bound from pairs of rows."""
    words: str
    """The prior r in words, as in "won by {words}"."""


SCORES = ("log_r", "influence", "apart")


class HonestPrior(Record, ABC):
    """Abstract way to make a prior r(z) from rows, and to score rows that it was not chosen with.

    Parameters of r (a width, weights, a discount) are never chosen on the fold of the rows that r is scored on.
    """

    @abstractmethod
    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        """Return the scores of rows under priors made of the other rows, or under one made of the rows `train`.

        Arguments:
            rows: the rows that are scored, `n` of them.
            fold: fold of each row, `(n,)`; not read with `train`.
            train: rows among which those that are scored are not.
        """


def folds(n: int, seed: int, device: torch.device, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return n rows (or `count` of them) in random order, and the fold of each in that order: 0, 1 or 2, ascending."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].to(device)
    return order, torch.arange(len(order), device=device) * FOLDS // len(order)


def mixture_weights(terms: Tensor, prior: Tensor | float = 0.0, steps: int = 200) -> Tensor:
    """Return the log weights of a mixture by EM, `(k,)`, from log densities of rows that no component knows.

    Arguments:
        terms: log densities under the k components, `(m, k)`, nats.
        prior: pseudo-counts of the components, `(k,)`, or of each.
        steps: number of EM steps.
    """
    ratio = (terms - terms.amax(1, keepdim=True)).exp()
    weights = torch.full_like(ratio[0], 1 / terms.shape[1])
    for _ in range(steps):
        mass = weights * (ratio.T @ (ratio @ weights).reciprocal()) + prior
        weights = (mass / mass.sum()).clamp(min=1e-12)
    return weights.log()


# ---------------------------------------------------------------------- priors made of others


FEWEST_OF_GROUP = 50
"""Smallest number of rows with one covariate value that have a prior of their own."""
ROWS_WEIGHED = 4000
"""Largest number of train rows on which the weights of a mixture are chosen."""


class RootPrior(HonestPrior):
    """New priors of the latents without parents, r(roots) p(the others | roots): the others cancel in r / p."""

    priors: Sequence[HonestPrior]
    """One prior for each of the `parts` of the rows, independent of each other."""

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        known = [None] * len(self.priors) if train is None else train.parts
        pieces = zip(self.priors, rows.parts, known, strict=True)
        found = [prior.scored(part, fold, other) for prior, part, other in pieces]
        rest = rows.log_p - torch.stack([part.log_p for part in rows.parts]).sum(0)
        log_r, influence, apart = (torch.stack([getattr(s, name) for s in found]).sum(0) for name in SCORES)
        words = f"a new prior of the latents without parents: {'; '.join(scores.words for scores in found)}"
        return HonestScores(rest + log_r, influence, rest + apart, words)


class GroupPrior(HonestPrior):
    """Priors r(z | y) made of the rows with the same covariate value; -inf for values of few rows."""

    prior: HonestPrior
    """Way to make the prior of each covariate value."""

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        known = rows if train is None else train
        assert known.group is not None and rows.group is not None  # noqa: S101, PT018 - made for rows with covariates
        nothing = torch.full_like(rows.own, -torch.inf)
        out = HonestScores(nothing, torch.zeros_like(nothing), nothing.clone(), "priors by covariate value")
        for value in known.group.unique().tolist():
            own, mine = ((part == value).nonzero()[:, 0] for part in (known.group, rows.group))
            if len(own) >= FEWEST_OF_GROUP and len(mine):
                found = self.prior.scored(rows.rows(mine), fold[mine], None if train is None else train.rows(own))
                out.log_r[mine], out.influence[mine], out.apart[mine] = found.log_r, found.influence, found.apart
        return out


class MixedPrior(HonestPrior):
    """Mixture of priors, with weights by EM; a prior without a density (-inf) for some covariate values has none there.

    The weights for the rows of a fold are chosen on the fold after it, scored by priors of the third one. For the bound
    from pairs all weights are equal, as a fold alone does not tell them.
    """

    priors: Sequence[HonestPrior]

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        found = [prior.scored(rows, fold, train) for prior in self.priors]
        log_r, influence, apart = (torch.stack([getattr(s, name) for s in found], -1) for name in SCORES)
        log_w = torch.zeros_like(log_r)
        for k in range(FOLDS if train is None else 0):
            log_w[fold == k] = _weights(apart[fold == (k + 1) % FOLDS])
        if train is not None:
            order, parts = folds(len(train), 0, rows.value.device, ROWS_WEIGHED)
            few = train.rows(order)
            log_w += _weights(torch.stack([prior.scored(few, parts).log_r for prior in self.priors], -1))
        terms = _available(log_r, log_w)
        share, whole = terms.softmax(-1).mean(0), terms.logsumexp(-1)
        even = _available(apart, torch.zeros_like(apart)).logsumexp(-1)
        words = [f"{s.words} ({100 * float(w):.0f} %)" for s, w in zip(found, share, strict=True) if w >= 0.005]
        return HonestScores(whole, influence @ share, even if train is None else whole, "; ".join(words))


def mixed_by_group(prior: HonestPrior, known: NewRows) -> HonestPrior:
    """Return the mixture of a prior of all rows and one by covariate value, where enough known rows share one."""
    assert known.group is not None  # noqa: S101 - made for rows with covariates
    most = int(known.group.unique(return_counts=True)[1].max())
    return MixedPrior([prior, GroupPrior(prior)]) if most >= FEWEST_OF_GROUP else prior


def _weights(terms: Tensor) -> Tensor:
    """Return log weights of a mixture, `(k,)`, from the rows that every component has a density for."""
    return mixture_weights(terms[terms.isfinite().all(1)], 1.0)


def _available(terms: Tensor, log_w: Tensor) -> Tensor:
    """Return weighted log densities, the weights of components without a density given to the others."""
    log_w = log_w.expand_as(terms).masked_fill(terms == -torch.inf, -torch.inf)
    return terms + log_w.log_softmax(-1)
