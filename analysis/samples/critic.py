"""KL(q_agg || p) from samples alone: a critic that tells codes from draws of the prior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.analysis.decompose.draws import accept
from pvae.analysis.export.sites import rows_of
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.generate import Progress, analysed, chunks, encode, opened, silent
from pvae.errors import DataError
from pvae.pair.layout import samples as sites_of
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util import seeds

DRAWS = 20_000
"""Codes that a critic is trained on, at least, with several draws of a datum where there are fewer data."""
FOLDS = 4
FEWEST = 10 * FOLDS
HIDDEN = 64
BATCH, STEPS = 1000, 15
"""Most rows of each kind in a batch, and fewest batches of an epoch."""
EPOCHS = 30
PATIENCE = 5
"""Epochs without a better cross-entropy on rows kept aside, after which training ends."""
RATE, DECAY = 2e-3, 0.88
"""Learning rate, and its factor for every epoch."""


@dataclass(frozen=True, repr=False)
class CriticKL(Figures):
    """KL(q_agg || p) as a critic sees it, nats."""

    kl: Estimate
    nwj: Estimate
    dv: Estimate
    cross_entropy: Estimate
    n: int
    """Data."""
    draws: int
    """Codes of each."""
    dim: int
    """Numbers that the critic sees of a code."""
    latents: tuple[str, ...]

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"KL(q_agg || p) of {', '.join(self.latents)} from samples (n = {self.n}, {self.draws} draws each)"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield (
            "kl",
            self.kl,
            "mean log-ratio of codes, as the critic has it: no bound, and off by the critic's own error",
        )
        yield "nwj", self.nwj, "E_q T - E_p e^T + 1: a lower bound in expectation, low by the critic's error squared"
        yield "dv", self.dv, "E_q T - log E_p e^T: a lower bound with many draws; few draws lift it"
        yield "cross_entropy", self.cross_entropy, f"of telling both apart: log 2 = {math.log(2):.4f} if they are alike"

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        return (
            "q_agg is that of data like these, not of these rows alone: every figure is of rows that the critic has "
            "not seen",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        counts = {"n": self.n, "draws": self.draws, "dim": self.dim, "latents": list(self.latents)}
        return {"unit": "nats", **counts, **self.figures()}


def critic(run_or_pair: Run | Pair, x: Tensor, seed: int = 0, *, on_progress: Progress = silent) -> CriticKL:
    r"""Estimate KL(q_agg || p) of all latents together from draws alone, without any density.

    A network learns to tell z ~ q_agg, codes of data, from z ~ p by logistic regression on as many of each; the best
    logit is T*(z) = log q_agg(z) - log p(z), so that E_q T* = KL(q_agg || p). With any T,

        KL >= E_q T - log E_p e^T >= E_q T - E_p e^T + 1    (Donsker, Varadhan; Nguyen, Wainwright, Jordan),

    because log t <= t - 1; both are equalities at T*. The second is a mean over draws, unbiased, so it bounds the KL in
    expectation; the logarithm of a mean is too low on average, so the first may lie above it. Their slopes in T vanish
    at T*, so that a critic off by e is low by about e^2 / 2 in them, while E_q T is off by e itself.

    Nothing but draws is asked of the pair: it is a cross-check of `surgery`, and the only estimate where q is a point
    (an autoencoder) or has no density. Rows are cut into folds, and each is scored by a critic of the others: q_agg is
    the law of codes of data like x. The marginal KL of a surgery has q_agg of its very rows in its place, and is larger
    by what they overfit (at most I_q, at its ceiling log n).

    Given covariates y, draws of the prior have the rows' own y, and the critic sees it: E_y KL(q_agg(z|y) || p(z|y)).

    Warning: beyond about log(draws) nats no estimate from samples is reliable; a critic too weak gives too little.

    References:
        Adversarial Variational Bayes (Mescheder et al., 2017), https://arxiv.org/abs/1701.04722
        On Variational Bounds of Mutual Information (Poole et al., 2019), https://arxiv.org/abs/1905.06922

    Arguments:
        run_or_pair: a run, or any pair.
        x: data `(n, *row)`.
        seed: of draws, folds and weights.
        on_progress: called with (folds done, folds in all).

    Returns:
        CriticKL: `kl` and `dv` estimates, `nwj` a lower bound in expectation; errors are those between rows.

    Raises:
        DataError: fewer than `FEWEST` rows, or a pair that infers nothing.
    """
    pair = opened(run_or_pair)
    x = accept(pair, x)
    if len(x) < FEWEST:
        raise DataError(f"critic: expected at least {FEWEST} rows; got {len(x)}.")
    draws = min(64, max(1, math.ceil(DRAWS / len(x))))
    q, p, latents = both_sides(pair, x, draws, seed)
    fold = torch.randperm(len(x), generator=_generator(seed, 20)) % FOLDS
    scores = torch.zeros(2, draws, len(x), dtype=torch.float64)
    for i in range(FOLDS):
        mine, others = fold == i, fold != i
        network = train(q[:, others], p[:, others], seeds.mix(seed, seeds.ANALYSIS, 21 + i))
        with torch.no_grad():
            for side, z in enumerate((q, p)):
                scores[side][:, mine] = network(z[:, mine].flatten(0, 1)).double().reshape(draws, -1)
        on_progress(i + 1, FOLDS)
    return _figures(scores, draws, q.shape[-1], latents)


def _figures(scores: Tensor, draws: int, dim: int, latents: tuple[str, ...]) -> CriticKL:
    """From logits `(2, draws, n)` of codes and of draws of the prior."""
    on_q, on_p = scores
    n = on_q.shape[1]
    per_row = on_q.mean(0)
    ratio, log_mean = on_p.exp().mean(0), on_p.flatten().logsumexp(0) - math.log(on_p.numel())

    def error(rows: Tensor) -> float:
        return float(rows.std() / math.sqrt(n))

    value, mass = float(per_row.mean()), float(ratio.mean())
    entropy = (softplus(-on_q).mean(0) + softplus(on_p).mean(0)) / 2
    return CriticKL(
        kl=Estimate(value, error(per_row), "estimate"),
        nwj=Estimate(value - mass + 1, error(per_row - ratio), "lower_bound", note="in expectation"),
        dv=Estimate(value - float(log_mean), error(per_row - ratio / mass), "estimate"),
        cross_entropy=Estimate(float(entropy.mean()), error(entropy), "estimate"),
        n=n,
        draws=draws,
        dim=dim,
        latents=latents,
    )


# ---------------------------------------------------------------------- draws


def both_sides(pair: Pair, x: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Codes of every row and draws of the prior, each `(draws, n, D)`, float32, and the latents they are made of.

    Codes are one-hot; covariates follow as one-hot vectors on both sides.
    """
    sides: list[list[dict[str, Tensor]]] = [[], []]
    for i in range(draws):
        found = encode(pair, x, seed=seeds.mix(seed, seeds.ANALYSIS, 100 + 2 * i))
        sides[0].append({name: code.value for name, code in found.latents.items()})
        sides[1].append(from_prior(pair, x, seeds.mix(seed, seeds.ANALYSIS, 101 + 2 * i)))
    names = tuple(name for name in sides[0][0] if name in sides[1][0])
    known = [t.flatten(1) for t in pair.frame.split(x.cpu())[1].values()]
    columns: list[list[Tensor]] = [[], []]
    for name in names:
        values = [torch.stack([one[name] for one in side]) for side in sides]
        for column, flat in zip(columns, as_numbers(*values), strict=True):
            column.append(flat)
    q, p = (torch.cat([*side, *(t.float().expand(draws, *t.shape) for t in known)], -1) for side in columns)
    return q, p, names


