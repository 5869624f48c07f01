"""Section on latents: KL and activity of their coordinates, and aggregated posterior against prior."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pvae.analysis.decompose.collapse import ACTIVE, Collapse
from pvae.analysis.decompose.posterior_draws import LatentDraw
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import (
    Block,
    PageSection,
    PageTable,
    Picture,
    Sentence,
    Tile,
    columns,
    picture,
)
from pvae.analysis.pages.document.text import percent
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.pages.sections.holes import HOLE, holes, on_holes


def section(exam: Examination) -> PageSection | None:
    """Return the section on active units, marginals and planes of latents, and holes; None without a likelihood."""
    if exam.implicit:
        return None
    real = [name for name, latent in exam.collapse.latents.items() if latent.codes is None]
    blocks: list[Block] = [_table(exam)]
    for name in real:
        blocks += _units(exam, name)
        blocks += _against_prior(exam, name)
    if (curves := _curves(exam, real)) is not None:
        blocks.append(curves)
    said = [Sentence(text, True) for text in exam.collapse.alerts] or [_all_in_use(exam.collapse)]
    tiles, numbers = [], {"collapse": exam.collapse.to_dict(), "holes": None}
    found = exam.attempt("holes", lambda: holes(exam))
    if found is not None:
        said.append(on_holes(found))
        numbers["holes"] = vars(found)
        tiles.append(Tile("prior holes", percent(found.share), f"of prior samples; {percent(HOLE)} expected"))
    return PageSection("latents", "Latents", tuple(blocks), "", tuple(said), tuple(tiles), numbers)


def _table(exam: Examination) -> PageTable:
    use = exam.collapse.latents
    titles = ("latent", "size", "active", "KL", "KL, closed form", "I_q", "marginal KL", "total correlation")
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
        for name, z in exam.held.latents.items()
    )
    caption = f"Latents on {exam.split}: nats per datum; a dash where the posterior or prior depends on other latents"
    return PageTable("latents", caption, columns(*titles), rows)


def _units(exam: Examination, name: str) -> list[Block]:
    """Return a bar chart and a table of the KL and activity of each coordinate of a latent; empty without either."""
    latent, d = exam.collapse.latents[name], exam.held.latents[name].dimensions
    if latent.activity is None and latent.kl_per_dimension is None:
        return []
    known = latent.active is not None
    said = f"{latent.active} of {latent.dim} coordinates of {name} are active." if known else f"KL of {name}."
    figures: dict[str, tuple[float, ...] | None] = {
        "KL": latent.kl_per_dimension,
        "variance of the mean": latent.activity,
        "I_q": None if d is None else d.mutual_information,
        "marginal KL": None if d is None else d.marginal_kl,
    }
    there = {title: values for title, values in figures.items() if values is not None}
    rows = tuple((i, *(values[i] for values in there.values())) for i in range(latent.dim))
    caption = f"Coordinates of {name} on {exam.split}: nats per datum, except for the variance"
    return [
        picture(
            f"units_{name}",
            plots.units(name, latent),
            f"Bars, one per coordinate: KL, and variance of the posterior mean. {said}",
            "All charts have the same order. A unit is active if the variance of its posterior mean over the data is "
            f"above {ACTIVE} (dashed line). Units to the right of a sharp drop are not used. If the prior depends on "
            "other latents the mean can move with it: then read the KL.",
        ),
        PageTable(f"units_{name}", caption, columns("coordinate", *there), rows, folded=latent.dim > 5),
    ]


def _against_prior(exam: Examination, name: str) -> list[Picture]:
    """Return plots of q_agg against the prior of a latent: marginal distributions, and the two leading directions."""
    if name not in exam.prior:
        return []
    seen = cloud(name, exam.drawn.latents[name], exam.prior[name])
    labels, names = _labels(exam)
    made = []
    if seen.values.shape[1] > 1:
        d = exam.held.latents[name].dimensions
        costs = None if d is None else d.marginal_kl
        order = np.argsort(-np.array(costs if costs else seen.means.var(0)), kind="stable")
        by = "marginal KL" if costs else "variance of the posterior mean"
        made.append(
            picture(
                f"marginals_{name}",
                plots.marginals(seen, order.tolist(), costs),
                f"Histograms of the aggregated posterior of {name} in single coordinates, with the prior's outline.",
                f"Coordinates with the largest {by} first. Where the filled shape differs from the outline, the prior "
                "is wrong in that coordinate alone: another location, scale or shape would help. If all shapes agree "
                "and the marginal KL is large, the coordinates depend on each other.",
            )
        )
    coloured = ", coloured by label" if labels is not None else ""
    made.append(
        picture(
            f"plane_{name}",
            plots.plane(seen, labels, names),
            f"Samples of the aggregated posterior of {name} in its two leading directions{coloured}, and contours of "
            "the prior.",
            "Each point is a sample of q(z | x), projected on the two directions in which the posterior means vary "
            "most. Dark lines are the prior: 1, 2, 3 standard deviations, or 39, 86, 99 % of its samples if it is not "
            "a single normal. Points outside the lines are codes that are improbable under the prior; empty regions "
            "inside them are holes, where the decoder was never fitted.",
        )
    )
    return made


def cloud(name: str, latent: LatentDraw, prior: Tensor) -> plots.Cloud:
    """Return posterior means, posterior samples and prior samples `(m, D)` of one latent, as the plots take them."""
    normal = None
    loc, scale = latent.prior_loc, latent.prior_scale
    if loc is not None and scale is not None and bool((loc == loc[:1]).all()) and bool((scale == scale[:1]).all()):
        normal = (array(loc[0]), array(scale[0]))
    means = latent.value if latent.loc is None else latent.loc
    return plots.Cloud(name, array(means), array(latent.value), array(prior), normal)


def _labels(exam: Examination) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels of the rows and names of the classes, to colour points; None unless there are 2 to 10 classes."""
    if exam.labels is None:
        return None, None
    labels = exam.labels.numpy()
    return (labels, exam.data.label_names) if plots.groups(labels) else (None, None)


def _curves(exam: Examination, names: list[str]) -> PageTable | None:
    """Return the table of active units by threshold on the variance; None if the activity of all is unknown."""
    use = {name: exam.collapse.latents[name] for name in names if exam.collapse.latents[name].curve}
    if not use:
        return None
    thresholds = [f"> {threshold:g}" for threshold, _ in next(iter(use.values())).curve[::4]]
    rows = tuple((name, latent.dim, *(count for _, count in latent.curve[::4])) for name, latent in use.items())
    caption = (
        f"Active units by threshold on the variance of the posterior mean (usual threshold {ACTIVE}); counts that do "
        "not change mean a clear answer"
    )
    return PageTable("active_units", caption, columns("latent", "size", *thresholds), rows)


def _all_in_use(c: Collapse) -> Sentence:
    known = [latent for latent in c.latents.values() if latent.active is not None]
    coded = [name for name, latent in c.latents.items() if latent.codes is not None]
    if coded and not known:
        return Sentence(f"No collapse: every code (or bit) of {', '.join(coded)} is in use.")
    if c.n < 2:
        return Sentence("Active units are not defined for a single row.")
    if not known:
        return Sentence("Active units are not known for this posterior.")
    return Sentence(f"No collapse: all {sum(latent.dim for latent in known)} latent units are active.")
