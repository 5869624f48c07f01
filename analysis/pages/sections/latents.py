"""What each latent carries, and where its aggregated posterior and its prior part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvae.analysis.decompose.aggregated import AggregatedPosterior
from pvae.analysis.decompose.collapse import ACTIVE, Collapse
from pvae.analysis.decompose.posterior_draws import LatentDraw
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import (
    Block,
    Column,
    Picture,
    Section,
    Sentence,
    Table,
    Tile,
    percent,
    picture,
)
from pvae.analysis.pages.sections.examination import Case, array
from pvae.errors import DataError
from pvae.util import seeds

HOLE = 0.01
"""Share of the codes of held-out data that lie where q_agg is thinner than the threshold of a hole."""
HOLES = 0.5
"""Share of prior draws in holes above which the report speaks of them."""
MANY, FEW = (20_000, 2000), (1000, 500)
"""Most training rows behind that q_agg, and most draws scored under it; fewer where each pair runs the guide."""


def section(case: Case) -> Section | None:
    """Units, marginals, planes; None of a model without a likelihood, or of codes alone."""
    if case.implicit:
        return None
    real = [name for name, latent in case.collapse.latents.items() if latent.codes is None]
    blocks: list[Block] = [_table(case)]
    for name in real:
        blocks += _units(case, name)
        blocks += _against_prior(case, name)
    if (curves := _curves(case, real)) is not None:
        blocks.append(curves)
    said = [Sentence(text, True) for text in case.collapse.alerts] or [_all_in_use(case.collapse)]
    tiles, numbers = [], {"collapse": case.collapse.to_dict(), "holes": None}
    found = case.attempt("holes", lambda: holes(case))
    if found is not None:
        said.append(_on_holes(found))
        numbers["holes"] = vars(found)
        tiles.append(Tile("prior holes", percent(found.share), f"of prior draws; {percent(HOLE)} is the aim"))
    return Section("latents", "Latents", tuple(blocks), "", tuple(said), tuple(tiles), numbers)


def _table(case: Case) -> Table:
    use = case.collapse.latents
    titles = ("size", "active", "KL", "KL, closed form", "I_q", "marginal KL", "total correlation")
    rows = tuple(
        (
            name,
            use[name].dim,
            use[name].active,
            z.kl,
            z.kl_exact,
            z.mutual_information,
            z.marginal_kl,
            None if z.dimensions is None else z.dimensions.total_correlation,
        )
        for name, z in case.held.latents.items()
    )
    caption = f"Every latent on {case.split}: nats per datum; a dash where a posterior or prior reads other latents"
    return Table("latents", caption, (Column("latent"), *(Column(title) for title in titles)), rows)


def _units(case: Case, name: str) -> list[Block]:
    """KL and activity of every coordinate, as a figure and a table."""
    latent, found = case.collapse.latents[name], case.held.latents[name]
    if latent.activity is None and latent.kl_per_dimension is None:
        return []
    known = latent.active is not None
    said = f"{latent.active} of {latent.dim} coordinates of {name} are active." if known else f"KL of {name}."
    d = found.dimensions
    columns: dict[str, tuple[float, ...] | None] = {
        "KL": latent.kl_per_dimension,
        "variance of the mean": latent.activity,
        "I_q": None if d is None else d.mutual_information,
        "marginal KL": None if d is None else d.marginal_kl,
    }
    there = {title: values for title, values in columns.items() if values is not None}
    rows = tuple((i, *(values[i] for values in there.values())) for i in range(latent.dim))
    return [
        picture(
            f"units_{name}",
            plots.units(name, latent),
            f"Bars, one per coordinate: KL, and variance of the posterior mean. {said}",
            "All charts have the same order. A unit is active when the variance of its posterior mean over the data "
            f"is above {ACTIVE} (dashed line). Look for a step: what lies behind it is not used. Where a prior reads "
            "other latents the mean can move with it: there trust the KL.",
        ),
        Table(
            f"units_{name}",
            f"Coordinates of {name} on {case.split}: nats per datum (but the variance)",
            (Column("coordinate"), *(Column(title) for title in there)),
            rows,
            folded=latent.dim > 5,
        ),
    ]


def _against_prior(case: Case, name: str) -> list[Picture]:
    """q_agg and prior in single coordinates and in the leading plane."""
    if name not in case.prior:
        return []
    seen = cloud(name, case.drawn.latents[name], case.prior[name])
    labels, names = _labels(case)
    made = []
    if seen.values.shape[1] > 1:
        d = case.held.latents[name].dimensions
        costs = None if d is None else d.marginal_kl
        order = np.argsort(-np.array(costs), kind="stable") if costs else np.argsort(-seen.means.var(0), kind="stable")
        by = "their marginal KL" if costs else "the variance of their posterior mean"
        made.append(
            picture(
                f"marginals_{name}",
                plots.marginals(seen, order.tolist(), costs),
                f"Histograms of the aggregated posterior of {name} in single coordinates, with the prior's outline.",
                f"Coordinates in the order of {by}, largest first. Where the filled shape leaves the outline the "
                "prior is wrong in that coordinate alone: a prior with another location, scale or shape would do. "
                "Where all shapes agree and the marginal KL is large, it is how coordinates hang together.",
            )
        )
    coloured = ", coloured by label" if labels is not None else ""
    made.append(
        picture(
            f"plane_{name}",
            plots.plane(seen, labels, names),
            f"Draws of the aggregated posterior of {name} in its two leading directions{coloured}, and the prior's "
            "lines.",
            "Each point is one draw of q(z | x), projected on the two directions in which the posterior means vary "
            "most; dark lines are the prior: 1, 2, 3 standard deviations, or 39, 86, 99 % of its draws where it is "
            "no single normal. Look for points outside the lines (codes the prior thinks unlikely) and for empty "
            "room inside them (holes: prior draws there decode to nothing the model has seen).",
        )
    )
    return made


def cloud(name: str, latent: LatentDraw, prior: Tensor) -> plots.Cloud:
    """What the plane of one latent shows."""
    normal = None
    loc, scale = latent.prior_loc, latent.prior_scale
    if loc is not None and scale is not None and bool((loc == loc[:1]).all()) and bool((scale == scale[:1]).all()):
        normal = (array(loc[0]), array(scale[0]))
    means = latent.value if latent.loc is None else latent.loc
    return plots.Cloud(name, array(means), array(latent.value), array(prior), normal)


def _labels(case: Case) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels of the rows, where there are at most ten classes."""
    if case.labels is None:
        return None, None
    labels = case.labels.numpy()
    return (labels, case.data.label_names) if plots.groups(labels) else (None, None)


