"""Discrete latents summed over exactly: information, marginal KL, perplexity, usage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.discrete import STATES
from pvae.exponential import Codes
from pvae.pair import Pair
from pvae.traces import SiteShape, log_prob, members, samples, site_shape, sum_over

BLOCK = 2**22
"""Numbers in one block of work."""
ROWS = 8192
"""Model rows in one block of work."""


@dataclass(frozen=True)
class Positions:
    """A grid of codes position by position; exact, from the posteriors of all data."""

    information: Tensor
    """I_q[x, c_p], `(P,)`, nats."""
    marginal_kl: Tensor | None
    """KL(q_agg(c_p) || p(c_p)), `(P,)`, nats."""
    perplexity: Tensor
    """exp of the entropy of q_agg(c_p), `(P,)`: how many codes are in use, weighed."""
    dead: Tensor
    """Codes with less than a thousandth of an even share of q_agg(c_p), `(P,)`."""


@dataclass(frozen=True)
class Joint:
    """All positions together, by the sum over every joint state; nats per datum."""

    kl: Tensor
    """KL(q(c | x_i) || p(c)), `(n,)`."""
    information: Tensor
    """KL(q(c | x_i) || q_agg(c)), `(n,)`; the mean is I_q[x, c]."""


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, nats."""
    return -(log_p.exp() * log_p).sum(-1)


def positions(q: Codes, p: Codes | None) -> Positions:
    """What every position says of the data.

    Arguments:
        q: the posteriors of n rows.
        p: the prior, one member for each row, all alike; None where it is not of this kind.
    """
    mean = q.logits.exp().mean(0)
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    marginal = None if p is None else (mean * (log_mean - p.logits[0])).sum(-1)
    return Positions(
        information=entropy(log_mean) - entropy(q.logits).mean(0),
        marginal_kl=marginal,
        perplexity=entropy(log_mean).exp(),
        dead=(mean < 1e-3 / q.states).sum(-1),
    )


def joint(q: Sequence[Codes], p: Sequence[Codes]) -> Joint | None:
    """The exact parts of the KL over the joint code of several latents, or None for more than `STATES` states.

    sum_i KL(q_i || p) / n = I_q + KL(q_agg || p), all three by the sum over every joint state.

    Arguments:
        q: the posteriors of n rows, one for each latent.
        p: the priors, all rows alike.
    """
    states = every_state(q)
    if states is None:
        return None
    sizes = [part.states for part in q for _ in range(part.positions)]
    columns = [torch.nn.functional.one_hot(states[:, i], k) for i, k in enumerate(sizes)]
    one_hot = torch.cat(columns, 1).T.to(q[0].logits)
    logits = torch.cat([part.logits.flatten(1) for part in q], 1)
    blocks = logits.split(max(1, BLOCK // len(states)))
    mean = torch.stack([(rows @ one_hot).exp().sum(0) for rows in blocks]).sum(0) / len(logits)
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    log_prior = torch.cat([part.logits[0].flatten() for part in p]) @ one_hot
    kl, information = [], []
    for rows in blocks:
        log_q = rows @ one_hot
        kl.append((log_q.exp() * (log_q - log_prior)).sum(1))
        information.append((log_q.exp() * (log_q - log_mean)).sum(1))
    return Joint(torch.cat(kl), torch.cat(information))


def every_state(q: Sequence[Codes]) -> Tensor | None:
    """All joint states of several grids of codes, `(S, positions)`; None for more than `STATES`."""
    sizes = [part.states for part in q for _ in range(part.positions)]
    if math.prod(sizes) > STATES:
        return None
    return torch.cartesian_prod(*[torch.arange(k) for k in sizes]).reshape(-1, len(sizes))


def log_evidence(pair: Pair, x: Tensor) -> Tensor | None:
    """log p(x) = log sum_c p(x, c) of every datum by running the model on every joint state, `(n,)`, nats, exact.

    None where a latent of the guide is not discrete, or there are more than `STATES` states. Call it inside `quiet`.
    """
    layout, names = pair.layout, pair.layout.latents
    nodes = samples(pair.guide_trace(x[:2]))
    q = [members(nodes[name], layout, len(x[:2])) for name in names]
    grids = [part for part in q if isinstance(part, Codes)]
    states = every_state(grids) if grids and len(grids) == len(q) else None
    if states is None:
        return None
    pieces = states.to(x.device).split([part.positions for part in grids], 1)
    values = {
        name: (site_shape(nodes[name], layout), part.write(index).to(nodes[name]["value"]))
        for name, part, index in zip(names, grids, pieces, strict=True)
    }
    rows = max(1, ROWS // len(states))
    return torch.cat([_log_sum(pair, part, values, len(states)) for part in x.split(rows)])


def _log_sum(pair: Pair, x: Tensor, values: Mapping[str, tuple[SiteShape, Tensor]], count: int) -> Tensor:
    """log sum over states of some rows: every state beside every row, as rows of one batch, block by block."""
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for block in torch.arange(count, device=x.device).split(max(1, ROWS // len(x))):
        tiled = x.repeat(len(block), *(1,) * (x.dim() - 1))
        fixed = {n: shape.spread(flat[block].repeat_interleave(len(x), 0)) for n, (shape, flat) in values.items()}
        nodes = samples(pair.model_trace(tiled, fixed))
        sites = [log_prob(node, pair.layout, 0).double() for node in nodes.values() if pair.layout.holds(node)]
        total = torch.logaddexp(total, sum_over(sites).reshape(len(block), len(x)).logsumexp(0))
    return total
