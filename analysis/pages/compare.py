"""Several runs side by side, on the same data: one HTML file like a run's report, with a column for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from pvae.analysis.bounds.rate_distortion import named, rate_distortion_of, require_alike
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import (
    Block,
    Column,
    Document,
    Picture,
    Section,
    Sentence,
    Table,
    Value,
    claim,
    nats,
    picture,
    side_by_side,
)
from pvae.analysis.pages.paired import Paired, elbos, paired
from pvae.analysis.pages.sections.appendix import environment_of
from pvae.analysis.pages.sections.examination import Case, Progress, array, draws, silent
from pvae.analysis.pages.sections.fit import GAP_NATS
from pvae.analysis.pages.sections.quality import measure, whole
from pvae.analysis.samples.quality import SampleQuality
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.util.toml import flat

PAIRED_DRAWS = 8
"""Draws per datum behind a paired difference of ELBOs, fewer where there are many data."""
TRAIN_ROWS = 10_000
"""Most training rows of a surgery here: as many as of test, so that both have the same ceiling log n."""
STRIP = 10
"""Samples of each run that are shown."""
FEWEST = 4
"""Runs from which on it is asked what goes with what."""
WIDE = 6
"""Runs up to which a table has a column for each; of more it has a row for each."""
DEFINED = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")


def compare(
    runs: Sequence[Run],
    out: Path,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    title: str = "Comparison",
    description: str = "",
    split: str = "test",
    samples: int = 2,
    evidence_samples: int = 500,
    seed: int = 0,
    figures: bool = False,
    on_progress: Progress = silent,
) -> Path:
    """Compare runs on the same rows; writes `index.html`, `report.json` and `tables/*.csv` into a folder.

    Arguments:
        runs: at least two, on the same data, prepared alike; the first is the reference of paired differences.
        out: the folder, made if it is not there.
        names: what to call them; default: their own, with their ids where two share one.
        groups: runs of one group differ in their seeds alone: figures are then also averaged over each group.
        title: of the page.
        description: below it.
        split: "train", "validation" or "test".
        samples: draws per datum for the surgeries.
        evidence_samples: importance samples per datum, on at most 500 rows.
        seed: of rows and draws, the same for all runs.
        figures: also write every picture.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        The path of the HTML file.

    Raises:
        DataError: fewer than two runs, or runs whose figures do not compare: other data, binarisation or covariates.
    """
    bench = Bench(runs, names, groups, split=split, samples=samples, evidence_samples=evidence_samples, seed=seed)
    claim(out)
    return examine(bench, title, description, on_progress).write(out, figures=figures)


class Bench:
    """Runs under comparison, by name; the first is the reference."""

    def __init__(
        self,
        runs: Sequence[Run],
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        *,
        split: str = "test",
        samples: int = 2,
        evidence_samples: int = 500,
        seed: int = 0,
    ) -> None:
        if names is None:
            runs = list({run.path: run for run in runs}.values())
            names = named(runs)
        if len(runs) < 2 or len(set(names)) != len(runs):
            raise DataError(f"compare: expected two or more runs of different names; got {', '.join(names) or 'none'}.")
        if groups is not None and len(groups) != len(runs):
            raise DataError(f"compare: expected a group for each of {len(runs)} runs; got {len(groups)}.")
        for run in runs[1:]:
            require_alike(runs[0], run)
            if not _covariates(run) and not _covariates(runs[0]):
                run.__dict__["data"] = runs[0].data  # the same by its fingerprint, and held once
        self.split, self.groups = split, groups
        options = {"samples": samples, "evidence_samples": evidence_samples, "seed": seed, "train_rows": TRAIN_ROWS}
        self.cases = {name: Case(run, split, **options) for name, run in zip(names, runs, strict=True)}

    @property
    def names(self) -> list[str]:
        """Of the runs."""
        return list(self.cases)

    @cached_property
    def scored(self) -> dict[str, Case]:
        """Those with a likelihood."""
        return {name: case for name, case in self.cases.items() if not case.implicit}

    @cached_property
    def elbos(self) -> dict[str, Tensor]:
        """The ELBO of every row, by run."""
        return {
            name: elbos(case.pair, case.x, draws(PAIRED_DRAWS, len(case.x)), case.seed)
            for name, case in self.scored.items()
        }

    @cached_property
    def log_p(self) -> dict[str, Tensor]:
        """The bound on log p(x) of some rows, by run, where there is one."""
        found = {name: case.evidence for name, case in self.scored.items()}
        return {name: bound.log_p for name, bound in found.items() if bound is not None}

    @cached_property
    def quality(self) -> dict[str, SampleQuality]:
        """Of draws of each run, in one space of features."""
        found: dict[str, SampleQuality] = {}
        space = next(iter(self.cases.values())).space
        for name, case in self.cases.items():
            case.__dict__["space"] = space
            if (quality := measure(case, ("draws",)).get("draws")) is not None:
                found[name] = quality
            self._forget(case)
        return found

    @staticmethod
    def _forget(case: Case) -> None:
        """Let go of samples, but for those that are shown: of many runs they would fill the memory."""
        case.__dict__["draws"] = None
        if case.sampled is not None:
            case.__dict__["sampled"] = replace(
                case.sampled, x=case.sampled.x[:STRIP].clone(), latents={}, covariates={}
            )

    def against(self, reference: str) -> dict[str, Paired]:
        """Paired differences of all other runs to one; of bounds on log p(x) only where all runs have one."""
        known = self.log_p if len(self.log_p) == len(self.scored) else {}
        return {
            name: paired(self.elbos[name], self.elbos[reference], known.get(name), known.get(reference))
            for name in self.elbos
            if name != reference
        }

    @cached_property
    def best(self) -> str | None:
        """The run with the highest bound on log p(x), or ELBO where one has none."""
        if not self.scored:
            return None
        values = self.log_p if len(self.log_p) == len(self.scored) else self.elbos
        return max(values, key=lambda name: float(values[name].mean()))

    @cached_property
    def figures(self) -> dict[str, dict[str, Value]]:
        """The figures of each run that fit into one row."""
        return {name: self._figures(name, case) for name, case in self.cases.items()}

    def _figures(self, name: str, case: Case) -> dict[str, Value]:
        row: dict[str, Value] = {}
        if not case.implicit:
            row |= {term: getattr(case.held, term) for term in DEFINED}
            if (bits := case.held.bits_per_dimension) is not None:
                row["bits_per_dimension"] = bits
            bound = case.evidence
            row["log_p"] = None if bound is None else bound.curve[-1][1]
            row["gap"] = None if bound is None else bound.gap
            row["train − " + case.split] = case.gap
            row["train marginal_kl"] = case.surgeries["train"].marginal_kl
        if (quality := self.quality.get(name)) is not None:
            f, d = quality.fidelity, quality.distances
            row |= {"told apart": quality.test.accuracy, "Fréchet": d.frechet, "precision": f.precision}
            row |= {"coverage": f.coverage, "sharpness of means": quality.sharpness_of_means}
        seconds = case.run.status.get("seconds")
        return {**row, "seconds": float(seconds) if isinstance(seconds, int | float) else None}


def _covariates(run: Run) -> bool:
    """Whether rows hold more than data."""
    return bool(getattr(run.plan, "covariates", None))


def examine(bench: Bench, title: str, description: str, on_progress: Progress = silent) -> Document:
    """Compute everything that a comparison says."""
    found = []
    for done, (name, make) in enumerate(SECTIONS.items()):
        on_progress(done, len(SECTIONS), name)
        found.append(make(bench))
    on_progress(len(SECTIONS), len(SECTIONS), "written")
    case = next(iter(bench.cases.values()))
    runs = {name: {"name": c.run.name, "id": c.run.path.name} for name, c in bench.cases.items()}
    return Document(
        kicker="pvae comparison",
        title=title,
        description=description,
        identity=f"{len(runs)} runs on {case.data.source}, the same rows of {bench.split} for all",
        numbers={"title": title, "runs": runs, "split": bench.split, "seed": case.seed},
        sections=tuple(section for section in found if section is not None),
        footer=(
            f"Every number of this page stands in report.json beside it, every table in tables/. Draws used seed "
            f"{case.seed}."
        ),
    )


# ---------------------------------------------------------------------- sections


def _overview(bench: Bench) -> Section:
    """The main figures, and the same averaged over groups."""
    terms = list(dict.fromkeys(term for row in bench.figures.values() for term in row))
    found = {term: [bench.figures[name].get(term) for name in bench.names] for term in terms}
    known = {term: values for term, values in found.items() if any(value is not None for value in values)}
    case = next(iter(bench.cases.values()))
    caption = (
        f"Nats per datum (bits per dimension: bits) on {bench.split} ({case.rows[bench.split].note}; log_p, from "
        f"below, on {case.evidence_rows.note}); shares; Fréchet distances in features; seconds of training"
    )
    blocks: list[Block] = [_by_run("overview", caption, bench.names, known)]
    if bench.groups is not None and len(set(bench.groups)) < len(bench.names):
        blocks.append(_averages(bench.groups, known))
    said = [*_on_best(bench), *_on_overfitting(bench), *_on_samples(bench)]
    numbers = {"figures": bench.figures, "groups": None if bench.groups is None else list(bench.groups)}
    return Section("overview", "Overview", tuple(blocks), sentences=tuple(said), numbers=numbers)


def _by_run(id: str, caption: str, names: Sequence[str], found: Mapping[str, Sequence[Value]]) -> Table:
    """A column for each run, or a row where they are many."""
    if len(names) <= WIDE:
        rows = tuple((term, *values) for term, values in found.items())
        return Table(id, caption, (Column("figure"), *(Column(name) for name in names)), rows)
    rows = tuple((name, *(values[i] for values in found.values())) for i, name in enumerate(names))
    return Table(id, caption, (Column("run"), *(Column(term.replace("_", " "), 2) for term in found)), rows)


def _averages(groups: Sequence[str], found: Mapping[str, Sequence[Value]]) -> Table:
    """Mean and standard error over the runs of each group."""
    rows = []
    for group in dict.fromkeys(groups):
        chosen = [i for i, g in enumerate(groups) if g == group]
        rows.append((group, len(chosen), *(_average([values[i] for i in chosen]) for values in found.values())))
    columns = (Column("runs alike"), Column("runs"), *(Column(term.replace("_", " "), 2) for term in found))
    return Table(
        "averages", "Mean over runs that differ in their seeds alone, ± its standard error", columns, tuple(rows)
    )


def _average(values: Sequence[Value]) -> Value:
    numbers = [float(v) for v in values if isinstance(v, int | float | Estimate)]
    if not numbers:
        return None
    error = float(np.std(numbers, ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan
    return Estimate(float(np.mean(numbers)), error, "estimate", note="over runs")


def _on_best(bench: Bench) -> list[Sentence]:
    if bench.best is None or len(bench.scored) < 2:
        return []
    rest = bench.against(bench.best)
    gains = {name: d.log_p or d.elbo for name, d in rest.items()}
    second = max(gains, key=lambda name: gains[name].value)
    gain, what = gains[second], "bound on log p(x)" if rest[second].log_p is not None else "ELBO"
    text = f"{bench.best} has the highest {what}, {nats(-gain.value)} ± {nats(gain.standard_error)} nats above {second}"
    if -gain.value <= 2 * gain.standard_error:
        return [Sentence(f"{text}: on these data the two cannot be told apart.")]
    return [Sentence(f"{text}, datum by datum.")]


def _on_overfitting(bench: Bench) -> list[Sentence]:
    gaps = {name: case.gap for name, case in bench.scored.items() if bench.split != "train"}
    wide = {name: gap for name, gap in gaps.items() if gap is not None and gap > GAP_NATS}
    if not wide:
        return []
    told = ", ".join(f"{name} ({nats(gap)})" for name, gap in wide.items())
    return [Sentence(f"Train stands more than {GAP_NATS:g} nat above {bench.split}: {told}.", True)]


def _on_samples(bench: Bench) -> list[Sentence]:
    if len(bench.quality) < 2:
        return []
    found = {name: quality.distances.frechet.value for name, quality in bench.quality.items()}
    near, far = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
    floor = bench.quality[near].distances.frechet_floor.value
    return [
        Sentence(
            f"Samples of {near} lie nearest to data (Fréchet distance {nats(found[near])}), those of {far} farthest "
            f"({nats(found[far])}); as many data come to {nats(floor)} among themselves."
        )
    ]


def _training(bench: Bench) -> Section | None:
    rows = {name: case.metrics for name, case in bench.scored.items() if case.metrics}
    if not rows:
        return None
    made = picture(
        "training",
        plots.overlaid(list(rows), list(rows.values())),
        f"ELBO of validation over epochs for {len(rows)} runs.",
        "Look for runs whose lines still rise at their end (not done yet) and for runs that turn down (overfitting).",
    )
    return Section("training", "Training", (made,))


def _plane(bench: Bench) -> Section | None:
    if len(bench.scored) < 2:
        return None
    found = rate_distortion_of(bench.split, {name: case.held for name, case in bench.scored.items()})
    made = picture(
        "rate_distortion",
        found.figure(),
        "Runs as points: rate to the right, distortion upwards; lines of equal ELBO.",
        "Runs on one dashed line have the same ELBO: further right they spend more nats on the code, further down they "
        "rebuild better. The ELBO alone does not tell them apart.",
    )
    rows = tuple(
        (
            row["run"],
            *(Estimate(row[key], row[f"{key}_error"], "estimate") for key in ("rate", "distortion", "elbo")),
        )
        for row in found.rows
    )
    caption = f"Nats per datum on {bench.split}, ± Monte Carlo standard error"
    table = Table(
        "rate_distortion", caption, (Column("run"), Column("rate"), Column("distortion"), Column("ELBO")), rows
    )
    return Section("plane", "Rate and distortion", (made, table), numbers={"rate_distortion": found.to_dict()})


def _pairs(bench: Bench) -> Section | None:
    if len(bench.scored) < 2:
        return None
    reference = next(iter(bench.scored))
    found = bench.against(reference)
    gains = {name: d.log_p or d.elbo for name, d in found.items()}
    what = "bound on log p(x)" if all(d.log_p is not None for d in found.values()) else "ELBO"
    made = picture(
        "paired",
        plots.differences(list(gains), list(gains.values()), reference, what[0].upper() + what[1:]),
        f"Paired differences to {reference}: "
        + "; ".join(f"{name} {nats(gain)} ± {nats(gain.standard_error)}" for name, gain in gains.items()),
        "Right of the line a run is better than the reference. The interval is of the difference datum by datum: "
        "data that are hard for both runs cancel. An interval that touches the line is no difference.",
    )
    rows = tuple((name, d.elbo, d.log_p, d.wins) for name, d in found.items())
    titles = (Column("run"), Column("ELBO"), Column("log p(x), from below"), Column("share of data won"))
    case = bench.scored[reference]
    caption = (
        f"Less {reference}, nats per datum ± standard error over data ({bench.split}: ELBO on "
        f"{case.rows[bench.split].note}, log p(x) on {case.evidence_rows.note})"
    )
    numbers = {"paired": {"reference": reference, "runs": {name: d.to_dict() for name, d in found.items()}}}
    return Section("paired", "Paired differences", (made, Table("paired", caption, titles, rows)), numbers=numbers)


def _surgeries(bench: Bench) -> Section | None:
    if not bench.scored:
        return None
    found = {name: case.held for name, case in bench.scored.items()}
    rows = side_by_side(found)
    caption = f"Surgery on {bench.split}: nats per datum, ± Monte Carlo standard error with the data fixed"
    if len(found) <= WIDE:
        titles = (Column("term"), *(Column(name) for name in found), Column("what it is", is_text=True))
        table = Table("surgery", caption, titles, tuple(rows), strong=(0,))
    else:
        table = _by_run("surgery", caption, list(found), {str(row[0]): row[1:-1] for row in rows})
    numbers = {"surgery": {name: s.to_dict() for name, s in found.items()}}
    return Section("surgery", "ELBO surgery", (table,), numbers=numbers)


def _together(bench: Bench) -> Section | None:
    """Does a smaller marginal KL go with better likelihood and better samples?"""
    rows = {name: row for name, row in bench.figures.items() if isinstance(row.get("marginal_kl"), Estimate)}
    if len(rows) < FEWEST:
        return None
    x = [float(row["marginal_kl"]) for row in rows.values()]  # type: ignore[arg-type]
    asked = {
        "log_p": "bound on log p(x), nats",
        "sharpness of means": "sharpness of means, of that of data",
        "Fréchet": "Fréchet distance of samples and data",
        "train − " + bench.split: f"ELBO of train less that of {bench.split}, nats",
    }
    panels = {
        title: [float(row[key]) for row in rows.values()]  # type: ignore[arg-type]
        for key, title in asked.items()
        if all(isinstance(row.get(key), Estimate | float) for row in rows.values())
    }
    if not panels or max(x) - min(x) < 1e-9:
        return None
    made = picture(
        "together",
        plots.together(list(rows), x, list(panels.items()), f"marginal KL on {bench.split}, nats per datum"),
        f"Figures of {len(rows)} runs over their marginal KL.",
        "Each run a point. If a smaller marginal KL went with a better model, the upper chart would fall from left to "
        "right. Runs of one kind cluster: read the clusters, not the points.",
    )
    ranks = {title: float(spearmanr(x, y).statistic) if max(y) > min(y) else math.nan for title, y in panels.items()}
    table = Table(
        "together",
        f"Rank correlation with the marginal KL over {len(rows)} runs: −1 to 1; few runs, no test",
        (Column("figure"), Column("Spearman", 2)),
        tuple(ranks.items()),
    )
    return Section("together", "What goes with the marginal KL", (made, table), numbers={"rank_correlation": ranks})


def _samples(bench: Bench) -> Section | None:
    blocks: list[Block] = []
    if (strips := _strips(bench)) is not None:
        blocks.append(strips)
    quality = bench.quality
    if quality:
        first = next(iter(quality.values()))
        known = {str(row[0]): row[1:-1] for row in whole(quality)}
        caption = f"Draws of each run beside data of {bench.split}: shares, and distances in {first.fidelity.space}"
        blocks.append(_by_run("sample_quality", caption, list(quality), known))
    if not blocks:
        return None
    numbers = {"sample_quality": {name: q.to_dict() for name, q in quality.items()}}
    return Section("samples", "Samples", tuple(blocks), numbers=numbers)


def _strips(bench: Bench) -> Picture | None:
    first = next(iter(bench.cases.values()))
    drawn = {name: case.sampled.x[:STRIP] for name, case in bench.cases.items() if case.sampled is not None}
    if not drawn or not plots.is_image(first.shape):
        return None
    images = np.stack([array(x).reshape(len(x), *first.shape) for x in drawn.values()])
    return picture(
        "samples",
        plots.gallery(images, *first.scale_of_grey, row_names=[plots.plain(name)[:18] for name in drawn]),
        f"{STRIP} samples of each of {len(drawn)} runs.",
        "Means of p(x | z) at draws of each model's own prior (draws of x where there is no mean). Look for runs whose "
        "samples mix kinds, miss kinds, or are blurred.",
    )


def _declared(bench: Bench) -> Section:
    """What differs between the declarations."""
    tables = {name: flat(case.run.plan.model_dump(mode="json")) for name, case in bench.cases.items()}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    differing = [
        key
        for key in keys
        if key not in ("name", "description") and len({repr(table.get(key)) for table in tables.values()}) > 1
    ]
    found = {key: [_told(tables[name].get(key)) for name in bench.names] for key in differing}
    blocks: tuple[Block, ...] = ()
    if found:
        blocks = (_by_run("declarations", "What the declarations do not share", bench.names, found),)
    environments = {name: dict(environment_of(case.run)) for name, case in bench.cases.items()}
    whats = list(dict.fromkeys(what for table in environments.values() for what in table))
    rows = {what: [environments[name].get(what) for name in bench.names] for what in whats}
    blocks += (_by_run("environment", "What the runs were made with", bench.names, rows),)
    return Section("declarations", "Declarations", blocks, numbers={"declarations": found}, is_appendix=True)


def _told(value: object) -> str | None:
    return None if value is None else str(value)


SECTIONS: Mapping[str, Callable[[Bench], Section | None]] = {
    "overview": _overview,
    "training": _training,
    "rate and distortion": _plane,
    "paired differences": _pairs,
    "surgery": _surgeries,
    "what goes together": _together,
    "samples": _samples,
    "declarations": _declared,
}
"""By name, in reading order."""
