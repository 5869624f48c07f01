"""Estimates of KL(q_agg || p) from samples alone, by a classifier (critic) between codes and samples of the prior."""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from pvae.analysis.aggregate.entry import accept
from pvae.analysis.figures.estimate import Estimate, Figures, over_rows, refuse
from pvae.analysis.samples import encode, running, sample
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util import Progress, seeds, silent

CRITIC_CODES = 20_000
"""Number of codes aimed at: if there are fewer data, several codes per datum are sampled, at most 64."""
FOLDS = 4
FEWEST_CRITIC_ROWS = 10 * FOLDS
CRITIC_WIDTH = 64
CRITIC_BATCH, BATCHES_PER_EPOCH = 1000, 15
"""Largest number of codes, and of prior samples, in a batch, and smallest number of batches of an epoch."""
EPOCHS = 30
PATIENCE = 5
"""Number of epochs without a lower cross-entropy on validation rows after which training of the critic ends."""
RATE, DECAY = 2e-3, 0.88
"""Initial learning rate of the critic, and the factor that it is multiplied by after every epoch."""


class CriticKL(Figures):
    """Estimates of KL(q_agg || p) by a critic, nats; the result of `critic`."""

    kl: Annotated[Estimate, "mean log-ratio of codes: not a bound, and off by the error of the critic"]
    """Mean over codes of the critic's log-ratio T = log q_agg - log p; an estimate, off by the error of the critic."""
    nwj: Annotated[Estimate, "critic.nwj"]
    """E_q T - E_p e^T + 1 with the critic's log-ratio T (Nguyen, Wainwright, Jordan): a lower bound in expectation."""
    dv: Annotated[Estimate, "E_q T - log E_p e^T: a lower bound for many samples; biased upwards for few"]
    """E_q T - log E_p e^T with the critic's T (Donsker, Varadhan): an estimate, a lower bound for many samples."""
    cross_entropy: Annotated[Estimate, "critic.cross_entropy"]
    """Cross-entropy of the classifier between codes and samples of the prior, log 2 if q_agg = p; an estimate."""
    n: int
    """Number of data."""
    draws: int
    """Number of codes sampled per datum."""
    dim: int
    """Input dimension of the critic: all latents, discrete ones one-hot, and the covariates."""
    latents: tuple[str, ...]
    """Names of the latents whose joint KL is estimated."""


def critic(run_or_pair: Run | Pair, x: Tensor, seed: int = 0, *, on_progress: Progress = silent) -> CriticKL:
    r"""Estimate KL(q_agg || p) of all latents together from samples alone, without any density.

    A network learns to distinguish z ~ q_agg, codes of data, from z ~ p by logistic regression on equally many of each.
    The best logit is T*(z) = log q_agg(z) - log p(z), so that E_q T* = KL(q_agg || p). For any T,

        KL >= E_q T - log E_p e^T >= E_q T - E_p e^T + 1    (Donsker, Varadhan; Nguyen, Wainwright, Jordan),

    because log t <= t - 1; both are equalities at T*. The second is a mean over samples, unbiased, so it bounds the KL
    in expectation; the logarithm of a mean is too low on average, so the estimate of the first may exceed the KL. Their
    derivatives in T vanish at T*, so a critic with error e makes them low by about e^2 / 2, and E_q T off by e.

    Only samples of the pair are needed: this is a cross-check of `surgery`, and the only estimate where q is a point
    (an autoencoder) or has no density. Rows are divided into folds, each scored by a critic trained on the others, so
    q_agg is the distribution of codes of data like x. The marginal KL of a surgery has the q_agg of the rows
    themselves, and is larger by their overfitting (at most I_q, which is at most log n).

    Given covariates y, samples of the prior have the y of the rows, and the critic sees it: the result is
    E_y KL(q_agg(z|y) || p(z|y)).

    Warning: beyond about log(samples) nats no estimate from samples is reliable; a weak critic gives too small values.

    References:
        Adversarial Variational Bayes (Mescheder et al., 2017), https://arxiv.org/abs/1701.04722
        On Variational Bounds of Mutual Information (Poole et al., 2019), https://arxiv.org/abs/1905.06922

    Arguments:
        run_or_pair: a run, or any pair.
        x: data `(n, *row)`.
        seed: seed of samples, folds and weights.
        on_progress: called with (folds done, folds in all).

    Returns:
        CriticKL, nats: `kl` and `dv` are estimates, `nwj` is a lower bound in expectation; errors are those over rows.

    Raises:
        DataError: there are fewer than `FEWEST_CRITIC_ROWS` rows, or the pair is a generator that infers no latents.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> critic(pair, x[:40]).nwj.kind
        'lower_bound'
    """
    pair = running.opened(run_or_pair)
    x = accept(pair, x)
    refuse(len(x) < FEWEST_CRITIC_ROWS, f"critic: expected at least {FEWEST_CRITIC_ROWS} rows; got {len(x)}.")
    draws = min(64, max(1, math.ceil(CRITIC_CODES / len(x))))
    q, p, latents = both_sides(pair, x, draws, seed)
    fold = torch.randperm(len(x), generator=seeds.generator(seed, seeds.ANALYSIS, 20)) % FOLDS
    scores = torch.zeros(2, draws, len(x), dtype=torch.float64)
    for i in range(FOLDS):
        mine, others = fold == i, fold != i
        network = train(q[:, others], p[:, others], seeds.mix(seed, seeds.ANALYSIS, 21 + i))
        with torch.no_grad():
            for side, z in enumerate((q, p)):
                scores[side][:, mine] = network(z[:, mine].flatten(0, 1)).double().reshape(draws, -1)
        on_progress(i + 1, FOLDS)
    on_q, on_p = scores
    per_row = on_q.mean(0)
    ratio, log_mean = on_p.exp().mean(0), on_p.flatten().logsumexp(0) - math.log(on_p.numel())
    value, mass = float(per_row.mean()), float(ratio.mean())
    entropy = (nn.functional.softplus(-on_q).mean(0) + nn.functional.softplus(on_p).mean(0)) / 2
    nwj = Estimate(value - mass + 1, over_rows(per_row - ratio).standard_error, "lower_bound", note="in expectation")
    dv = Estimate(value - float(log_mean), over_rows(per_row - ratio / mass).standard_error, "estimate")
    return CriticKL(over_rows(per_row), nwj, dv, over_rows(entropy), len(x), draws, q.shape[-1], latents)


