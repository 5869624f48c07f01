"""Priors of several latents made of priors of some of them, priors by covariate value, and mixtures of priors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pvae.analysis.population.sample import FOLDS, HonestPrior, HonestScores, NewRows, folds, mixture_weights

FEWEST_OF_GROUP = 50
"""Smallest number of rows with one covariate value that have a prior of their own."""
ROWS_WEIGHED = 4000
"""Largest number of train rows on which the weights of a mixture are chosen."""


class RootPrior(HonestPrior):
    """New priors of the latents without parents, r(roots) p(the others | roots): the others cancel in r / p.

    Arguments:
        priors: one for each of the `parts` of the rows, independent of each other.
    """

    def __init__(self, priors: Sequence[HonestPrior]) -> None:
        self.priors = tuple(priors)

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        known = [None] * len(self.priors) if train is None else train.parts
        pieces = zip(self.priors, rows.parts, known, strict=True)
        found = [prior.scored(part, fold, other) for prior, part, other in pieces]
        rest = rows.log_p - torch.stack([part.log_p for part in rows.parts]).sum(0)
        return HonestScores(
            rest + torch.stack([scores.log_r for scores in found]).sum(0),
            torch.stack([scores.influence for scores in found]).sum(0),
            rest + torch.stack([scores.apart for scores in found]).sum(0),
            f"a new prior of the latents without parents: {'; '.join(scores.words for scores in found)}",
        )


class GroupPrior(HonestPrior):
    """Priors r(z | y) made of the rows with the same covariate value; -inf for values of few rows."""

    def __init__(self, prior: HonestPrior) -> None:
        self.prior = prior

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

    def __init__(self, priors: Sequence[HonestPrior]) -> None:
        self.priors = tuple(priors)

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        found = [prior.scored(rows, fold, train) for prior in self.priors]
        log_r, apart, influence = (
            torch.stack([getattr(s, name) for s in found], -1) for name in ("log_r", "apart", "influence")
        )
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
