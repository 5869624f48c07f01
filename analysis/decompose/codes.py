"""Exact mutual information, marginal KL and log p(x) of discrete latents, and duplicates in a codebook."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pvae.distributions import MAX_STATES, CertainCodes, Codes, Members
from pvae.pair import Pair, SiteShape, is_masked, log_prob, members, samples, sum_over, tiled
from pvae.util import Record

NUMBERS_AT_ONCE = 2**22
"""Largest number of tensor elements in one block of a computation."""
MODEL_ROWS_AT_ONCE = 8192
"""Largest number of rows in one run of the model."""
DUPLICATE_DISTANCE = 1e-2
"""Distance below which two rows of a codebook are duplicates, as a proportion of the root mean squared distance."""
IMPOSSIBLE_NATS = 1e12
"""KL, nats, above which it is infinite: the prior gives a code probability zero, stored as log probability -1e30."""


class JointCodes(Record):
    """Exact KL and mutual information of the joint code of all grid positions, by row, nats."""

    kl: Tensor
    """KL of posterior to prior for every row, KL(q(c | x_i) || p(c)), `(n,)`."""
    information: Tensor
    """KL of posterior to aggregated posterior for every row, KL(q(c | x_i) || q_agg(c)), `(n,)`; the mean is I_q[x,
    c]."""


def duplicates(table: Tensor) -> Tensor:
    """Return the indices of the rows of a codebook `(k, E)` that nearly coincide with another row."""
    table = table.detach().double()
    if len(table) < 2:
        return torch.zeros(0, dtype=torch.int64, device=table.device)
    centred = table - table.mean(0)
    typical = (2 * centred.square().sum() / (len(table) - 1)).sqrt()
    nearest = []
    for start in range(0, len(table), rows := max(1, NUMBERS_AT_ONCE // len(table))):
        apart = torch.cdist(centred[start : start + rows], centred, compute_mode="donot_use_mm_for_euclid_dist")
        apart[torch.arange(len(apart)), torch.arange(start, start + len(apart))] = torch.inf
        nearest.append(apart.amin(1))
    return (torch.cat(nearest) <= DUPLICATE_DISTANCE * typical).nonzero()[:, 0]


def joint_codes(q: Callable[[], Iterable[Sequence[Codes]]], priors: Sequence[Tensor]) -> JointCodes | None:
    """Return exact KL and information of the joint code of several latents; None for more than `MAX_STATES` states.

    sum_i KL(q_i || p) / n = I_q + KL(q_agg || p), all three by the sum over every joint state.

    Arguments:
        q: function that yields the posteriors of all rows by batches, one for every latent in each; called twice.
        priors: log p(c_p = k) of every latent, `(P, K)`, the same for all rows.
    """
    if (states := every_state([(len(p), p.shape[1]) for p in priors])) is None:
        return None
    sizes = [p.shape[1] for p in priors for _ in range(len(p))]
    one_hot = torch.cat([torch.nn.functional.one_hot(states[:, i], k) for i, k in enumerate(sizes)], 1).T.to(priors[0])
    total, n = priors[0].new_zeros(len(states)), 0
    for rows in _blocks(q(), len(states)):
        total += (rows @ one_hot).exp().sum(0)
        n += len(rows)
    log_mean = (total / n).clamp(min=torch.finfo(total.dtype).tiny).log()
    log_prior = torch.cat([p.flatten() for p in priors]) @ one_hot
    kl, information = [], []
    for rows in _blocks(q(), len(states)):
        log_q = rows @ one_hot
        kl.append((log_q.exp() * (log_q - log_prior)).sum(1))
        information.append((log_q.exp() * (log_q - log_mean)).sum(1))
    return JointCodes(torch.cat(kl), torch.cat(information))


def _blocks(q: Iterable[Sequence[Codes]], states: int) -> Iterator[Tensor]:
    """Yield the log probabilities of all codes for blocks of rows, `(rows, sum P K)`."""
    for parts in q:
        yield from torch.cat([part.logits.flatten(1) for part in parts], 1).split(max(1, NUMBERS_AT_ONCE // states))


def every_state(grids: Sequence[tuple[int, int]]) -> Tensor | None:
    """Return all S joint states of grids with P positions of K codes each, `(S, sum P)`; None for S > `MAX_STATES`."""
    sizes = [k for p, k in grids for _ in range(p)]
    if sum(math.log(k) for k in sizes) > math.log(MAX_STATES) + 1e-9:
        return None
    return torch.cartesian_prod(*[torch.arange(k) for k in sizes]).reshape(-1, len(sizes))


def log_evidence(pair: Pair, x: Tensor) -> Tensor | None:
    """Return log p(x) = log sum_c p(x, c) of every row by running the model on every joint state, `(n,)`, nats, exact.

    None where a latent of the guide is not discrete, or there are more than `MAX_STATES` states. Call it in `quiet`.
    """
    layout, names = pair.layout, pair.layout.latents
    if pair.structure.rows is not None or pair.structure.moves or pair.structure.model_only or layout.factors:
        return None
    nodes = samples(pair.guide_trace(pair.structure.few(x)))
    if pair.structure.moves or any(name not in nodes for name in names):
        return None
    q = [members(nodes[name], layout, len(x[:2])) for name in names]
    grids = [part for part in q if isinstance(part, Codes | CertainCodes)]
    whole = grids and len(grids) == len(q)
    states = every_state([(part.positions, part.states) for part in grids]) if whole else None
    if states is None:
        return None
    pieces = states.to(x.device).split([part.positions for part in grids], 1)
    values = {
        name: (pair.structure.shapes[name], part.write(index).to(nodes[name]["value"]))
        for name, part, index in zip(names, grids, pieces, strict=True)
    }
    found = [_log_sum(pair, part, values, len(states)) for part in x.split(max(1, MODEL_ROWS_AT_ONCE // len(states)))]
    known = [part for part in found if part is not None]
    return torch.cat(known) if len(known) == len(found) else None


def _log_sum(pair: Pair, x: Tensor, values: Mapping[str, tuple[SiteShape, Tensor]], count: int) -> Tensor | None:
    """Return log sum_c p(x, c) of some rows, `(n,)`, nats; pairs of joint state and row are the rows of a batch.

    None where a mask hides a code in some rows: its states would be counted there as often as there are of them.
    """
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for block in torch.arange(count, device=x.device).split(max(1, MODEL_ROWS_AT_ONCE // len(x))):
        fixed = {n: shape.spread(flat[block].repeat_interleave(len(x), 0)) for n, (shape, flat) in values.items()}
        nodes = samples(pair.model_trace(tiled(x, len(block)), fixed))
        if any(name not in nodes or is_masked(nodes[name]) for name in values):
            return None
        sites = [log_prob(node, pair.layout, 0).double() for node in nodes.values() if pair.layout.holds(node)]
        total = torch.logaddexp(total, sum_over(sites).reshape(len(block), len(x)).logsumexp(0))
    return total


def codes_kl(q: Members | None, p: Members | None) -> Tensor | None:
    """Return KL(q || p) of each of P independent codes, `(n, P)`, nats; None for others than codes.

    It is infinite where a code possible under q has p = 0.
    """
    if not isinstance(p, Codes) or not isinstance(q, Codes | CertainCodes):
        return None
    if (q.positions, q.states) != (p.positions, p.states):
        return None
    if isinstance(q, CertainCodes):
        found = -p.logits.expand(len(q), -1, -1).gather(2, q.index.unsqueeze(-1)).squeeze(-1)
    else:
        found = (q.logits.exp() * (q.logits - p.logits)).sum(2)
    return torch.where(found > IMPOSSIBLE_NATS, torch.inf, found)
