"""Priors of real latents made of other rows: kernels, a normal, a mixture of normals and a flow, mixed with p."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.analysis.population.sample import FOLDS, HonestPrior, HonestScores, NewRows, mixture_weights
from pvae.analysis.population.sweep import log_mean, relative, tiles
from pvae.distributions import FullRankNormals, Members, Normals, Product
from pvae.util import group, seeds

WIDTHS = (0.0, 0.1, 0.17, 0.24, 0.34, 0.48, 0.68)
"""Widths b that are tried: a kernel has the variance of its posterior plus b^2 var(z)."""
WORSE = 0.02
"""Loss of log-likelihood, nats, after which no larger width is tried."""
ROWS_TRIED = 300
"""Largest number of rows on which the width and the weights are chosen."""
SINGLE = 1e4
"""Squared distance from 0, in widths, up to which kernels are computed in single precision."""
LARGE = 0.05
"""Share of a kernel in a density from which its loss is not taken to be its derivative."""
PARTS = 10
"""Number of parts of the rows, each scored under a normal fitted to the others."""
STEPS = 50
"""Number of EM steps for the weights of a mixture."""
HELD_OUT, HELD_OUT_MOST = 10, 2000
"""A tenth of the train rows, at most 2000, are held out for the choice of K, the flow's last step and the weights."""
CLUSTERS = (5, 20, 50)
"""Numbers of normals K that are tried in a mixture."""
CLUSTER_ROWS = 10_000
"""Largest number of rows that a mixture of normals is fitted to."""
COUPLINGS, HIDDEN, FLOW_STEPS, BATCH = 6, 128, 2000, 512
"""Size and training of the flow."""

Density = Callable[[Tensor], Tensor]
"""Function that returns the log densities of values `(m, D)`, nats, `(m,)`."""


def widened(q: Members, variance: Tensor) -> Members | None:
    """Return normal posteriors with a variance added to every coordinate, `(D,)`; None for other families."""
    if isinstance(q, Normals):
        return replace(q, scale=(q.scale**2 + variance).sqrt())
    if isinstance(q, FullRankNormals):
        return replace(q, scale_tril=torch.linalg.cholesky(q.scale_tril @ q.scale_tril.mT + torch.diag(variance)))
    if isinstance(q, Product):
        parts = [widened(part, v) for part, v in zip(q.parts, q.split(variance), strict=True)]
        return None if None in parts else Product(tuple(part for part in parts if part is not None))
    return None


def kernels(rows: NewRows, variance: Tensor) -> Members:
    """Return a kernel on every row: its posterior with a variance `(D,)` added, or a normal around its sample.

    They are of single precision where the terms of their log densities are below `SINGLE`: to about 1e-3 nats.
    """
    found = None if rows.q is None else widened(rows.q, variance)
    if found is None:
        found = Normals(rows.value, variance.sqrt().clamp(min=1e-12).expand_as(rows.value))
    single = isinstance(found, Normals) and bool((rows.value.square() / variance).sum(1).max() < SINGLE)
    return found.map(Tensor.float) if single else found


