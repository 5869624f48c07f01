"""Where the nats of the ELBO go."""

from __future__ import annotations

import math

from pvae.analysis.decompose.result import Surgery
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import (
    Block,
    Column,
    Note,
    Picture,
    Section,
    Sentence,
    Table,
    Tile,
    nats,
    picture,
    side_by_side,
)
from pvae.analysis.pages.sections.examination import Case

SATURATED = 0.9
"""Share of log n above which the mutual information is held down by the number of rows."""


def section(case: Case) -> Section | None:
    """The waterfall and the table of the surgery; None of a model without a likelihood."""
    if case.implicit:
        return None
    s = case.held
    blocks: list[Block] = [_waterfall(case), _table(case)]
    blocks += [Note(text) for text in s.notes]
    if s.shared:
        caption = "Global latents: log q − log p, nats for the whole data set, no part of the figures per datum"
        blocks.append(Table("global_latents", caption, (Column("site"), Column("nats")), tuple(s.shared.items())))
    if (classes := _classes(case)) is not None:
        blocks.append(classes)
    tiles = []
    if s.marginal_kl is not None:
        tiles.append(Tile("marginal KL", nats(s.marginal_kl), "nats, the most a prior can win"))
    lead = (
        "ELBO = reconstruction − I_q[x, z] − KL(q_agg ‖ p). The prior stands only in the last term. One set of draws "
        "serves every term, so the parts add up to the ELBO exactly."
    )
    surgeries = {split: {**found.to_dict(), "rows": case.rows[split].note} for split, found in case.surgeries.items()}
    return Section(
        "surgery", "ELBO surgery", tuple(blocks), lead, tuple(on_prior(s)), tuple(tiles), {"surgery": surgeries}
    )


def on_prior(s: Surgery) -> list[Sentence]:
    """What the marginal KL says of the prior."""
    if any("deterministic code" in note for note in s.notes):
        return [Sentence("The code is deterministic: I_q[x, z] is log n, and its marginal KL is not defined.")]
    if s.marginal_kl is None or s.mutual_information is None:
        return [Sentence("The marginal KL is not known for this posterior.")]
    text = f"The marginal KL is {nats(s.marginal_kl)} nats, the most a better prior can win with this encoder."
    if s.mutual_information.value > SATURATED * s.log_n.value:
        text += (
            f" Read it as an upper figure: I_q[x, z] = {nats(s.mutual_information)} stands at its ceiling "
            f"log {s.n} = {nats(s.log_n)}, so part of the marginal KL only says that {s.n} rows are few."
        )
    if s.train_gain is not None:
        gain = s.train_gain.value
        verb = "win" if gain >= 0 else "lose"
        text += (
            f" As the prior, q_agg of the training rows would {verb} {nats(abs(gain))} here."
            if math.isfinite(gain)
            else " q_agg of the training rows is no prior for these: it gives some of their codes no probability."
        )
    return [Sentence(text)]


def _waterfall(case: Case) -> Picture:
    found, gaps = case.held, plots.inference_steps(case.held, case.evidence)
    panels = plots.waterfall_steps(found, gaps)
    said = "; ".join(
        f"{step.label} {nats(step.value if step.is_level else -step.value)}" for steps in panels[:2] for step in steps
    )
    above = (
        f"On top, from log p(x) down to the ELBO: what inference loses (found on {case.evidence_rows.note}). Below, "
        "from log p(x | z) down"
        if gaps
        else "From log p(x | z) down"
    )
    return picture(
        "waterfall",
        plots.waterfall(panels),
        f"Waterfall of the ELBO on {case.split}: {said} nats per datum.",
        f"{above} to the ELBO: I_q[x, z] is information about x that the code really carries, the marginal KL is what "
        "the prior's shape wastes. A long bar of marginal KL: try a richer prior. The axis does not start at 0.",
    )


def _table(case: Case) -> Table:
    rows = side_by_side(case.surgeries)
    where = "; ".join(f"{split}: {case.rows[split].note}, {s.samples} draws" for split, s in case.surgeries.items())
    return Table(
        "surgery",
        f"Nats per datum, ± Monte Carlo standard error with the data fixed; {where}",
        (Column("term"), *(Column(split) for split in case.surgeries), Column("what it is", is_text=True)),
        tuple(rows),
        strong=tuple(i for i, row in enumerate(rows) if row[0] == "elbo"),
    )


def _classes(case: Case) -> Table | None:
    """One row for each label, where there are labels and not too many."""
    found = case.held.classes
    if not 1 < len(found) <= 50:
        return None
    names, terms = case.data.label_names, ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")
    rows = tuple(
        (plots.class_name(label, names), c.n, *(getattr(c, term) for term in terms)) for label, c in found.items()
    )
    columns = (Column("label"), Column("rows"), *(Column(term.replace("_", " "), 2) for term in terms))
    return Table("surgery_by_label", f"Label by label, {case.split}: nats per datum", columns, rows)
