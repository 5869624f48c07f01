"""Aggregated posteriors of single coordinates of a normal latent, by interpolation on grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PER_SCALE = 8
"""Number of grid points per standard deviation of the narrowest component in an octave of scales."""
REACH = 8.5
"""Number of standard deviations beyond which a component is neglected (2e-16 of its peak)."""
CELLS = 2**23
"""Largest number of points of one grid; a coordinate that needs more is computed by the exact sum over all
components."""
DRAWS_CHECKED = 32
"""Number of samples for which interpolated densities are compared with exact sums over all components."""
PAIRS_IN_A_BLOCK = 2**21
"""Largest number of pairs of value and component that are computed at once."""


def marginal_log_prob(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    r"""Return log q_agg(z_d) = log 1/n sum_i N(z_d; loc_id, scale_id^2) for every coordinate d.

    All pairs cost n m D exponentials. Here the components of a coordinate are sorted by octave of scale, every
    octave is summed on a grid of its own (`PER_SCALE` points to its narrowest standard deviation, each component
    only where it is not zero), and the density at z is read off by cubic interpolation: time grows with n + m.

    The error is that of the interpolation, (h / s)^4 of a density's fourth derivative: at most 2e-5 of a component's
    peak; `tests/bench/qagg.py` and `Surgery.notes` give what it is on the data.

    Arguments:
        loc: posterior means of the n components, `(n, D)`.
        scale: posterior standard deviations, `(n, D)`.
        value: samples to score, `(m, D)`.

    Returns:
        log q_agg(z_d), `(m, D)`, nats, an approximation of the exact sum.
    """
    out = torch.empty_like(value)
    for d in range(value.shape[1]):
        out[:, d] = _coordinate(loc[:, d].contiguous(), scale[:, d].contiguous(), value[:, d].contiguous())
    return out


def grid_error(loc: Tensor, scale: Tensor, value: Tensor, found: Tensor) -> float:
    """Return the largest error of the log densities `found`, nats, against exact sums for a few rows of `value`."""
    few = torch.linspace(0, len(value) - 1, min(DRAWS_CHECKED, len(value)), device=value.device).long()
    exact = torch.stack([all_pairs(loc[:, d], scale[:, d], value[few, d]) for d in range(value.shape[1])], 1)
    return float((exact - found[few]).abs().max())


def all_pairs(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """Return log q_agg(z) of one coordinate at values `(m,)`, nats, by the exact sum over all n normal components."""
    constant = -scale.log() - 0.5 * math.log(2 * math.pi) - math.log(len(loc))
    rows = max(1, PAIRS_IN_A_BLOCK // len(loc))
    parts = [(constant - 0.5 * ((z[:, None] - loc) / scale) ** 2).logsumexp(1) for z in value.split(rows)]
    return torch.cat(parts)


def _coordinate(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-150)
    octave = scale.log2().floor()
    total = torch.zeros_like(value)
    for k in octave.unique().tolist():
        chosen = octave == k
        step, m, s = 2.0**k / PER_SCALE, loc[chosen], scale[chosen]
        reach = math.ceil(REACH * 2 * PER_SCALE) + 2
        low = float(m.min()) - reach * step
        if (float(m.max()) - low) / step + reach + 3 > CELLS:
            return all_pairs(loc, scale, value)
        total += _interpolated(_grid(m, s, low, step, reach), (value - low) / step)
    return (total / len(loc)).log()


def _grid(loc: Tensor, scale: Tensor, low: float, step: float, reach: int) -> Tensor:
    """Return the sum of the normal densities of all components at the grid points `low + step * j`."""
    nearest = ((loc - low) / step).round().long()
    grid = loc.new_zeros(int(nearest.max()) + reach + 3)
    offsets = torch.arange(-reach, reach + 1, device=loc.device)
    for rows in torch.arange(len(loc), device=loc.device).split(max(1, PAIRS_IN_A_BLOCK // len(offsets))):
        at = nearest[rows, None] + offsets
        inverse = 1 / scale[rows, None]
        u = (at.to(loc) * step).add_(low - loc[rows, None]).mul_(inverse)
        density = u.square_().mul_(-0.5).exp_().mul_(inverse / math.sqrt(2 * math.pi))
        grid.index_add_(0, at.reshape(-1), density.reshape(-1))
    return grid


def _interpolated(grid: Tensor, position: Tensor) -> Tensor:
    """Return grid values at fractional positions by cubic Lagrange interpolation; zero off the grid."""
    base = position.floor()
    t, left = position - base, base.long() - 1
    inside = (left >= 0) & (left + 3 < len(grid))
    left = left.clamp(0, len(grid) - 4)
    weights = (
        -t * (t - 1) * (t - 2) / 6,
        (t + 1) * (t - 1) * (t - 2) / 2,
        -(t + 1) * t * (t - 2) / 2,
        (t + 1) * t * (t - 1) / 6,
    )
    value = sum(w * grid[left + j] for j, w in enumerate(weights))
    return torch.where(inside, torch.as_tensor(value).clamp(min=0), 0.0)