class FittedNormal(torch.distributions.MultivariateNormal):
    """Normal fitted to values `(n, D)`, its covariance shrunk towards the diagonal where they are few."""

    def __init__(self, value: Tensor) -> None:
        n, dim = value.shape
        u = value - value.mean(0)
        covariance = u.T @ u / (n + dim)
        covariance.diagonal().mul_((n + dim) / n).clamp_(min=1e-12).mul_(1 + 1e-9)
        super().__init__(value.mean(0), scale_tril=torch.linalg.cholesky(covariance), validate_args=False)

    def influence(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return the derivative of sum_i weight_i log N(z_i) in the weight of row j among the rows of the fit."""
        n, u = len(value), torch.linalg.solve_triangular(self.scale_tril, (value - self.loc).T, upper=False)
        slope = (u * weight).sum(1)
        curvature = 0.5 * ((u * weight) @ u.T - weight.sum() * torch.eye(len(u), dtype=u.dtype, device=u.device))
        return (slope @ u + (u * (curvature @ u)).sum(0) - curvature.trace()) / n


def normal_without(value: Tensor) -> Tensor:
    """Return the log density of values `(n, D)` under normals fitted to the other nine tenths of them, `(n,)`."""
    part = torch.arange(len(value), device=value.device) % PARTS
    out = value.new_empty(len(value))
    for k in range(PARTS):
        out[part == k] = FittedNormal(value[part != k]).log_prob(value[part == k])
    return out


class Recipe(NamedTuple):
    """Width of the kernels, and log weights of kernels, normal and p in the mixture, chosen on some rows."""

    width: float
    variance: Tensor
    """Square of width times standard deviation of every coordinate, `(D,)`."""
    log_w: Tensor


def recipe(rows: NewRows) -> Recipe:
    """Return the recipe by leave-one-out among some rows: at most `ROWS_TRIED` of them are scored."""
    n, found = len(rows), []
    tried = torch.arange(0, n, max(1, n // ROWS_TRIED), device=rows.value.device)[:ROWS_TRIED]
    fixed = [normal_without(rows.value)[tried], rows.log_p[tried]]
    for width in WIDTHS:
        variance = (width * rows.value.std(0)) ** 2
        scores = torch.stack([log_mean(kernels(rows, variance), rows.value[tried], tried), *fixed], 1).clamp(min=-1e6)
        log_w = mixture_weights(scores, steps=STEPS)
        found.append((float((scores + log_w).logsumexp(1).mean()), Recipe(width, variance, log_w)))
        if found[-1][0] < max(found, key=itemgetter(0))[0] - WORSE:
            break
    return max(found, key=itemgetter(0))[1]


def made_of(rows: NewRows, chosen: Recipe) -> dict[str, Density]:
    """Return the densities made of rows, kernels on each and a normal, by their names."""
    members = kernels(rows, chosen.variance)
    name = f"kernels on train rows (widened by {chosen.width:g})"
    return {name: lambda z: log_mean(members, z), "one normal": FittedNormal(rows.value).log_prob}


def _scores(parts: dict[str, Density], rows: NewRows) -> Tensor:
    """Return log densities of rows under every part, and under p, `(m, C)`."""
    return torch.stack([*(part(rows.value) for part in parts.values()), rows.log_p], 1).clamp(min=-1e6)


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


class KernelPrior(HonestPrior):
    """Mixture of kernels on the other rows, their posteriors widened, with one normal and the prior p."""

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        if train is not None:
            chosen = recipe(train)
            log_r = (_scores(made_of(train, chosen), rows) + chosen.log_w).logsumexp(1)
            return HonestScores(log_r, torch.zeros_like(log_r), log_r, _words([chosen.width], "train"))
        log_r, apart, influence, weight = (torch.zeros_like(rows.own) for _ in range(4))
        normal, log_others, widths = normal_without(rows.value), math.log(len(rows) - 1), []
        for k in range(FOLDS):
            known = (fold == k).nonzero()[:, 0]
            mine, part = (fold == (k - 1) % FOLDS).nonzero()[:, 0], rows.rows(known)
            width, variance, w = recipe(part)
            start, stop = int(known[0]), int(known[-1]) + 1
            rest = torch.logaddexp(w[1] + normal[mine], w[2] + rows.log_p[mine])
            far = torch.logaddexp(w[1] + FittedNormal(part.value).log_prob(rows.value[mine]), w[2] + rows.log_p[mine])
            for at, tile in tiles(kernels(rows, variance), rows.value[mine], mine):
                top, e = relative(tile)
                within, i = e[:, start:stop].sum(1).double(), mine[at]
                total = within + e[:, :start].sum(1).double() + e[:, stop:].sum(1).double()
                log_r[i] = torch.logaddexp(w[0] + top + total.log() - log_others, rest[at])
                apart[i] = torch.logaddexp(w[0] + top + within.log() - math.log(len(part)), far[at])
                influence += lost(e, (w[0] + top - log_others - log_r[i]).exp().float())
            for each in (log_r, apart):
                group.add_up(found := each[mine])
                each[mine] = found
            weight[mine] = (w[1] + normal[mine] - log_r[mine]).exp()
            widths.append(width)
        group.add_up(influence)
        influence += FittedNormal(rows.value).influence(rows.value, weight)
        return HonestScores(log_r, influence, apart, _words(widths))


def _words(widths: list[float], which: str = "the other") -> str:
    found = " and ".join(f"{w:g}" for w in dict.fromkeys(widths))
    return f"kernels on {which} rows, widened by {found} standard deviations, mixed with a normal and p"


class FullPrior(HonestPrior):
    """Mixture of kernels on all train rows, one normal, a mixture of normals, a flow and the prior p.

    Every part is fitted to train rows; the weights are those of most likelihood on train rows held out. Without train
    rows it is a `KernelPrior`.
    """

    seed: int = 0
    """Seed of the held-out rows, and of the fits of the mixture and the flow."""

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        if train is None:
            return KernelPrior().scored(rows, fold)
        n, generator = len(train), torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n, generator=generator).to(train.value.device)
        count = min(HELD_OUT_MOST, max(1, n // HELD_OUT))
        held, fit = train.rows(order[:count]), train.rows(order[count:])
        parts, normals = made_of(fit, recipe(fit)), best_mixture(fit.value, held.value, self.seed)
        score = normals.score_samples
        parts[f"a mixture of {normals.n_components} normals"] = lambda z: torch.from_numpy(score(z.cpu().numpy())).to(z)
        if train.value.shape[1] > 1:
            parts["a flow"] = fitted_flow(fit.value, held.value, self.seed)
        log_w = mixture_weights(_scores(parts, held), steps=STEPS)
        log_r = (_scores(parts, rows) + log_w).logsumexp(1)
        weights = sorted(zip(log_w.exp().tolist(), [*parts, "p"], strict=True), reverse=True)
        words = " and ".join(f"{w:.2f} of {name}" for w, name in weights if w >= 0.005)
        return HonestScores(log_r, torch.zeros_like(log_r), log_r, f"a mixture made of train rows, {words}")


def best_mixture(value: Tensor, held: Tensor, seed: int) -> Any:
    """Return scikit-learn's mixture of K normals, fitted to values `(n, D)`, that gives `held` most likelihood."""
    from sklearn.mixture import GaussianMixture

    chosen, found = value[:CLUSTER_ROWS].cpu().numpy(), []
    floor = 1e-3 * float(value.var(0).mean())
    for k in CLUSTERS:
        if len(chosen) >= 2 * k:
            fitted = GaussianMixture(k, reg_covar=floor, max_iter=50, tol=1e-2, random_state=seed % 2**32).fit(chosen)
            found.append((fitted.score(held.cpu().numpy()), k, fitted))
    return max(found, key=lambda each: each[0])[2]


def fitted_flow(value: Tensor, held: Tensor, seed: int) -> Density:
    """Return a flow of affine couplings fitted to values `(n, D)` by maximum likelihood, as its log density.

    It is taken at the step that gives `held` most likelihood.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803
    """
    device, dim, single = value.device, value.shape[1], value.float()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.enable_grad():
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 7), torch.device("cpu"))
        steps: list[Any] = []
        for _ in range(COUPLINGS):
            coupling = dist.transforms.affine_coupling(dim, [HIDDEN] * 2, log_scale_min_clip=-2, log_scale_max_clip=2)
            for parameter in coupling.nn.layers[-1].parameters():
                nn.init.zeros_(parameter)
            steps += [coupling.to(device), dist.transforms.Permute(torch.randperm(dim).to(device))]
        couplings = nn.ModuleList(steps[::2])
        steps.append(dist.transforms.AffineTransform(single.mean(0), single.std(0).clamp(min=1e-6), 1))
        flow = dist.TransformedDistribution(dist.Normal(single.new_zeros(dim), 1.0).to_event(1), steps)
        optimizer = torch.optim.Adam(couplings.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FLOW_STEPS)
        best, kept = -math.inf, couplings.state_dict()
        for step in range(FLOW_STEPS):
            optimizer.zero_grad()
            (-flow.log_prob(single[torch.randint(len(single), (BATCH,)).to(device)]).mean()).backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                with torch.no_grad():
                    found = float(flow.log_prob(held.float()).mean())
                if found > best:
                    best, kept = found, deepcopy(couplings.state_dict())
    couplings.load_state_dict(kept)
    couplings.requires_grad_(False)
    return lambda z: flow.log_prob(z.float()).to(z)
