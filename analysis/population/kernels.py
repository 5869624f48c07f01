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

WIDTHS = (0.0, 0.1, 0.17, 0.24, 0.34, 0.48, 0.68)
"""Widths b that are tried: a kernel has the variance of its posterior plus b^2 var(z)."""
WORSE = 0.02
"""Loss of log-likelihood, nats, after which no larger width is tried."""
ROWS_TRIED = 300
"""Largest number of rows on which the width and the weights are chosen."""
LARGE = 0.05
"""Share of a kernel in a density from which its loss is not taken to be its derivative."""
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


def kernels(rows: NewRows, variance: Tensor) -> Members:
    """Return a kernel on every row: its posterior with a variance `(D,)` added, or a normal around its sample."""
    found = None if rows.q is None else widened(rows.q, variance)
    return Normals(rows.value, variance.sqrt().clamp(min=1e-12).expand_as(rows.value)) if found is None else found


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
        log_w = (scores + log_w).softmax(1).mean(0).clamp(min=1e-12).log()
    return log_w, float((scores + log_w).logsumexp(1).mean())


@dataclass(frozen=True)
class Recipe:
    """Width of the kernels, and log weights of kernels, normal and p in the mixture, chosen on some rows."""

    width: float
    variance: Tensor
    """Square of width times standard deviation of every coordinate, `(D,)`."""
    log_w: Tensor

    @classmethod
    def of(cls, rows: NewRows) -> Recipe:
        """Return the recipe by leave-one-out among some rows: at most `ROWS_TRIED` of them are scored."""
        n = len(rows)
        tried = torch.arange(0, n, max(1, n // ROWS_TRIED), device=rows.value.device)[:ROWS_TRIED]
        fixed = [normal_without(rows.value)[tried], rows.log_p[tried]]
        best, most = None, -math.inf
        for width in WIDTHS:
            variance = (width * rows.value.std(0)) ** 2
            members = kernels(rows, variance)
            kernel = torch.empty_like(fixed[0])
            for at, tile in tiles(members, rows.value[tried], tried):
                kernel[at] = log_sum(tile) - math.log(n - 1)
            log_w, found = mixing(torch.stack([kernel, *fixed], 1).clamp(min=-1e6))
            if best is None or found > most:
                best, most = cls(width, variance, log_w), found
            elif found < most - WORSE:
                break
        assert best is not None  # noqa: S101 - every width above zero has kernels
        return best


def lost(e: Tensor, scale: Tensor) -> Tensor:
    """Return the sum over samples of what log r loses without kernel j, -log(1 - share), `(n,)`, float64.

    The derivative in its weight, the share itself, is too small where one kernel makes most of a density.

    Arguments:
        e: terms of the samples' densities, `(k, n)`, float32.
        scale: factor that makes them shares, `(k,)`.
    """
    out = (scale @ e).double()
    some = (scale > LARGE).nonzero()[:, 0]  # the largest term is 1
    i, j = (e[some] > LARGE / scale[some, None]).nonzero(as_tuple=True)
    i = some[i]
    share = (e[i, j] * scale[i]).double().clamp(max=1 - 1e-12)
    return out.index_add_(0, j, -torch.log1p(-share) - share)


@final
class KernelPrior(HonestPrior):
    """Mixture of kernels on the other rows, their posteriors widened, with one normal and the prior p."""

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        log_r, apart, influence, weight = (torch.zeros_like(rows.own) for _ in range(4))
        normal, log_others, widths = normal_without(rows.value), math.log(len(rows) - 1), []
        for k in range(FOLDS):
            known = (fold == k).nonzero()[:, 0]
            mine, part = (fold == (k - 1) % FOLDS).nonzero()[:, 0], rows.rows(known)
            recipe = Recipe.of(part)
            w, start, stop = recipe.log_w, int(known[0]), int(known[-1]) + 1
            rest = torch.logaddexp(w[1] + normal[mine], w[2] + rows.log_p[mine])
            far = torch.logaddexp(
                w[1] + FittedNormal.of(part.value).log_prob(rows.value[mine]), w[2] + rows.log_p[mine]
            )
            for at, tile in tiles(kernels(rows, recipe.variance), rows.value[mine], mine):
                top, e = relative(tile)
                within = e[:, start:stop].sum(1).double()
                total = within + e[:, :start].sum(1).double() + e[:, stop:].sum(1).double()
                i = mine[at]
                log_r[i] = torch.logaddexp(w[0] + top + total.log() - log_others, rest[at])
                apart[i] = torch.logaddexp(w[0] + top + within.log() - math.log(len(part)), far[at])
                influence += lost(e, (w[0] + top - log_others - log_r[i]).exp().float())
            weight[mine] = (w[1] + normal[mine] - log_r[mine]).exp()
            widths.append(recipe.width)
        influence += FittedNormal.of(rows.value).influence(rows.value, weight)
        return HonestScores(log_r, influence, apart, self._words(widths))

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        recipe = Recipe.of(train)
        fixed = [FittedNormal.of(train.value).log_prob(rows.value), rows.log_p]
        kernel = torch.empty_like(rows.own)
        for at, tile in tiles(kernels(train, recipe.variance), rows.value):
            kernel[at] = log_sum(tile) - math.log(len(train))
        log_r = (torch.stack([kernel, *fixed], 1) + recipe.log_w).logsumexp(1)
        return HonestScores(log_r, torch.zeros_like(log_r), log_r, self._words([recipe.width], "train"))

    def _words(self, widths: list[float], which: str = "the other") -> str:
        found = " and ".join(f"{w:g}" for w in dict.fromkeys(widths))
        return f"kernels on {which} rows, widened by {found} standard deviations, mixed with a normal and p"