def from_prior(pair: Pair, x: Tensor, seed: int) -> dict[str, Tensor]:
    """One draw of every latent's prior for each of the rows `(n, *row)`, whose covariates it is given."""
    parts: list[dict[str, Tensor]] = []
    with analysed(pair, x, seed):
        for start, stop in chunks(len(x), x[0].numel()):
            nodes, layout = sites_of(pair.simulate(x[start:stop])), pair.layout
            hidden = {z: node for z, node in nodes.items() if z not in layout.observed and layout.holds(node)}
            parts.append({z: rows_of(node["value"], node, layout, stop - start).cpu() for z, node in hidden.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def as_numbers(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Values `(draws, n, *event)` of both sides as float vectors; whole numbers, which are codes, as one-hot ones."""
    if q.is_floating_point():
        return q.flatten(2).float(), p.flatten(2).float()
    codes = 1 + int(max(q.max(), p.max()))
    one, other = (nn.functional.one_hot(t.long(), codes).float().flatten(2) for t in (q, p))
    return one, other


# ---------------------------------------------------------------------- the network


class LogRatio(nn.Module):
    """A vector and its squares, standardised, to a logit: the log-ratio of two diagonal normals is linear in them."""

    loc: Tensor
    scale: Tensor

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        seen = torch.cat([z, z.square()], 1)
        self.register_buffer("loc", seen.mean(0))
        self.register_buffer("scale", seen.std(0).clamp(min=1e-6))
        d = seen.shape[1]
        self.straight = nn.Linear(d, 1)
        self.bent = nn.Sequential(
            nn.Linear(d, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        """`(n, D)` to logits `(n,)`."""
        seen = (torch.cat([z, z.square()], 1) - self.loc) / self.scale
        return (self.straight(seen) + self.bent(seen)).squeeze(-1)


def loss_of(network: nn.Module, q: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy of telling codes from draws of the prior, nats."""
    on_q, on_p = network(torch.cat([q, p])).split([len(q), len(p)])
    return (softplus(-on_q).mean() + softplus(on_p).mean()) / 2


def train(q: Tensor, p: Tensor, seed: int) -> LogRatio:
    """A critic of codes and draws of the prior `(draws, n, D)`, stopped by a fifth of the rows; leaves random state."""
    aside = torch.randperm(q.shape[1], generator=_generator(seed, 0)) % 5 == 0
    (fit_q, held_q), (fit_p, held_p) = (
        (z[:, ~aside].flatten(0, 1), z[:, aside].flatten(0, 1)) for z in (q, p)
    )  # fmt: skip
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        seeds.set_noise(seed, torch.device("cpu"))
        network = LogRatio(torch.cat([fit_q, fit_p]))
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
        best, waited, kept = math.inf, 0, network.state_dict()
        batch = max(1, min(BATCH, len(fit_q) // STEPS))
        for epoch in range(EPOCHS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * DECAY**epoch
            orders = [torch.randperm(len(fit_q)).split(batch) for _ in range(2)]
            for one, other in zip(*orders, strict=True):
                loss = loss_of(network, fit_q[one], fit_p[other])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                held = float(loss_of(network, held_q, held_p))
            waited += 1
            if held < best:
                best, waited = held, 0
                kept = {name: t.clone() for name, t in network.state_dict().items()}
            if waited >= PATIENCE:
                break
    network.load_state_dict(kept)
    return network.eval()


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, stream))
