"""Priors of several latents made of priors of some of them, priors by covariate value, and mixtures of priors."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from pvae.analysis.population.sample import FOLDS, HonestPrior, HonestScores, NewRows, folds, mixture_weights

FEWEST_OF_GROUP = 50
"""Smallest number of rows with one covariate value that have a prior of their own."""
ROWS_WEIGHED = 4000
"""Largest number of train rows on which the weights of a mixture are chosen."""


@final
class RootPrior(HonestPrior):
    """New priors of the latents without parents, r(roots) p(the others | roots): the others cancel in r / p.

    Arguments:
        priors: one for each of the `parts` of the rows, independent of each other.
    """

    def __init__(self, priors: Sequence[HonestPrior]) -> None:
        self.priors = tuple(priors)

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        found = [prior.crossed(part, fold) for prior, part in zip(self.priors, rows.parts, strict=True)]
        return self._whole(rows, found)

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        pieces = zip(self.priors, train.parts, rows.parts, strict=True)
        return self._whole(rows, [prior.trained(known, part) for prior, known, part in pieces])

    def _whole(self, rows: NewRows, found: Sequence[HonestScores]) -> HonestScores:
        rest = rows.log_p - torch.stack([part.log_p for part in rows.parts]).sum(0)
        return HonestScores(
            rest + torch.stack([scores.log_r for scores in found]).sum(0),
            torch.stack([scores.influence for scores in found]).sum(0),
            rest + torch.stack([scores.apart for scores in found]).sum(0),
            f"a new prior of the latents without parents: {'; '.join(scores.words for scores in found)}",
        )


@final
class GroupPrior(HonestPrior):
    """Priors r(z | y) made of the rows with the same covariate value; -inf for values of few rows."""

    def __init__(self, prior: HonestPrior) -> None:
        self.prior = prior

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        return self._by_group(rows, rows, lambda _, mine: self.prior.crossed(rows.rows(mine), fold[mine]))

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        return self._by_group(train, rows, lambda own, mine: self.prior.trained(train.rows(own), rows.rows(mine)))

    def _by_group(
        self, known: NewRows, rows: NewRows, scored: Callable[[Tensor, Tensor], HonestScores]
    ) -> HonestScores:
        """Return scores by the rows `known` and `rows` of every covariate value that enough known rows have."""
        assert known.group is not None and rows.group is not None  # noqa: S101, PT018 - made for rows with covariates
        nothing = torch.full_like(rows.own, -torch.inf)
        out = HonestScores(nothing, torch.zeros_like(nothing), nothing.clone(), "priors by covariate value")
        for value in known.group.unique().tolist():
            own, mine = ((part == value).nonzero()[:, 0] for part in (known.group, rows.group))
            if len(own) >= FEWEST_OF_GROUP and len(mine):
                found = scored(own, mine)
                out.log_r[mine], out.influence[mine], out.apart[mine] = found.log_r, found.influence, found.apart
        return out


@final
class MixedPrior(HonestPrior):
    """Mixture of priors, with weights by EM; a prior without a density (-inf) for some covariate values has none there.

    The weights for the rows of a fold are chosen on the fold after it, scored by priors of the third one. For the bound
    from pairs all weights are equal, as a fold alone does not tell them.
    """

    def __init__(self, priors: Sequence[HonestPrior]) -> None:
        self.priors = tuple(priors)

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        found = [prior.crossed(rows, fold) for prior in self.priors]
        log_r, apart = (torch.stack([getattr(s, name) for s in found], -1) for name in ("log_r", "apart"))
        log_w = torch.zeros_like(log_r)
        for k in range(FOLDS):
            log_w[fold == k] = _weights(apart[fold == (k + 1) % FOLDS])
        share = _available(log_r, log_w).softmax(-1).mean(0)
        influence = torch.stack([s.influence for s in found], -1) @ share
        whole = _available(log_r, log_w).logsumexp(-1)
        return HonestScores(
            whole, influence, _available(apart, torch.zeros_like(apart)).logsumexp(-1), self._words(found, share)
        )

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        few = train.rows(torch.arange(min(len(train), ROWS_WEIGHED), device=rows.value.device))
        order, fold = folds(len(few), 0, rows.value.device)
        log_w = _weights(torch.stack([prior.crossed(few.rows(order), fold).log_r for prior in self.priors], -1))
        found = [prior.trained(train, rows) for prior in self.priors]
        terms = _available(torch.stack([s.log_r for s in found], -1), log_w)
        log_r = terms.logsumexp(-1)
        words = self._words(found, terms.softmax(-1).mean(0))
        return HonestScores(log_r, torch.zeros_like(log_r), log_r, words)

    def _words(self, found: Sequence[HonestScores], share: Tensor) -> str:
        return "; ".join(f"{s.words} ({100 * float(w):.0f} %)" for s, w in zip(found, share, strict=True) if w >= 0.005)


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
