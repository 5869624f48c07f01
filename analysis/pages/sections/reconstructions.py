"""Data beside what the decoder makes of their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.analysis.decompose.entry import quiet
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Column, Section, Table, picture
from pvae.analysis.pages.sections.examination import Case, array
from pvae.analysis.samples.encode import reconstruct
from pvae.analysis.samples.running import distribution_mean

SHOWN = 8


def section(case: Case) -> Section | None:
    """Best, median and worst; None of a model that infers nothing."""
    if case.implicit:
        return None
    found = case.attempt("reconstructions", lambda: rebuild(case))
    if not found:
        return None
    made = picture(
        "reconstructions",
        plots.reconstructions(found, *case.scale_of_grey),
        f"Data of {case.split} beside their reconstructions.",
        "Above the datum, below the mean of p(x | z) for one draw of q(z | x); figures are log p(x | z) in nats. "
        "Look at the worst: are they rare data, or something the decoder cannot draw?",
    )
    rows = tuple((part.title, *(float(v) for v in part.nats)) for part in found)
    columns = (Column("data"), *(Column(str(i + 1), 1) for i in range(len(found[0].nats))))
    table = Table("reconstructions", "log p(x | z) of the data above, nats", columns, rows, folded=True)
    numbers = {"reconstructions": {part.title: part.nats.tolist() for part in found}}
    return Section("reconstructions", "Reconstructions", (made, table), numbers=numbers)


def rebuild(case: Case) -> tuple[plots.Rebuilt, ...]:
    """Best, median and worst rows by log p(x | z), each with the mean of p(x | z) at the very z that was scored."""
    pair, drawn, x = case.pair, case.drawn, case.x
    order = drawn.reconstruction.argsort(descending=True, stable=True)
    n = len(order)
    count = min(SHOWN, n)
    middle = max(0, (n - count) // 2)
    picks = (("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[n - count :]))
    with quiet(pair, x, case.seed):
        return tuple(_part(case, title, x[rows], rows) for title, rows in picks[: 3 if n >= 3 * count else 1])


def _part(case: Case, title: str, chosen: Tensor, rows: Tensor) -> plots.Rebuilt:
    pair, drawn = case.pair, case.drawn
    data = pair.frame.split(chosen)[0]
    scores = array(drawn.reconstruction[rows])
    if pair.layout.enumerated:  # scored in expectation: shown at a draw of p(c | x, z)
        return plots.Rebuilt(title, array(data), array(reconstruct(pair, chosen).x), scores)
    trace = pair.guide_trace(chosen)
    sites = (*pair.layout.latents, *pair.layout.shared)
    values: dict[str, Tensor] = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in sites}
    for name, latent in drawn.latents.items():
        values[name] = latent.value[rows].to(values[name].dtype).reshape(values[name].shape)
    fn = pair.model_trace(chosen, values).nodes[pair.layout.observed[0]]["fn"]
    return plots.Rebuilt(title, array(data), array(distribution_mean(fn).expand(data.shape)), scores)
