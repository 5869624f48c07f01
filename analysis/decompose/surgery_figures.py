"""Terms of an ELBO surgery, computed from the log densities that an `Account` has collected.

And the population's interval: rows and samples of an `Account`, and the prior that suits its latents.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pvae.analysis.aggregate import aggregated, components
from pvae.analysis.aggregate.entry import quiet, same_globals, simulated
from pvae.analysis.decompose import latent_figures, result
from pvae.analysis.decompose.account import Account, guide_components
from pvae.analysis.decompose.posterior_draws import Draw, LatentDraw, draw
from pvae.analysis.figures.estimate import Estimate, Kind, exact, exact_mean, over_draws, over_whole_draws, text, texts
from pvae.analysis.population import codes, interval, kernels
from pvae.analysis.population.sample import HonestPrior, MixedPrior, NewRows, RootPrior
from pvae.distributions.exponential_codes import CertainCodes, Codes, product
from pvae.pair import Pair, Unweighed, running, sum_over
from pvae.util import seeds


def close(account: Account, y: Tensor | None, train: Tensor | None) -> result.Surgery:
    """Return the surgery of all samples scored by the account; `y` are labels, `train` are rows for `train_gain`."""
    whole = latent_figures.group_figures(account, account.names)
    latents = {name: latent_figures.latent_surgery(account, name) for name in account.names}
    closed = [latent.kl_exact for latent in latents.values()]
    reconstruction = _mean(account, torch.stack(account.reconstruction))
    total = _elbo(account, reconstruction, whole["kl"])
    points, samples = account.pair.structure.estimated, len(account.reconstruction)
    relaxed = relaxed_terms(account.pair, account.x, samples, account.seed)
    return result.Surgery(
        n=len(account.x), samples=samples, reconstruction=reconstruction, **whole,
        kl_exact=_total([c for c in closed if c is not None]) if closed and None not in closed else None,
        label_information=None if y is None else _label_information(account, y),
        train_gain=None if train is None else _train_gain(account, train), elbo=None if points else total,
        log_joint=total if points else None, log_n=exact(math.log(len(account.x))), latents=latents,
        classes={} if y is None else _classes(account, y),
        shared={name: sum(d[name] for d in account.shared) / len(account.shared) for name in account.first.shared},
        global_kl=_global_kl(account), elements=account.pair.structure.elements,
        relaxed_elbo=None if relaxed is None else account.over(relaxed), notes=_notes(account),
    )  # fmt: skip


def _mean(account: Account, terms: Tensor) -> Estimate:
    """Return the mean of terms `(samples, n)`; exact where all latents are summed over or determined by x."""
    summed = not account.pair.layout.latents and account.guide_roots.issuperset(account.names) and account.first.points
    return exact_mean(terms[0]) if account.certain or summed else account.over(terms)


def _elbo(account: Account, reconstruction: Estimate, kl: Estimate) -> Estimate:
    """Return the ELBO, reconstruction - kl - global KL; its standard error is computed from the ELBO of every datum."""
    terms = torch.stack(account.reconstruction) - account.kl_terms() - account.shares()
    return replace(_mean(account, terms), value=reconstruction.value - kl.value - float(account.shares().mean()))


def _global_kl(account: Account) -> Estimate | None:
    if not account.first.shared:
        return None
    found = over_whole_draws(account.shares())
    return exact(found.value) if account.first.points else replace(found, data_error=None)


def labels_of(y: Tensor) -> list[float]:
    """Return the distinct labels among `y`, in order, without those that are missing (NaN)."""
    return y[~y.isnan()].unique().tolist()


def _classes(account: Account, y: Tensor) -> dict[int, result.ClassSurgery]:
    """Return the terms of the surgery by class label, each a mean over the rows of that label."""
    reconstruction, kl = torch.stack(account.reconstruction), account.kl_terms().reshape(-1, len(y))
    joint = account.joint_codes(account.names)
    scored = account.scored.get(account.names)
    out = {}
    for label in labels_of(y):
        mine = y == label
        information = None
        if joint is not None:
            information = joint.information[None, mine]
        elif scored is not None and scored.whole and len(scored.rows) == len(y):
            information = torch.stack(scored.upper)[:, mine]

        def within(figure: Estimate, rest: Tensor | None = None, mine: Tensor = mine) -> Estimate:
            return scored.with_components(figure, "upper", rest, mine) if joint is None and scored else figure

        marginal = None
        if information is not None and not account.by_row:
            marginal = within(over_draws(kl[: len(information), mine] - information), kl.mean(0))
        terms = reconstruction - kl - account.shares(), reconstruction, kl
        elbo, fit, price = (over_draws(each[:, mine]) for each in terms)
        known = None if information is None else within(over_draws(information))
        out[int(label)] = result.ClassSurgery(int(mine.sum()), elbo, fit, price, known, marginal)
    return out


def _label_information(account: Account, y: Tensor) -> Estimate | None:
    """Return the mutual information of labels and latents, I_q[y, z] = E[log q_agg(z | y) - log q_agg(z)], nats.

    It is estimated on the first sample; q_agg(z | y) is the mixture of the posteriors of all rows with label y,
    q_agg(z) that of all rows with a label. None where there is none, or the posterior parameters of all rows are not
    kept in memory.
    """
    scored, value = account.scored.get(account.names), account.first.flat(account.names)
    known = [q for name in account.names if (q := account.first.latents[name].q) is not None]
    if scored is None or not scored.whole or scored.once or len(known) < len(account.names) or y.isnan().all():
        return None
    q, terms = product(known), torch.empty(len(scored.rows), dtype=torch.float64, device=y.device)
    labels, value = y[scored.rows], value[scored.rows]
    for label in labels_of(labels):
        mine = labels == label
        within = aggregated.AggregatedPosterior(q.rows((y == label).nonzero()[:, 0]), memory=account.memory)
        terms[mine] = within.log_prob(value[mine])
    if (have := ~labels.isnan()).all():
        own = torch.stack([account.levels[name].log_q[0][scored.rows] for name in account.names]).sum(0)
        return over_draws((terms - (own - scored.upper[0]))[None])
    whole = aggregated.AggregatedPosterior(q.rows((~y.isnan()).nonzero()[:, 0]), memory=account.memory)
    return over_draws((terms[have] - whole.log_prob(value[have]))[None]) if have.any() else None


def _train_gain(account: Account, train: Tensor) -> Estimate | None:
    """Return E[log q_agg(z) - log p(z)] on the first sample, nats, with q_agg over the rows `train`.

    A lower bound where q_agg has a random subset of its components. None where q_agg cannot be scored.
    """
    scored = account.scored.get(account.names)
    if account.by_row or scored is None or not {*account.pair.layout.latents}.issuperset(account.names):
        return None
    mixture = account.mixture_of(train, account.names, guide_components(scored.rows) if scored.once else None)
    log_p = torch.stack([account.levels[name].log_p[0] for name in account.names]).sum(0)
    log_q, left_out = mixture.log_prob_left_out(account.first.flat(account.names)[scored.rows])
    terms = log_q - log_p[scored.rows]
    if missing := int((terms == -math.inf).sum()):
        return Estimate(-math.inf, 0.0, note=f"{missing} of {len(terms)} have codes that no training row has")
    found = over_draws(terms[None])
    if len(mixture) == mixture.total:
        return found
    error = math.hypot(found.standard_error, mixture.error(left_out.mean(1)))
    return replace(found, standard_error=error, kind="lower_bound")


def _notes(account: Account) -> tuple[str, ...]:
    """Return remarks on subsets of samples and components, on rounding errors and on deterministic codes."""
    latents, scored, bias, rounding = account.first.latents, account.scored.get(account.names), 0.0, 0.0
    if scored is not None and not scored.whole:
        bias = float((torch.stack(scored.upper) - torch.stack(scored.lower)).mean())
    if scored is not None and isinstance(scored.mixture.components, components.Kept):
        rounding = scored.mixture.components.rounding(account.first.flat(account.names)[scored.rows])
    certain = [name for name, latent in latents.items() if latent.certain and name in account.guide_roots]
    distinct = len(account.first.flat(certain).unique(dim=0)) if certain else 0
    numbers = {"n": len(account.x), "bias": bias, "rounding": rounding, "distinct": distinct}
    errors = {name: level.grid_error or 0.0 for name, level in account.levels.items()}
    of_levels = (text("surgery.coordinates", name=name, error=error) for name, error in errors.items() if error > 1e-3)
    return (*texts("surgery.notes", account=account, scored=scored, certain=certain, **numbers), *of_levels)


def _total(parts: list[Estimate]) -> Estimate:
    """Return the sum of closed-form KLs: exact when each is, else an estimate whose error adds up conservatively."""
    kind: Kind = "exact" if all(p.kind == "exact" for p in parts) else "estimate"
    if len(parts) == 1:
        return parts[0]
    return Estimate(sum(p.value for p in parts), sum(p.standard_error for p in parts), kind)


def relaxed_terms(pair: Pair, x: Tensor, samples: int, seed: int) -> Tensor | None:
    """Return the ELBO of every row with relaxed latents sampled as in training, `(samples, n)`, nats.

    The KL of a relaxed latent is the one declared for it. None where no latent is relaxed.
    """
    if not pair.layout.relaxed:
        return None
    with running.quiet(pair, x), Unweighed():
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        return torch.stack([_relaxed_draw(pair, x) for _ in range(samples)])


def _relaxed_draw(pair: Pair, x: Tensor) -> Tensor:
    parts = []
    with same_globals(pair, x):
        for part in x.split(pair.structure.rows_at_once()):
            terms = pair.terms(part, rows=len(x))
            parts.append(terms.reconstruction.double() - sum_over([value.double() for value in terms.kl.values()]))
    return torch.cat(parts)


# ---------------------------------------------------------------------- the interval on new data


Asked = Literal["rows", "full", "model"]
"""Source of the interval: these rows (or train rows) alone, all that is known, or samples of the model."""
TRAIN_NOISE, MODEL_NOISE = 5, 6
"""Noise streams of the samples of other rows, and of rows that the model makes."""
MODEL_ROWS = 20_000
"""Largest number of rows that the model makes, four times as many as the data, unless there are more data."""
MODEL = "on data that the model makes, not on new data: four times as many rows as the data, or 20 000"


def on_new_data(account: Account, train: Tensor | None, asked: Asked) -> interval.Population | str:
    """Return the interval for the gain of a better prior on new data, or the reason why there is none."""
    latents = [account.first.latents[name] for name in account.names]
    if account.by_row or account.pair.structure.bounds:
        why = "differs from row to row" if account.by_row else "is scored by a bound"
        return f"no figure on new data: the prior {why}"
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
    found = interval.interval(rows, prior, train=others, seed=account.seed)
    return replace(found, notes=(MODEL, *found.notes)) if asked == "model" and not isinstance(found, str) else found


def of_model(account: Account) -> NewRows:
    """Return rows that the model makes, more than there are data, with one sample of their latents."""
    pair, n = account.pair, min(4 * len(account.x), max(len(account.x), MODEL_ROWS))
    like = account.x[torch.arange(n) % len(account.x)]
    with quiet(pair, like, seeds.mix(account.seed, seeds.ANALYSIS, MODEL_NOISE)):
        made = [simulated(pair, part, "population: model")[0] for part in like.split(pair.structure.rows_at_once())]
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
            return codes.CodePrior([_grid(latents[name]) for name in names])
        return kernels.FullPrior(account.seed) if asked == "full" else kernels.KernelPrior()

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


def _grid(latent: LatentDraw) -> codes.Grid:
    """Return the grid of codes of a discrete latent; the joint state of sites that are summed out is one code."""
    assert latent.tally is not None  # noqa: S101 - asked before
    width, positions, states = latent.value.shape[1], latent.tally.positions, latent.tally.states
    if isinstance(latent.q, Codes | CertainCodes):
        positions, states = latent.q.positions, latent.q.states
    elif width == 1:
        positions, states = 1, states**positions
    return codes.Grid(positions, states, width)


def new_rows(account: Account, x: Tensor, d: Draw, kl: Tensor | None = None, mutual: Tensor | None = None) -> NewRows:
    """Return one sample of all latents as rows of the interval."""
    whole = _rows(d, account.names)
    alone = account.guide_roots.issuperset(account.names) and whole.q is not None
    closed = [z.kl for name in account.names if (z := d.latents[name]).kl is not None]
    if alone and len(closed) == len(account.names) and account.model_roots.issuperset(account.names):
        kl = torch.stack(closed).sum(0)
    parts, kl = tuple(_rows(d, names) for names in _kinds(account)), whole.kl if kl is None else kl
    q, information = (whole.q, None) if alone else (None, mutual)
    return replace(whole, kl=kl, q=q, information=information, group=account.pair.groups(x), parts=parts)


def _rows(d: Draw, names: Sequence[str]) -> NewRows:
    """Return one sample of some latents, with their posteriors at the sample of all latents that these read."""
    latents = [d.latents[name] for name in names]
    own, log_p = (torch.stack([getattr(z, name) for z in latents]).sum(0) for name in ("log_q", "log_p"))
    known = [z.q for z in latents if z.q is not None]
    return NewRows(d.flat(names), own, log_p, own - log_p, product(known) if len(known) == len(names) else None)
