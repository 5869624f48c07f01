"""The population's interval of a surgery: rows and samples of an `Account`, and the prior that suits its latents."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet, simulated
from pvae.analysis.decompose.account import Account
from pvae.analysis.decompose.posterior_draws import Draw, LatentDraw, draw
from pvae.analysis.population.codes import CodePrior, Grid
from pvae.analysis.population.interval import interval
from pvae.analysis.population.kernels import FullPrior, KernelPrior
from pvae.analysis.population.levels import MixedPrior, RootPrior
from pvae.analysis.population.result import Population
from pvae.analysis.population.sample import HonestPrior, NewRows
from pvae.distributions.exponential_codes import CertainCodes, Codes, product
from pvae.util import seeds

Asked = Literal["rows", "full", "model"]
"""Source of the interval: these rows (or train rows) alone, all that is known, or samples of the model."""
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
    prior = _prior(account, asked)
    if isinstance(prior, str):
        return prior
    groups, kl, information, others = account.pair.groups(account.x), None, None, None
    if groups is None or len(groups.unique()) < 2:  # else the mutual information is within each group
        scored = account.scored.get(account.names)
        information = None if scored is None else torch.stack(scored.lower).mean(0)
        kl = account.kl_terms().reshape(-1, len(account.x)).mean(0)
    rows = of_model(account) if asked == "model" else new_rows(account, account.x, account.first, kl, information)
    if asked != "model" and train is not None:
        most = None if asked == "full" else len(account.x)
        others = _drawn(account, train[seeds.subset(len(train), most, account.seed).to(train.device)], TRAIN_NOISE)
    found = interval(rows, prior, train=others, seed=account.seed)
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
        return new_rows(account, x, draw(account.pair, x))


def _prior(account: Account, asked: Asked) -> HonestPrior | str:
    """Return the prior that suits the latents: of all of them, and of those without parents, or a reason."""
    latents, kinds = account.first.latents, _kinds(account)

    def of_one_kind(names: Sequence[str]) -> HonestPrior:
        if latents[names[0]].tally is not None:
            return CodePrior([_grid(latents[name]) for name in names])
        return FullPrior(account.seed) if asked == "full" else KernelPrior()

    found: list[HonestPrior] = []
    if len({latents[name].tally is None for name in account.names}) == 1:
        found.append(of_one_kind(account.names))
    if kinds and (len(kinds) > 1 or len(kinds[0]) < len(account.names)):
        found.append(RootPrior([of_one_kind(names) for names in kinds]))
    if not found:
        return "no figure on new data: real and discrete latents, none of which is without parents"
    return found[0] if len(found) == 1 else MixedPrior(found)


def _kinds(account: Account) -> list[tuple[str, ...]]:
    """Return the latents without parents in the model, real and discrete ones apart."""
    roots = [name for name in account.names if name in account.model_roots]
    parts = [tuple(n for n in roots if (account.first.latents[n].tally is None) == real) for real in (True, False)]
    return [part for part in parts if part]


def _grid(latent: LatentDraw) -> Grid:
    """Return the grid of codes of a discrete latent; the joint state of sites that are summed out is one code."""
    assert latent.tally is not None  # noqa: S101 - asked before
    width, positions, states = latent.value.shape[1], latent.tally.positions, latent.tally.states
    if isinstance(latent.q, Codes | CertainCodes):
        positions, states = latent.q.positions, latent.q.states
    elif width == 1:
        positions, states = 1, states**positions
    return Grid(positions, states, width)


def new_rows(
    account: Account, x: Tensor, d: Draw, kl: Tensor | None = None, information: Tensor | None = None
) -> NewRows:
    """Return one sample of all latents as rows of the interval."""
    whole = _rows(d, account.names)
    alone = account.guide_roots.issuperset(account.names) and whole.q is not None
    closed = [z.kl for name in account.names if (z := d.latents[name]).kl is not None]
    if alone and len(closed) == len(account.names) and account.model_roots.issuperset(account.names):
        kl = torch.stack(closed).sum(0)
    return replace(
        whole,
        kl=whole.kl if kl is None else kl,
        q=whole.q if alone else None,
        information=None if alone else information,
        group=account.pair.groups(x),
        parts=tuple(_rows(d, names) for names in _kinds(account)),
    )


def _rows(d: Draw, names: Sequence[str]) -> NewRows:
    """Return one sample of some latents, with their posteriors at the sample of all latents that these read."""
    latents = [d.latents[name] for name in names]
    own, log_p = (torch.stack([getattr(z, name) for z in latents]).sum(0) for name in ("log_q", "log_p"))
    known = [z.q for z in latents if z.q is not None]
    return NewRows(d.flat(names), own, log_p, own - log_p, product(known) if len(known) == len(names) else None)
