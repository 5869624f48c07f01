"""Evaluation of a pair: ELBO terms on held-out data in nats per datum, and alerts at the end of a fit."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.data.split import Split
from pvae.data.streamed import Streamed
from pvae.distributions import Discretised, FactoredNormal
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan
from pvae.objectives.base import Objective, known_apart
from pvae.pair import SILENT, Pair, Tally, Terms, codebook_of, quiet, samples, silence, tallies, unwrapped
from pvae.util import group, seeds
from pvae.words import text

Rows = Tensor | Streamed
Closed = Collection[str] | None
ROWS_AT_ONCE = 1000
"""Largest number of rows in one evaluation batch."""
DECODED_AT_ONCE = 32_000
"""Largest number of decoder inputs in one evaluation batch: its rows times the joint states of the discrete latents
that are summed over."""
ALERT_ROWS = 1000
"""Largest number of data rows on which alerts are computed."""
MAX_PROPORTION_AT_BOUND = 0.05
"""Largest proportion of the scales (standard deviations) of a site that may lie at a bound without an alert."""
MIN_EXPECTED_USES = 10
"""Smallest expected number of uses per code, if all were used equally, at which an unused code counts as dead."""
SCALE_BOUNDS = (1e-6, 1e6)
"""Smallest and largest scale (standard deviation) of a site without declared bounds; a scale beyond them has
diverged."""


def evaluate(pair: Pair, x: Rows, seed: int, rows: int | None = None, closed: Closed = None) -> dict[str, float]:
    """Return the mean ELBO terms of `x` with one sample of z per datum; changes no weight and no random state.

    Relaxed (Concrete) latents are replaced by categorical ones with the same logits; `relaxed_elbo` is the ELBO of the
    relaxed ones.

    Arguments:
        pair: a pair on the device of `x`.
        x: data `(n, *event)`, read piece by piece where they are streamed.
        seed: seed of the samples; the same seed gives the same values.
        rows: size of the data set over which the KL of global latents is divided, that of the training set; default:
            the number of rows of `x`.
        closed: latents whose KL is in closed form where there is one; default: those of which it has the mean of
            log q - log p (`known_apart`), as in training.

    Returns:
        `elbo` (`log_joint` where the guide sets a continuous latent to a point), `reconstruction`, `kl` and
        `kl/<latent>`, estimates in nats per datum, and `penalty/<factor>` of the observed sites of a hand-written
        guide, which are no part of the ELBO.
    """
    with quiet(pair, x[:1]):
        with Discretised(pair.relaxed):
            row = _mean_terms(pair, x, seed, rows, closed)
        if pair.layout.relaxed:
            row["relaxed_elbo"] = _mean_terms(pair, x, seed, rows, closed)[pair.structure.total]
    return row


def _mean_terms(pair: Pair, x: Rows, seed: int, rows: int | None, closed: Closed) -> dict[str, float]:
    structure = pair.adopt(x[:2]).structure
    chunk = max(1, min(ROWS_AT_ONCE, DECODED_AT_ONCE // structure.states))
    closed = known_apart(pair) if closed is None else closed

    def sums(number: int) -> dict[str, Tensor]:
        start = number * chunk
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION, start), x.device)
        terms = pair.terms(pair.accept(x[start : start + chunk]), rows=rows or len(x), expected=True)
        parts = {f"kl/{name}": _known(terms, name) if name in closed else terms.kl[name] for name in terms.kl}
        parts |= {f"penalty/{name}": terms.penalties[name] for name in pair.layout.factors if name in terms.penalties}
        found = {"reconstruction": terms.reconstruction, **parts}
        return {key: value.expand_as(terms.reconstruction).double().sum() for key, value in found.items()}

    totals: dict[str, float] = {}
    for part in group.dealt(-(-len(x) // chunk), sums):
        totals |= {key: totals.get(key, 0.0) + float(value) for key, value in part.items()}
    means = {key: value / len(x) for key, value in totals.items()}
    total_kl = sum(value for key, value in means.items() if key.startswith("kl/"))
    return {structure.total: means["reconstruction"] - total_kl, "kl": total_kl, **means}


def _known(terms: Terms, name: str) -> Tensor:
    """Return the closed-form KL of a latent, at least 0 despite rounding; the estimate where it is infinite."""
    kl = terms.closed(name)
    return terms.kl[name] if kl is None or not bool(kl.isfinite().all()) else kl.clamp(min=0)


def maximised(name: str, objective: Objective, figures: Mapping[str, float], beta: float) -> float | None:
    """Return the validation figure `name` of an objective, nats per datum; None if `figures` do not make it up."""
    if name == "beta_elbo":
        kl = [max(value, objective.free_bits) for key, value in figures.items() if key.startswith("kl/")]
        return figures["reconstruction"] - beta * sum(kl)
    return figures.get(name)


def held_out(objective: Objective, pair: Pair, x: Tensor | Streamed, seed: int, rows: int | None, beta: float) -> float:
    """Return the mean over `x` of the bound that an objective maximises (`Objective.bound`); see `evaluate`."""
    chunk = max(1, ROWS_AT_ONCE // getattr(objective, "particles", 1))
    with quiet(pair, x[:1]), Discretised(pair.relaxed):

        def summed(number: int) -> dict[str, Tensor]:
            start = number * chunk
            seeds.set_noise(seeds.mix(seed, seeds.VALIDATION, start), x.device)
            batch = pair.accept(x[start : start + chunk])
            bound: Any = objective.bound(pair, batch, rows, torch.tensor(beta, device=x.device))  # which it names
            return {"sum": bound.detach().double() * len(batch)}

        return sum(float(part["sum"]) for part in group.dealt(-(-len(x) // chunk), summed)) / len(x)


# ---------------------------------------------------------------------- labels of some rows


def _guessed(plan: Experiment, pair: Pair, split: Split, draws: int, *, codes: bool) -> Iterator[Any]:
    """Yield known values `(m, D)` of observed latents, and the sites at which the guide infers them from x, by chunks.

    The values that `Experiment.known` gives are hidden from the guide, and changed by nothing here. There is one site
    where q(y | x) is known exactly; else `draws` of them, with samples of y and of other latents that q reads.
    """
    for name, value in plan.known(split).items():
        for part in (~value.isnan().any(1)).nonzero().squeeze(1).split(ROWS_AT_ONCE):
            if len(part) and codes == bool(pair.frame.entries[name].codes):
                x = pair.accept(split.rows[part])
                with quiet(pair, x):
                    seeds.set_noise(seeds.mix(plan.seed, seeds.VALIDATION, int(part[0])), x.device)
                    nodes = [samples(pair.guide_trace(x))[name]]
                    known = isinstance(unwrapped(nodes[0]["fn"]), torch.distributions.Normal | dist.Categorical)
                    if not known or name not in pair.dependencies(x).guide_roots:
                        nodes += [samples(pair.guide_trace(x))[name] for _ in range(draws - 1)]
                yield name, value[part].to(x), nodes


def classified(plan: Experiment, pair: Pair, split: Split, draws: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Return q(y | x) `(m, K)` and the label `(m,)` of the rows of a split that have one, for each observed code y.

    Where the guide infers y from other latents, q is the mean over `draws` samples of them.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, y, nodes in _guessed(plan, pair, split, draws, codes=True):
        probs = torch.stack([node["fn"].probs.expand(len(y), -1) for node in nodes]).mean(0)
        found.setdefault(name, []).append((probs, y.squeeze(1).long()))
    return {name: (torch.cat([q for q, _ in parts]), torch.cat([y for _, y in parts])) for name, parts in found.items()}


FIGURES = ("rmse", "r2", "log_density", "coverage_50", "coverage_90")
"""Names of the figures of the prediction of an observed vector."""
Figures = dict[str, tuple[float, float, Any]]
"""Value, standard error over rows (with the noise of samples), and kind of estimate of each figure, by name."""


def figures_of(draws: int, y: Tensor, mean: Tensor, below: Tensor, log_q: Tensor) -> Figures:
    """Return figures of the prediction of known vectors: estimates from m rows, by the names in `FIGURES`.

    They are root mean squared error and R2 of the mean, means over coordinates as in scikit-learn; the mean of log q,
    nats, a lower bound in expectation if it is averaged over draws; and the proportions of the values inside the
    central intervals of 50 % and 90 %, to which one hit and one miss are added for the error: no proportion is certain.

    Arguments:
        draws: number of samples of other latents that q is averaged over.
        y: known values, `(m, D)`.
        mean: mean of q(y | x), `(m, D)`.
        below: probability under q(y | x) of less than y, by coordinate, `(m, D)`.
        log_q: log q(y | x), nats, `(m,)`.
    """
    square, away = (mean - y).square(), (y - y.mean(0)).square()
    error, spread = square.mean(0), away.mean(0)
    hits = [((below - 0.5).abs() <= width / 2).double() for width in (0.5, 0.9)]
    values = error.sqrt(), 1 - error / spread, log_q, *hits
    more = torch.eye(2)[:, :1].to(y).expand(-1, y.shape[1])
    terms = (  # of rows, whose mean varies as the value does
        square / (2 * error.sqrt()), (error * away / spread - square) / spread, log_q[:, None],
        *(torch.cat([hit, more]) for hit in hits),
    )  # fmt: skip
    errors = (float(part.mean(1).std()) / len(part) ** 0.5 for part in terms)
    kinds = ("lower_bound" if draws > 1 and name == "log_density" else "estimate" for name in FIGURES)
    return dict(zip(FIGURES, zip((float(value.mean()) for value in values), errors, kinds, strict=True), strict=True))


def predicted(plan: Experiment, pair: Pair, data: Dataset, split: Split, draws: int = 10) -> dict[str, Figures]:
    """Return `figures_of` each observed vector, predicted from x alone, on the rows of a split that have its value.

    They are in the units of the data. Where the guide infers the vector from other latents, or has no normal posterior,
    it is averaged over `draws` samples.
    """
    found: dict[tuple[str, int], Any] = {}
    for name, y, nodes in _guessed(plan, pair, split, draws, codes=False):
        fns, values = [node["fn"] for node in nodes], torch.stack([node["value"] for node in nodes])
        unit = (data.transforms.unit(plan.latents[name].observed) if data.transforms else torch.ones(1)).to(y)
        is_normal = isinstance(unwrapped(fns[0]), torch.distributions.Normal)
        means = torch.stack([fn.mean for fn in fns]) if is_normal else values
        below = torch.stack([unwrapped(fn).cdf(y) for fn in fns]) if is_normal else (values < y).to(y)
        log_q = torch.stack([fn.log_prob(y) for fn in fns]).logsumexp(0) - math.log(len(fns)) - unit.log().sum()
        found.setdefault((name, len(fns)), []).append((y * unit, means.mean(0) * unit, below.mean(0), log_q))
    return {z: figures_of(n, *map(torch.cat, zip(*parts, strict=True))) for (z, n), parts in found.items()}


def seen_by(plan: Plan, pair: Pair, data: Dataset, split: Split) -> dict[str, float]:
    """Return how well the guide predicts observed latents of a split from x alone: `accuracy/<latent>` of codes.

    It is the proportion of the rows with a value whose most probable code it is. Of vectors they are the `FIGURES`,
    such as `rmse/<latent>`.
    """
    if not isinstance(plan, Experiment):
        return {}
    codes, vectors = classified(plan, pair, split).items(), predicted(plan, pair, data, split).items()
    hits = {f"accuracy/{name}": float((q.argmax(1) == y).double().mean()) for name, (q, y) in codes}
    return hits | {f"{key}/{name}": value for name, p in vectors for key, (value, *_) in p.items()}


# ---------------------------------------------------------------------- alerts; none is an error


def alerts(plan: Plan, pair: Pair, x: Tensor, seed: int) -> list[str]:
    """Return a line for each latent that has collapsed, codebook with dead codes, and site whose scales are at a bound.

    Arguments:
        plan: the declaration of the pair.
        pair: a fitted pair with an ELBO, on the device of `x`.
        x: data `(n, *event)`; at most `ALERT_ROWS` of it are read.
        seed: seed of the samples.
    """
    x = pair.accept(x[:ALERT_ROWS])
    with quiet(pair, x):
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION), x.device)
        with Discretised(pair.relaxed):
            terms = pair.terms(x, rows=len(x), expected=True)
            guide, model = (samples(trace) for trace in pair.traces(x))
            codes = tallies(guide, pair.layout, len(x), None if pair.layout.enumerated else model)
        guide, model = (samples(trace) for trace in pair.traces(x))
    kl = {name: float(value.double().mean()) for name, value in terms.kl.items() if name not in codes}
    return [*_asleep(kl, guide), *_unused(pair, codes), *_at_bounds(plan, guide, model)]


def _asleep(kl: Mapping[str, float], guide: Mapping[str, Any]) -> Iterator[str]:
    for name, nats in kl.items():
        if abs(nats) <= SILENT.of_real(guide[name]["fn"].event_shape.numel() if name in guide else 1):
            yield text("training.evaluation.asleep", name=name, nats=nats)


def _unused(pair: Pair, codes: Mapping[str, Tally]) -> Iterator[str]:
    """Yield a line for each discrete latent that carries no information as a whole, or with dead codes."""
    for name, use in codes.items():
        if alert := silence(name, use, codebook_of(pair, name)):
            yield alert
        dead = 0 if use.bits or use.collapsed else int((~use.used).sum())
        if dead and use.n * use.positions >= MIN_EXPECTED_USES * len(use.used):
            yield f"{name}: {dead} of {len(use.used)} codes are dead: on {use.n} rows they are not in use."


def _at_bounds(plan: Plan, guide: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    for side, nodes in (("guide", guide), ("model", model)):
        for name, node in nodes.items():
            scale = _scale(node)
            (low, high), learned = _bounds(plan, side, name)
            if scale is None or not learned:
                continue
            for where, bound, at in (("floor", low, scale <= low * 1.001), ("ceiling", high, scale >= high * 0.999)):
                if (share := float(at.double().mean())) > MAX_PROPORTION_AT_BOUND:
                    said = {"site": f"{side}.{name}", "share": share, "where": where, "bound": bound}
                    yield text("training.evaluation.at_bounds", **said)


def _scale(node: Mapping[str, Any]) -> Tensor | None:
    """Return the scales of a normal site (for a full covariance, the Cholesky factor's diagonal); None for others."""
    if isinstance(fn := unwrapped(node["fn"]), FactoredNormal | dist.MultivariateNormal):
        return fn.scale_tril.diagonal(dim1=-2, dim2=-1)
    return fn.scale if isinstance(fn, torch.distributions.Normal) else None


def _bounds(plan: Plan, side: str, name: str) -> tuple[tuple[float, float], bool]:
    """Return the smallest and largest scale that the declaration allows a site, and True if its scales are learned."""
    if not isinstance(plan, Experiment):
        return SCALE_BOUNDS, True
    if name in plan.latents:
        latent = plan.latents[name]
        declared = (latent.posterior if side == "guide" else latent.prior).model_dump().get("log_variance")
        return (SCALE_BOUNDS if declared is None else (math.exp(declared[0] / 2), math.exp(declared[1] / 2))), True
    table = plan.decoder.likelihood.model_dump()
    return (max(table.get("floor", 0.0), SCALE_BOUNDS[0]), SCALE_BOUNDS[1]), table.get("scale") != "fixed"
