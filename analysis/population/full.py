"""The closest prior of real latents that train rows give: kernels, a normal, a mixture of normals and a flow, mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from pvae.analysis.population.kernels import FittedNormal, KernelPrior, Recipe, kernels, mixing
from pvae.analysis.population.sample import HonestPrior, HonestScores, NewRows
from pvae.analysis.population.sweep import log_sum, tiles
from pvae.util import seeds

HELD_OUT, HELD_OUT_MOST = 10, 2000
"""A tenth of the train rows, at most 2000, are held out for the choice of K, the flow's last step and the weights."""
CLUSTERS = (5, 20, 50)
"""Numbers of normals K that are tried in a mixture."""
CLUSTER_ROWS = 10_000
"""Largest number of rows that a mixture of normals is fitted to."""
COUPLINGS, HIDDEN, STEPS, BATCH = 6, 128, 2000, 512
"""Size and training of the flow."""

Density = Callable[[Tensor], Tensor]
"""Function that returns the log densities of values `(m, D)`, nats, `(m,)`."""


@final
class FullPrior(HonestPrior):
    """Mixture of kernels on all train rows, one normal, a mixture of normals, a flow and the prior p.

    Every part is fitted to train rows; the weights are those of most likelihood on train rows held out. Without train
    rows it is a `KernelPrior`.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def crossed(self, rows: NewRows, fold: Tensor) -> HonestScores:
        return KernelPrior().crossed(rows, fold)

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        n, generator = len(train), torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n, generator=generator).to(train.value.device)
        count = min(HELD_OUT_MOST, max(1, n // HELD_OUT))
        held, fit = train.rows(order[:count]), train.rows(order[count:])
        recipe = Recipe.of(fit)
        members, normals = kernels(fit, recipe.variance), best_mixture(fit.value, held.value, self.seed)
        parts: dict[str, Density] = {
            f"kernels on train rows (widened by {recipe.width:g})": lambda z: (
                torch.cat([log_sum(tile) for _, tile in tiles(members, z)]) - math.log(len(members))
            ),
            "one normal": FittedNormal.of(fit.value).log_prob,
            f"a mixture of {normals.n_components} normals": lambda z: torch.from_numpy(
                normals.score_samples(z.cpu().numpy())
            ).to(z),
        }
        if train.value.shape[1] > 1:
            parts["a flow"] = fitted_flow(fit.value, held.value, self.seed).log_prob
        log_w, _ = mixing(_scores(parts, held))
        log_r = (_scores(parts, rows) + log_w).logsumexp(1)
        weights = sorted(zip(log_w.exp().tolist(), [*parts, "p"], strict=True), reverse=True)
        words = " and ".join(f"{w:.2f} of {name}" for w, name in weights if w >= 0.005)
        return HonestScores(log_r, torch.zeros_like(log_r), log_r, f"a mixture made of train rows, {words}")


def _scores(parts: dict[str, Density], rows: NewRows) -> Tensor:
    """Return log densities of rows under every part, and under p, `(m, C)`."""
    return torch.stack([*(part(rows.value) for part in parts.values()), rows.log_p], 1).clamp(min=-1e6)


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


class DensityFlow(nn.Module):
    """Affine couplings of standardised values, each of one half of the coordinates given the other, at random.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803
    """

    loc: Tensor
    scale: Tensor
    order: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        dim = value.shape[1]
        self.kept = dim // 2
        self.register_buffer("loc", value.mean(0))
        self.register_buffer("scale", value.std(0).clamp(min=1e-6))
        self.register_buffer("order", torch.stack([torch.randperm(dim) for _ in range(COUPLINGS)]))
        self.nets = nn.ModuleList()
        for _ in range(COUPLINGS):
            last = nn.Linear(HIDDEN, 2 * (dim - self.kept))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(self.kept, HIDDEN)
            self.nets.append(nn.Sequential(first, nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), last))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(m, D)`, nats, `(m,)`."""
        z = (value.to(self.loc) - self.loc) / self.scale
        log_det = -self.scale.log().sum().expand(len(z))
        for order, net in zip(self.order, self.nets, strict=True):
            z = z[:, order]
            kept, moved = z[:, : self.kept], z[:, self.kept :]
            shift, raw = net(kept).chunk(2, 1)
            log_scale = 2 * torch.tanh(raw / 2)
            z = torch.cat([kept, moved * log_scale.exp() + shift], 1)
            log_det = log_det + log_scale.sum(1)
        return (log_det - 0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))).to(value.dtype)


def fitted_flow(value: Tensor, held: Tensor, seed: int) -> DensityFlow:
    """Return a flow fitted to values `(n, D)` by maximum likelihood, at the step that gives `held` most likelihood."""
    device = value.device
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.enable_grad():
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 7), torch.device("cpu"))
        single = value.float()
        flow = DensityFlow(single.cpu()).to(device)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        best, kept = -math.inf, {name: t.clone() for name, t in flow.state_dict().items()}
        for step in range(STEPS):
            rows = torch.randint(len(single), (BATCH,)).to(device)
            optimizer.zero_grad()
            loss = -flow.log_prob(single[rows]).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                with torch.no_grad():
                    found = float(flow.log_prob(held.float()).mean())
                if found > best:
                    best, kept = found, {name: t.clone() for name, t in flow.state_dict().items()}
    flow.load_state_dict(kept)
    return flow.requires_grad_(False)
