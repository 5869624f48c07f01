"""Section on reconstructions: data beside the decoder's means at samples of their posteriors."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.analysis.decompose.entry import quiet
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import PageSection, PageTable, columns, picture
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.encode import reconstruct
from pvae.analysis.samples.running import distribution_mean

REBUILT_DATA = 8
"""Number of data per group: best, median and worst."""


def section(exam: Examination) -> PageSection | None:
    """Return the section with best, median and worst reconstructions; None for a model without a likelihood."""
    if exam.implicit:
        return None
    found = exam.attempt("reconstructions", lambda: rebuild(exam))
    if not found:
        return None
    made = picture(
        "reconstructions",
        plots.reconstructions(found, *exam.scale_of_grey),
        f"Data of {exam.split} beside their reconstructions.",
        "Above the datum, below the mean of p(x | z) for one sample of q(z | x); figures are log p(x | z) in nats. "
        "Look at the worst: rare data, or details that the decoder cannot produce.",
    )
    rows = tuple((part.title, *(float(v) for v in part.nats)) for part in found)
    titles = columns("data", *(str(i + 1) for i in range(len(found[0].nats))), digits=1)
    table = PageTable("reconstructions", "log p(x | z) of the data above, nats", titles, rows, folded=True)
    numbers = {"reconstructions": {part.title: part.nats.tolist() for part in found}}
    return PageSection("reconstructions", "Reconstructions", (made, table), numbers=numbers)


def rebuild(exam: Examination) -> tuple[plots.Rebuilt, ...]:
    """Return the best, median and worst reconstructions by log p(x | z), with the mean of p(x | z) at the same z.

    Only the best are returned if there are fewer than three times `REBUILT_DATA` rows.
    """
    pair, drawn, x = exam.pair, exam.drawn, exam.x
    order = drawn.reconstruction.argsort(descending=True, stable=True)
    n = len(order)
    count = min(REBUILT_DATA, n)
    middle = max(0, (n - count) // 2)
    picks = (("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[n - count :]))
    with quiet(pair, x, exam.seed):
        return tuple(_part(exam, title, x[rows], rows) for title, rows in picks[: 3 if n >= 3 * count else 1])


def _part(exam: Examination, title: str, chosen: Tensor, rows: Tensor) -> plots.Rebuilt:
    pair, drawn = exam.pair, exam.drawn
    data = pair.frame.split(chosen)[0]
    scores = array(drawn.reconstruction[rows])
    if pair.layout.enumerated:  # the score sums over codes c: decode a sample of p(c | x, z)
        return plots.Rebuilt(title, array(data), array(reconstruct(pair, chosen).x), scores)
    trace = pair.guide_trace(chosen)
    sites = (*pair.layout.latents, *pair.layout.shared)
    values: dict[str, Tensor] = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in sites}
    for name, latent in drawn.latents.items():
        values[name] = latent.value[rows].to(values[name].dtype).reshape(values[name].shape)
    fn = pair.model_trace(chosen, values).nodes[pair.layout.observed[0]]["fn"]
    return plots.Rebuilt(title, array(data), array(distribution_mean(fn).expand(data.shape)), scores)
