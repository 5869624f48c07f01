"""Discrete latents summed over exactly: information, marginal KL, perplexity, usage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.enumeration import STATES
from pvae.exponential import Codes

BLOCK = 2**22
"""Numbers in one block of work."""


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
    sizes = [part.states for part in q for _ in range(part.positions)]
    if math.prod(sizes) > STATES:
        return None
    states = torch.cartesian_prod(*[torch.arange(k) for k in sizes]).reshape(-1, len(sizes))
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