def _curves(case: Case, names: list[str]) -> Table | None:
    """Active units by threshold."""
    use = {name: case.collapse.latents[name] for name in names if case.collapse.latents[name].curve}
    if not use:
        return None
    thresholds = [threshold for threshold, _ in next(iter(use.values())).curve[::4]]
    rows = tuple((name, latent.dim, *(count for _, count in latent.curve[::4])) for name, latent in use.items())
    caption = (
        f"Active units by threshold on the variance of the posterior mean (usual threshold {ACTIVE}); steady counts "
        "mean a clear answer"
    )
    columns = (Column("latent"), Column("size"), *(Column(f"> {threshold:g}") for threshold in thresholds))
    return Table("active_units", caption, columns, rows)


def _all_in_use(c: Collapse) -> Sentence:
    known = [latent for latent in c.latents.values() if latent.active is not None]
    coded = [name for name, latent in c.latents.items() if latent.codes is not None]
    if coded and not known:
        return Sentence(f"No collapse: every code (or bit) of {', '.join(coded)} is in use.")
    if c.n < 2:
        return Sentence("Of a single row it cannot be said which units are active.")
    if not known:
        return Sentence("Active units are not known for this posterior.")
    return Sentence(f"No collapse: all {sum(latent.dim for latent in known)} latent units are active.")


# ---------------------------------------------------------------------- holes of the prior


@dataclass(frozen=True)
class Holes:
    """Where the prior has mass and q_agg of train has none."""

    share: float
    """Of prior draws, an estimate."""
    error: float
    """Its standard error."""
    expected: float
    """Of codes of held-out data, by construction."""
    threshold: float
    """log q_agg(z) below which z lies in a hole, nats."""
    rows: int
    """Training rows behind q_agg."""
    draws: int
    """Of the prior."""


def holes(case: Case) -> Holes:
    """Share of prior draws that lie where q_agg of train is thinner than at 99 % of the codes of held-out data.

    Codes of the split and draws of the prior are scored under the same q_agg, whose rows are neither: a prior equal to
    the law of codes would have 1 % of its draws there.

    Raises:
        DataError: codes are points, discrete, or the model is conditioned: no one q_agg and prior face each other.
    """
    if case.split == "train":
        raise DataError("holes: expected codes of data that q_agg is not made of; got those of train.")
    names = list(case.pair.layout.latents)
    known = [case.drawn.latents[name] for name in names]
    if case.pair.frame.covariates or any(latent.point or latent.normal is None for latent in known):
        raise DataError("holes: expected normal posteriors of a model without covariates; got others.")
    if missing := [name for name in names if name not in case.prior]:
        raise DataError(f"holes: expected draws of the prior of {', '.join(missing)}; got none.")
    most, draws = MANY if set(names) <= case.pair.dependencies(case.x).guide_roots else FEW
    chosen = seeds.subset(len(case.rows["train"].x), most, seeds.mix(case.seed, seeds.ANALYSIS, 31))
    q = AggregatedPosterior.of(case.pair, case.rows["train"].x[chosen.to(case.x.device)], latents=names)
    held = case.drawn.flat(names)
    held = held[seeds.subset(len(held), draws, seeds.mix(case.seed, seeds.ANALYSIS, 32)).to(held.device)]
    prior = torch.cat([case.prior[name] for name in names], 1)[:draws].to(held)
    threshold = torch.quantile(q.log_prob(held), HOLE)
    share = float((q.log_prob(prior) < threshold).double().mean())
    error = math.sqrt(share * (1 - share) / len(prior))
    return Holes(share, error, HOLE, float(threshold), len(chosen), len(prior))


def _on_holes(found: Holes) -> Sentence:
    text = (
        f"{percent(found.share)} of prior draws fall where the codes of training data are thinner than at "
        f"{percent(1 - found.expected)} of the codes of other data"
    )
    if found.share > HOLES:
        return Sentence(
            f"The prior has holes: {text}. What the model draws there it has never been fitted to. Fit a richer prior "
            "to the codes (pvae refit RUN latents.z.prior.kind=realnvp), or train with vamp or mixture.",
            True,
        )
    return Sentence(f"{text} ({percent(found.expected)} is the aim).")
