"""The population's interval of a surgery: rows and samples of an `Account`, and the prior that suits its latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet, simulated
from pvae.analysis.decompose.account import Account
from pvae.analysis.decompose.posterior_draws import Draw, draw
from pvae.analysis.population.full import FullPrior
from pvae.analysis.population.interval import interval
from pvae.analysis.population.kernels import KernelPrior
from pvae.analysis.population.result import Population
from pvae.analysis.population.sample import NewRows
from pvae.distributions.exponential_codes import product
from pvae.util import seeds

Asked = Literal["rows", "full", "model"]
"""How much is spent on the interval: these rows (or train rows) alone, all that is known, samples of the model."""
TRAIN_NOISE, MODEL_NOISE = 5, 6
"""Noise streams of the samples of other rows, and of rows that the model makes."""
MODEL_ROWS = 20_000
"""Largest number of rows that the model makes, four times as many as the data, unless there are more data."""
MODEL = "on data that the model makes, not on new data: four times as many rows as the data, or 20 000"


def on_new_data(account: Account, train: Tensor | None, asked: Asked) -> Population | str:
    """Return the interval for the gain of a better prior on new data, or the reason why there is none."""
    latents = [account.first.latents[name] for name in account.names]
    if account.by_row:
        return "no figure on new data: the prior differs from row to row"
    if not latents or any(z.point or z.partial for z in latents) or not account.first.points:
        return "no figure on new data: posteriors are points, absent in some rows, or depend on global latents"
    if any(z.tally is not None for z in latents):
        return "no figure on new data: for real latents only"
    scored = account.scored.get(account.names)
    information = None if scored is None else torch.stack(scored.lower).mean(0)
    rows = new_rows(account, account.first, account.kl_terms().reshape(-1, len(account.x)).mean(0), information)
    others = None
    if asked == "model":
        rows = of_model(account)
    elif train is not None:
        most = None if asked == "full" else len(account.x)
        others = _drawn(account, train[seeds.subset(len(train), most, account.seed).to(train.device)], TRAIN_NOISE)
    found = interval(
        rows, FullPrior(account.seed) if asked == "full" else KernelPrior(), train=others, seed=account.seed
    )
    return replace(found, notes=(MODEL, *found.notes)) if asked == "model" and not isinstance(found, str) else found


def of_model(account: Account) -> NewRows:
    """Return rows that the model makes, more than there are data, with one sample of their latents."""
    pair, n = account.pair, min(4 * len(account.x), max(len(account.x), MODEL_ROWS))
    like, made = account.x[torch.arange(n) % len(account.x)], []
    with quiet(pair, like, seeds.mix(account.seed, seeds.ANALYSIS, MODEL_NOISE)):
        for part in like.split(pair.structure.rows_at_once()):
            made.append(simulated(pair, part, "population: model")[0])
    return _drawn(account, torch.cat(made), TRAIN_NOISE)


def _drawn(account: Account, x: Tensor, noise: int) -> NewRows:
    """Return other rows with one sample of their latents."""
    with quiet(account.pair, x, seeds.mix(account.seed, seeds.ANALYSIS, noise)):
        return new_rows(account, draw(account.pair, x))


def new_rows(account: Account, d: Draw, kl: Tensor | None = None, information: Tensor | None = None) -> NewRows:
    """Return one sample of all latents as rows of the interval."""
    latents = [d.latents[name] for name in account.names]
    known = [z.q for z in latents if z.q is not None]
    alone = account.guide_roots.issuperset(account.names) and len(known) == len(latents)
    own, log_p = (torch.stack([getattr(z, name) for z in latents]).sum(0) for name in ("log_q", "log_p"))
    closed = [z.kl for z in latents if z.kl is not None]
    if alone and len(closed) == len(latents) and account.model_roots.issuperset(account.names):
        kl = torch.stack(closed).sum(0)
    return NewRows(
        d.flat(account.names), own, log_p, own - log_p if kl is None else kl, product(known) if alone else None,
        None if alone else information,
    )  # fmt: skip
