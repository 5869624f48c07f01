"""Channels from x to discrete codes whose I_pi and M = KL(q_pi || p) are sums over all states."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.analysis.population.codes import Grid
from pvae.analysis.population.sample import NewRows
from pvae.distributions.exponential_codes import CertainCodes, Codes


@dataclass(frozen=True)
class CodeChannel:
    draw: Callable[[int], NewRows]
    gain: float
    information: float
    grids: tuple[Grid, ...]


def enumerated(inputs: int, positions: int, states: int, sharp: float, seed: int) -> CodeChannel:
    """Inputs of unequal probabilities, in four clusters; factorised posteriors of codes, a uniform prior."""
    g = torch.Generator().manual_seed(seed)
    centre = 1.5 * torch.randn(4, positions, states, generator=g).double()
    own = sharp * torch.randn(inputs, positions, states, generator=g).double()
    logits = (centre[torch.randint(4, (inputs,), generator=g)] + own).log_softmax(-1)
    chance = torch.randn(inputs, generator=g).double().softmax(0)
    every = torch.cartesian_prod(*[torch.arange(states)] * positions).reshape(-1, positions)
    log_q = logits[:, torch.arange(positions), every].sum(2)
    mean = (chance[:, None] * log_q.exp()).sum(0)
    log_p = -positions * math.log(states)

    def draw(n: int) -> NewRows:
        q = Codes(logits[torch.multinomial(chance, n, replacement=True)])
        value = q.sample()
        kl = (q.logits.exp() * (q.logits + math.log(states))).sum((1, 2))
        return NewRows(value, q.log_prob(value), torch.full((n,), log_p).double(), kl, q)

    gain = float((mean * (mean.log() - log_p)).sum())
    information = float((chance[:, None] * log_q.exp() * (log_q - mean.log())).sum())
    return CodeChannel(draw, gain, information, (Grid(positions, states, positions),))


def certain(index: Tensor, log_p: float, states: int) -> NewRows:
    """Rows of deterministic codes `(n, P)` under a prior of equal probabilities."""
    n = len(index)
    zero, log_prior = torch.zeros(n).double(), torch.full((n,), log_p).double()
    return NewRows(index.double(), zero, log_prior, -log_prior, CertainCodes(index, states))


def zipf(states: int, power: float = 1.0) -> CodeChannel:
    """One deterministic code with probabilities k^-power, a uniform prior."""
    chance = torch.arange(1, states + 1).double() ** -power
    chance /= chance.sum()

    def draw(n: int) -> NewRows:
        return certain(torch.multinomial(chance, n, replacement=True)[:, None], -math.log(states), states)

    entropy = float(torch.special.entr(chance).sum())
    return CodeChannel(draw, math.log(states) - entropy, entropy, (Grid(1, states, 1),))


def by_class(classes: int, positions: int, states: int, seed: int = 5) -> CodeChannel:
    """Deterministic codes from a mixture of products over positions; entropy by a sum over 200 000 samples."""
    g = torch.Generator().manual_seed(seed)
    theta = (1.5 * torch.randn(classes, positions, states, generator=g)).double().softmax(-1)
    log_p = -positions * math.log(states)

    def draw(n: int) -> NewRows:
        return certain(torch.distributions.Categorical(theta[torch.randint(classes, (n,))]).sample(), log_p, states)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codes = draw(200_000).value.long()
    scores = torch.stack([t.log()[torch.arange(positions), codes].sum(1) for t in theta], 1)
    entropy = math.log(classes) - float(scores.logsumexp(1).mean())
    return CodeChannel(draw, -log_p - entropy, entropy, (Grid(positions, states, positions),))
