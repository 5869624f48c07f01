"""The population's interval of a surgery: rows and samples of an `Account`, and the prior that suits its latents."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.account import Account
from pvae.analysis.decompose.posterior_draws import Draw, draw
from pvae.analysis.population.interval import interval
from pvae.analysis.population.kernels import KernelPrior
from pvae.analysis.population.result import Population
from pvae.analysis.population.sample import NewRows
from pvae.distributions.exponential_codes import product

Asked = Literal["rows", "full", "model"]
"""How much is spent on the interval: these rows (or train rows) alone, all that is known, samples of the model."""


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
    if train is not None:
        with quiet(account.pair, train, account.seed):
            others = new_rows(account, draw(account.pair, train))
    return interval(rows, KernelPrior(), train=others, seed=account.seed)


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
