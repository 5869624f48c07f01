"""Priors of real latents made of other rows: posteriors widened into kernels, mixed with a normal and the prior p."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from pvae.analysis.population.sample import FOLDS, HonestPrior, HonestScores, NewRows
from pvae.analysis.population.sweep import log_sum, relative, tiles
from pvae.distributions.exponential import FullRankNormals, Members, Normals
from pvae.distributions.exponential_codes import Product

WIDTHS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)
"""Widths b that are tried: a kernel has the variance of its posterior plus b^2 var(z)."""
ROWS_TRIED = 400
"""Number of rows on which the width and the weights are chosen."""
PARTS = 10
"""Number of parts of the rows, each scored under a normal fitted to the others."""
STEPS = 50
"""Number of EM steps for the weights of a mixture."""


def widened(q: Members, variance: Tensor) -> Members | None:
    """Return normal posteriors with a variance added to every coordinate, `(D,)`; None for other families."""
    if isinstance(q, Normals):
        return replace(q, scale=(q.scale**2 + variance).sqrt())
    if isinstance(q, FullRankNormals):
        covariance = q.scale_tril @ q.scale_tril.mT + torch.diag(variance)
        return replace(q, scale_tril=torch.linalg.cholesky(covariance))
    if isinstance(q, Product):
        parts = [widened(part, v) for part, v in zip(q.parts, q.split(variance), strict=True)]
        return None if None in parts else Product(tuple(part for part in parts if part is not None))
    return None


def kernels(rows: NewRows, width: float) -> Members | None:
    """Return a kernel on every row: its posterior, or else its sample, widened; None for a sample without width."""
    variance = (width * rows.value.std(0)) ** 2
    found = None if rows.q is None else widened(rows.q, variance)
    if found is None and width:
        found = Normals(rows.value, variance.sqrt().clamp(min=1e-12).expand_as(rows.value))
    return found


@dataclass(frozen=True)
class FittedNormal:
    """Normal fitted to rows, its covariance shrunk towards the diagonal where the rows are few."""

    loc: Tensor
    factor: Tensor
    """Cholesky factor of the covariance."""

    @classmethod
    def of(cls, value: Tensor) -> FittedNormal:
        """Return the normal fitted to values `(n, D)`."""
        n, dim = value.shape
        loc = value.mean(0)
        u = value - loc
        covariance, shrink = u.T @ u / n, dim / (n + dim)
        diagonal = covariance.diagonal().clamp(min=1e-12)
        covariance = (1 - shrink) * covariance
        covariance.diagonal().copy_(diagonal * (1 + 1e-9))
        return cls(loc, torch.linalg.cholesky(covariance))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(m, D)`, nats, `(m,)`."""
        u = torch.linalg.solve_triangular(self.factor, (value - self.loc).T, upper=False)
        log_det = self.factor.diagonal().log().sum()
        return -0.5 * (u.square().sum(0) + len(self.loc) * math.log(2 * math.pi)) - log_det

    def influence(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return the derivative of sum_i weight_i log N(z_i) in the weight of row j among the rows of the fit."""
        n, u = len(value), torch.linalg.solve_triangular(self.factor, (value - self.loc).T, upper=False)
        slope = (u * weight).sum(1)
        curvature = 0.5 * ((u * weight) @ u.T - weight.sum() * torch.eye(len(u), dtype=u.dtype, device=u.device))
        return (slope @ u + (u * (curvature @ u)).sum(0) - curvature.trace()) / n


def normal_without(value: Tensor) -> Tensor:
    """Return the log density of values `(n, D)` under normals fitted to the other nine tenths of them, `(n,)`."""
    part = torch.arange(len(value), device=value.device) % PARTS
    out = value.new_empty(len(value))
    for k in range(PARTS):
        out[part == k] = FittedNormal.of(value[part != k]).log_prob(value[part == k])
    return out


def mixing(scores: Tensor) -> tuple[Tensor, float]:
    """Return the log weights `(C,)` of a mixture of C densities by EM, and the mean log-likelihood, nats.

    Arguments:
        scores: log densities of rows that none of the densities knows, `(m, C)`.
    """
    log_w = scores.new_full((scores.shape[1],), -math.log(scores.shape[1]))
    for _ in range(STEPS):
        log_w = ((scores + log_w).log_softmax(1).logsumexp(0) - math.log(len(scores))).clamp(min=-30)
    return log_w, float((scores + log_w).logsumexp(1).mean())


@dataclass(frozen=True)
class Recipe:
    """Width of the kernels, and log weights of kernels, normal and p in the mixture, chosen on some rows."""

    width: float
    log_w: Tensor

    @classmethod
    def of(cls, rows: NewRows) -> Recipe:
        """Return the recipe by leave-one-out among some rows: at most `ROWS_TRIED` of them are scored."""
        n = len(rows)
        tried = torch.arange(0, n, max(1, n // ROWS_TRIED), device=rows.value.device)[:ROWS_TRIED]
        fixed = [normal_without(rows.value)[tried], rows.log_p[tried]]
        best, most = None, -math.inf
        for width in WIDTHS:
            members = kernels(rows, width)
            if members is None:
                continue
            kernel = torch.empty_like(fixed[0])
            for at, tile in tiles(members, rows.value[tried], tried):
                kernel[at] = log_sum(tile) - math.log(n - 1)
            log_w, found = mixing(torch.stack([kernel, *fixed], 1).clamp(min=-1e6))
            if best is None or found > most:
                best, most = cls(width, log_w), found
        assert best is not None  # noqa: S101 - every width above zero has kernels
        return best


@final
class KernelPrior(HonestPrior):
    """Mixture of kernels on the other rows, their posteriors widened, with one normal and the prior p."""

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        log_r, influence, weight = (torch.zeros_like(rows.own) for _ in range(3))
        apart = rows.own.new_full((len(rows), FOLDS), math.nan)
        normal, log_others = normal_without(rows.value), math.log(len(rows) - 1)
        known = [rows.rows((fold == k).nonzero()[:, 0]) for k in range(FOLDS)]
        recipes = [Recipe.of(part) for part in known]
        for k, (part, recipe) in enumerate(zip(known, recipes, strict=True)):
            w, far = recipe.log_w, FittedNormal.of(part.value)
            mine, mixed = (fold == (k - 1) % FOLDS).nonzero()[:, 0], (fold == (k - 2) % FOLDS).nonzero()[:, 0]
            rest = torch.logaddexp(w[1] + normal[mine], w[2] + rows.log_p[mine])
            within = torch.stack([torch.ones_like(fold), fold == k], 1).float()
            kernel = torch.empty_like(rows.own)
            for at, tile in tiles(kernels(rows, recipe.width), rows.value[mine], mine):
                top, e = relative(tile)
                sums = top[:, None] + (e @ within).double().log()
                i = mine[at]
                log_r[i] = torch.logaddexp(w[0] + sums[:, 0] - log_others, rest[at])
                kernel[i] = sums[:, 1]
                influence += ((w[0] + top - log_others - log_r[i]).exp().float() @ e).double()
            weight[mine] = (w[1] + normal[mine] - log_r[mine]).exp()
            for at, tile in tiles(kernels(part, recipe.width), rows.value[mixed]):
                kernel[mixed[at]] = log_sum(tile)
            i = (fold != k).nonzero()[:, 0]
            fixed = [kernel[i] - math.log(len(part)), far.log_prob(rows.value[i]), rows.log_p[i]]
            apart[i, k] = (torch.stack(fixed, 1) + w).logsumexp(1)
        influence += FittedNormal.of(rows.value).influence(rows.value, weight)
        return HonestScores(log_r, influence, apart, self._words([r.width for r in recipes]))

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        recipe = Recipe.of(train)
        fixed = [FittedNormal.of(train.value).log_prob(rows.value), rows.log_p]
        kernel = torch.empty_like(rows.own)
        for at, tile in tiles(kernels(train, recipe.width), rows.value):
            kernel[at] = log_sum(tile) - math.log(len(train))
        log_r = (torch.stack([kernel, *fixed], 1) + recipe.log_w).logsumexp(1)
        return HonestScores(log_r, torch.zeros_like(log_r), log_r[:, None], self._words([recipe.width], "train"))

    def _words(self, widths: list[float], which: str = "the other") -> str:
        found = " and ".join(f"{w:g}" for w in dict.fromkeys(widths))
        return f"kernels on {which} rows, widened by {found} standard deviations, mixed with a normal and p"