# ---------------------------------------------------------------------- draws


def both_sides(pair: Pair, x: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return codes of the data and prior samples, each `(draws, n, D)`, float32, and the names of the latents.

    Latents are concatenated, discrete ones as one-hot vectors, followed by the covariates of the rows as one-hot
    vectors, which are the same for codes and prior samples.
    """
    noise = [[seeds.mix(seed, seeds.ANALYSIS, 100 + 2 * i + side) for i in range(draws)] for side in (0, 1)]
    q = [{name: code.value for name, code in encode.encode(pair, x, seed=s).latents.items()} for s in noise[0]]
    p = [from_prior(pair, x, s) for s in noise[1]]
    names = tuple(name for name in q[0] if name in p[0])
    latents = [torch.stack([torch.stack([one[name] for one in side]) for side in (q, p)]) for name in names]
    known = [t.flatten(1).float().expand(2, draws, len(x), -1) for t in pair.frame.split(x.cpu())[1].values()]
    coded = [z if z.is_floating_point() else nn.functional.one_hot(z.long()) for z in latents]
    codes, prior = torch.cat([*(z.float().flatten(3) for z in coded), *known], -1)
    return codes, prior, names


def from_prior(pair: Pair, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Return one prior sample of every latent for each of the rows `(n, *row)`, given their covariates."""
    with running.analysed(pair, x, seed):
        return running.by_chunks(lambda *at: sample.prior_latents(pair, x[slice(*at)]), len(x), x[0].numel())


# ---------------------------------------------------------------------- the network


class LogRatio(nn.Module):
    """Network from z to the log-ratio log q_agg(z) - log p(z): a linear layer plus an MLP of standardised z and z^2.

    The linear layer suffices for two diagonal normals, whose log-ratio is linear in z and z^2.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        seen = torch.cat([z, z.square()], 1)
        spread, d, wide = seen.std(0), seen.shape[1], CRITIC_WIDTH
        self.loc, self.scale = nn.Buffer(seen.mean(0)), nn.Buffer(torch.where(spread > 1e-6, spread, 1.0))
        self.straight = nn.Linear(d, 1)
        self.bent = nn.Sequential(nn.Linear(d, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Map z `(n, D)` to logits `(n,)`."""
        seen = (torch.cat([z, z.square()], 1) - self.loc) / self.scale
        return (self.straight(seen) + self.bent(seen)).squeeze(-1)


def loss_of(network: nn.Module, q: Tensor, p: Tensor) -> Tensor:
    """Return the cross-entropy of the critic as a classifier between codes q and prior samples p, nats."""
    on_q, on_p = network(torch.cat([q, p])).split([len(q), len(p)])
    return (nn.functional.softplus(-on_q).mean() + nn.functional.softplus(on_p).mean()) / 2


def train(q: Tensor, p: Tensor, seed: int) -> LogRatio:
    """Train a critic on codes and prior samples `(draws, n, D)`, with early stopping on about a fifth of the rows."""
    aside = torch.randperm(q.shape[1], generator=seeds.generator(seed, seeds.ANALYSIS, 0)) % 5 == 0
    fit_q, fit_p, held_q, held_p = (z[:, rows].flatten(0, 1) for rows in (~aside, aside) for z in (q, p))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        seeds.set_noise(seed, torch.device("cpu"))
        network = LogRatio(torch.cat([fit_q, fit_p]))
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
        best, waited, kept = math.inf, 0, network.state_dict()
        batch = max(1, min(CRITIC_BATCH, len(fit_q) // BATCHES_PER_EPOCH))
        for epoch in range(EPOCHS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * DECAY**epoch
            for one, other in zip(*(torch.randperm(len(fit_q)).split(batch) for _ in range(2)), strict=True):
                optimizer.zero_grad()
                loss_of(network, fit_q[one], fit_p[other]).backward()
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
