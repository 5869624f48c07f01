"""The report of a run: one self-contained HTML file, with every number beside it in JSON and CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from pvae import seeds
from pvae.analysis import plots
from pvae.analysis.anatomy import Surgery
from pvae.analysis.collapse import ACTIVE, CodeUse, Collapse, collapse
from pvae.analysis.draws import Draw, LatentDraw, draw, quiet
from pvae.analysis.estimate import Estimate
from pvae.analysis.evidence import Evidence, evidence
from pvae.analysis.generate import mean_of, reconstruct, sample
from pvae.analysis.surgery import surgery
from pvae.analysis.table import cell
from pvae.data.streamed import Streamed
from pvae.errors import DataError, DeclarationError
from pvae.files import write_atomic
from pvae.pair import Pair
from pvae.run import Run
from pvae.show import formulas
from pvae.spec import Experiment

TRAIN_ROWS = 5000
EVIDENCE_ROWS = 500
PRIOR_DRAWS = 3000
SHOWN_SAMPLES = 40
SHOWN_ROWS = 8
SATURATED = 0.9
"""Share of log n above which the mutual information is held down by the number of rows."""
GAP_NATS = 1.0
"""Train minus test ELBO above which the report speaks of overfitting."""
TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "data")
STEPS = ("surgery of train", "surgery of the split", "evidence", "latents", "figures")

Progress = Callable[[int, int, str], None]


def _silent(_done: int, _total: int, _what: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Rows:
    """Rows of a split that a figure was computed on."""

    x: Tensor
    of: int
    """Rows that the split has."""

    @property
    def note(self) -> str:
        """`447 rows`, or `5000 of 50000 rows, drawn at random`."""
        n = len(self.x)
        return f"{n} rows" if n == self.of else f"{n} of {self.of} rows, drawn at random"


@dataclass(frozen=True)
class Findings:
    """Everything a report says of a run, before it is written down."""

    run: Run
    split: str
    rows: dict[str, Rows]
    """Rows of the surgery, by split."""
    surgeries: dict[str, Surgery]
    """By split: train, and the split of the report."""
    evidence: Evidence | None
    """None where nothing bounds log p(x): the code is a point."""
    evidence_rows: Rows
    collapse: Collapse
    drawn: Draw
    """One draw of every latent for the rows of the split."""
    prior: dict[str, Tensor]
    """Draws of the prior of every latent, `(m, D)`."""
    sampled: Tensor | None
    """Means of p(x | z) for the first of them."""
    rebuilt: tuple[plots.Rebuilt, ...]
    missing: dict[str, str]
    """Sections that could not be made, and why."""
    seed: int

    @property
    def held(self) -> Surgery:
        """The surgery of the report's split."""
        return self.surgeries[self.split]

    @property
    def gap(self) -> float | None:
        """ELBO of train minus that of the split, nats per datum."""
        return None if self.split == "train" else self.surgeries["train"].elbo.value - self.held.elbo.value


# ---------------------------------------------------------------------- entry points


def report(
    run: Run,
    *,
    split: str = "test",
    samples: int = 8,
    evidence_samples: int = 500,
    seed: int = 0,
    on_progress: Progress = _silent,
) -> Path:
    """Write `report/index.html`, `report.json` and `surgery.csv` of a run; twice the same, byte for byte.

    Arguments:
        run: a run with a checkpoint.
        split: the rows that are reported: "train", "validation" or "test".
        samples: draws per datum for the surgery.
        evidence_samples: importance samples per datum, on at most 500 rows.
        seed: of all draws.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        The path of the HTML file.

    Raises:
        PvaeError: the run has no checkpoint or no data, or a file cannot be written.
    """
    if run.pair.implicit:
        from pvae.analysis import sample_report  # here, because it is made of parts of this module

        return sample_report.write(sample_report.examine(run, split=split, seed=seed, on_progress=on_progress))
    found = examine(
        run, split=split, samples=samples, evidence_samples=evidence_samples, seed=seed, on_progress=on_progress
    )
    path = write(found)
    on_progress(len(STEPS), len(STEPS), "written")
    return path


def examine(
    run: Run,
    *,
    split: str = "test",
    samples: int = 8,
    evidence_samples: int = 500,
    seed: int = 0,
    on_progress: Progress = _silent,
) -> Findings:
    """Compute everything a report says; arguments as for `report`."""
    pair, data = run.pair, run.data
    rows = {name: some(data.split(name).rows, TRAIN_ROWS, seed) for name in dict.fromkeys(("train", split))}
    rows[split] = some(data.split(split).rows, 2 * TRAIN_ROWS, seed) if split != "train" else rows[split]
    surgeries = {}
    for i, (name, chosen) in enumerate(rows.items()):
        on_progress(i, len(STEPS), STEPS[i])
        surgeries[name] = surgery(pair, chosen.x, samples=samples, seed=seed)
    x = rows[split].x
    on_progress(2, len(STEPS), STEPS[2])
    evidence_rows = some(data.split(split).rows, EVIDENCE_ROWS, seed)
    missing: dict[str, str] = {}
    bound = _attempt(lambda: evidence(pair, evidence_rows.x, samples=evidence_samples, seed=seed), "evidence", missing)
    on_progress(3, len(STEPS), STEPS[3])
    with quiet(pair, x, seed):
        drawn = draw(pair, x)
        rebuilt = _attempt(lambda: rebuild(pair, x, drawn), "reconstructions", missing)
        prior, sampled = _attempt(lambda: simulate(run, seed), "samples", missing) or ({}, None)
    on_progress(4, len(STEPS), STEPS[4])
    return Findings(
        run, split, rows, surgeries, bound, evidence_rows, collapse(pair, x, seed), drawn, prior, sampled,
        rebuilt or (), missing, seed,
    )  # fmt: skip


def write(found: Findings) -> Path:
    """Write the report's three files, each whole or not at all; returns the path of the HTML file."""
    folder = found.run.files.report
    page = render(found)
    numbers = json.dumps(finite(figures(found)), indent=2, allow_nan=False, ensure_ascii=True) + "\n"
    write_atomic(folder / "report.json", numbers)
    write_atomic(folder / "surgery.csv", surgery_csv(found.surgeries))
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def some(x: Tensor | Streamed, most: int, seed: int) -> Rows:
    """All rows, or `most` of them drawn with a seed, in their order."""
    return Rows(x[seeds.subset(len(x), most, seeds.mix(seed, seeds.ANALYSIS, 2)).to(x.device)], len(x))


REFUSALS = (DataError, DeclarationError, NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError)


def _attempt(make: Callable[[], Any], section: str, missing: dict[str, str]) -> Any:
    """What `make` gives; a hand-written pair that cannot do it loses a section, not the report."""
    try:
        return make()
    except (
        DataError,
        DeclarationError,
        NotImplementedError,
        ValueError,
        RuntimeError,
        LookupError,
        AttributeError,
    ) as error:
        missing[section] = (str(error).splitlines() or [type(error).__name__])[0][:300]
        return None


# ---------------------------------------------------------------------- reading the pair


def rebuild(pair: Pair, x: Tensor, drawn: Draw) -> tuple[plots.Rebuilt, ...]:
    """Best, median and worst rows by log p(x | z), each with the mean of p(x | z) at the very z that was scored."""
    order = drawn.reconstruction.argsort(descending=True, stable=True)
    n = len(order)
    count = min(SHOWN_ROWS, n)
    middle = max(0, (n - count) // 2)
    picks = (("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[n - count :]))
    parts = []
    for title, rows in picks[: 3 if n >= 3 * count else 1]:
        chosen = x[rows]
        data = pair.frame.split(chosen)[0]
        if pair.layout.enumerated:  # scored in expectation: shown at a draw of p(c | x, z)
            mean = reconstruct(pair, chosen).x
            parts.append(plots.Rebuilt(title, array(data), array(mean), array(drawn.reconstruction[rows])))
            continue
        trace = pair.guide_trace(chosen)
        sites = (*pair.layout.latents, *pair.layout.shared)
        values: dict[str, Tensor] = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in sites}
        for name, latent in drawn.latents.items():
            values[name] = latent.value[rows].to(values[name].dtype).reshape(values[name].shape)
        fn = pair.model_trace(chosen, values).nodes[pair.layout.observed[0]]["fn"]
        mean = mean_of(fn).expand(data.shape)
        parts.append(plots.Rebuilt(title, array(data), array(mean), array(drawn.reconstruction[rows])))
    return tuple(parts)


def simulate(run: Run, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of every latent's prior `(m, D)`, and means of p(x | z) for the first of them."""
    drawn = sample(run, PRIOR_DRAWS, mean=True, seed=seed)
    known = {name: drawn.latents[name] for name in run.pair.layout.latents if name in drawn.latents}
    return {name: values.reshape(len(values), -1) for name, values in known.items()}, drawn.x[:SHOWN_SAMPLES]


def array(t: Tensor) -> plots.Array:
    """A tensor as float64 on the CPU."""
    return np.asarray(t.detach().double().cpu().numpy())


def cloud(name: str, latent: LatentDraw, prior: Tensor) -> plots.Cloud:
    """What the plane of one latent shows."""
    normal = None
    loc, scale = latent.prior_loc, latent.prior_scale
    if loc is not None and scale is not None and bool((loc == loc[:1]).all()) and bool((scale == scale[:1]).all()):
        normal = (array(loc[0]), array(scale[0]))
    means = latent.value if latent.loc is None else latent.loc
    return plots.Cloud(name, array(means), array(latent.value), array(prior), normal)


# ---------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Sentence:
    """One sentence of the verdict."""

    text: str
    is_alert: bool = False


def verdict(found: Findings) -> list[Sentence]:
    """What the figures say, in plain words, the ELBO first; alerts name the knob to turn."""
    sentences = [_on_elbo(found), _on_evidence(found), *_on_prior(found.held)]
    if found.gap is not None:
        sentences.append(_on_gap(found, found.gap))
    if not found.collapse.alerts:
        sentences.append(_all_in_use(found.collapse))
    return sentences + [Sentence(text, True) for text in (*found.collapse.alerts, *training_alerts(found.run))]


def _on_elbo(found: Findings) -> Sentence:
    s = found.held
    return Sentence(
        f"On {found.split} ({found.rows[found.split].note}) the ELBO is {nats(s.elbo)} nats per datum: "
        f"{nats(s.reconstruction)} for the reconstruction, less {nats(s.kl)} that the code costs."
    )


def _on_evidence(found: Findings) -> Sentence:
    e = found.evidence
    if e is None:
        return Sentence("Nothing here bounds log p(x): the code is a point, whose KL to a density is not defined.")
    if e.exact is not None:
        return Sentence(f"log p(x) itself is {nats(e.exact)} nats: no other guide could be tighter.")
    where = "" if e.n == found.evidence_rows.of else f"On {found.evidence_rows.note}, "
    return Sentence(
        f"{where}log p(x) is at least {nats(e.iwae)} nats and the ELBO {nats(e.elbo)}: a better guide would win "
        f"{nats(e.gap)} nats or more without touching the model."
    )


def _on_prior(s: Surgery) -> list[Sentence]:
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
    return [Sentence(text)]


def _on_gap(found: Findings, gap: float) -> Sentence:
    train, held = found.surgeries["train"].elbo, found.held.elbo
    error = math.hypot(train.data_error or 0.0, held.data_error or 0.0)
    text = f"Train stands {nats(gap)} nats above {found.split} (± {nats(error)} from the choice of rows)."
    if gap > max(GAP_NATS, 2 * error):
        return Sentence(f"{text} The model overfits: set train.patience, use smaller networks, or more data.", True)
    if gap < 0:
        return Sentence(f"Train stands {nats(-gap)} nats below {found.split}: no sign of overfitting.")
    return Sentence(text)


def training_alerts(run: Run) -> list[str]:
    """What went wrong while a run was fitted, each with what to do."""
    status = run.status
    alerts = []
    if status.get("state") != "finished":
        epochs = f"{status.get('epoch')} of {status.get('epochs')}"
        alerts.append(f"The run is {status.get('state')} after epoch {epochs}: go on with pvae resume.")
    skipped = status.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        alerts.append(f"{skipped} steps with a NaN or infinite loss were skipped: lower the learning rate.")
    return alerts


def _all_in_use(c: Collapse) -> Sentence:
    known = [latent for latent in c.latents.values() if latent.active is not None]
    coded = [name for name, latent in c.latents.items() if latent.codes is not None]
    if coded and not known:
        return Sentence(f"No collapse: every code (or bit) of {', '.join(coded)} is in use.")
    if not known:
        return Sentence("Active units are not known for this posterior.")
    return Sentence(f"No collapse: all {sum(latent.dim for latent in known)} latent units are active.")


# ---------------------------------------------------------------------- figures and tables


@dataclass(frozen=True)
class Picture:
    """A figure in the page."""

    source: str
    """Data URI."""
    alt: str
    caption: str


def picture(made: Figure, alt: str, caption: str) -> Picture:
    """A figure as a data URI, with what to see for those who cannot and what to look for."""
    return Picture("data:image/png;base64," + base64.b64encode(plots.png(made)).decode("ascii"), alt, caption)


def pictures(found: Findings) -> dict[str, list[Picture]]:
    """All figures by section."""
    train = found.run.pair.frame.split(found.rows["train"].x)[0]
    low, high = (float(v) for v in train.aminmax())
    drawn: dict[str, list[Picture]] = {"units": [], "codes": [], "planes": [], "rebuilt": [], "samples": []}
    rows = found.run.files.metrics_rows()
    drawn["training"] = [_training(rows, found)] if rows else []
    if any(row.get("split") == "analysis" for row in rows):
        drawn["training"].append(_history(rows, found))
    drawn["surgery"] = [_waterfall(found)]
    labels, names = _labels(found)
    for name, latent in found.collapse.latents.items():
        if latent.activity is not None or latent.kl_per_dimension is not None:
            drawn["units"].append(_units(found, name))
        if latent.codes is not None:
            drawn["codes"].append(_codes(name, latent.codes))
        elif name in found.prior:
            made = plots.plane(cloud(name, found.drawn.latents[name], found.prior[name]), labels, names)
            drawn["planes"].append(picture(made, _alt_of_plane(name, labels is not None), PLANE_CAPTION))
    if found.rebuilt:
        made = plots.reconstructions(found.rebuilt, low, high)
        drawn["rebuilt"] = [picture(made, f"Data of {found.split} beside their reconstructions.", REBUILT_CAPTION)]
    if found.sampled is not None:
        made = plots.samples(array(found.sampled), array(train[:1000]), low, high)
        drawn["samples"] = [picture(made, f"{len(found.sampled)} samples of the model.", SAMPLES_CAPTION)]
    return drawn


PLANE_CAPTION = (
    "Each point is one draw of q(z | x), projected on the two directions in which the posterior means vary most; dark "
    "lines are the prior: 1, 2, 3 standard deviations, or 39, 86, 99 % of its draws where it is no single normal. "
    "Look for points outside the lines (codes the prior thinks unlikely) and for empty room inside them "
    "(holes: prior draws there decode to nothing the model has seen)."
)
REBUILT_CAPTION = (
    "Above the datum, below the mean of p(x | z) for one draw of q(z | x); figures are log p(x | z) in nats. Look at "
    "the worst: are they rare data, or something the decoder cannot draw?"
)
SAMPLES_CAPTION = (
    "These are means of p(x | z) for draws of the prior, not draws of x: without the likelihood's own noise they look "
    "smoother than data. Look for samples that mix kinds; they come from where the prior has mass and q_agg has none."
)


def _training(rows: Sequence[Mapping[str, Any]], found: Findings) -> Picture:
    epochs, best = plots.series(rows, "validation", "elbo")
    said = ""
    if len(best):
        said = f" Best validation ELBO {nats(float(best.max()))} at epoch {int(epochs[best.argmax()])}."
    return picture(
        plots.training(rows, list(found.collapse.latents)),
        f"Three charts over epochs: ELBO of train and validation, KL of every latent, beta.{said}",
        "The ELBO is the one with beta = 1 whatever the loss was; its first epochs may lie below the frame. Look for "
        "validation that turns down while train "
        "still rises (overfitting), for an end that still rises (train longer), and for a KL that falls to zero "
        "(collapse).",
    )


def _history(rows: Sequence[Mapping[str, Any]], found: Findings) -> Picture:
    watched = found.run.plan.analysis
    return picture(
        plots.history(rows),
        f"Mutual information and marginal KL of {watched.rows} {watched.split} rows over epochs.",
        "The two parts of the KL, on the same rows and noise each time. Look for a marginal KL that grows while the "
        "information stands still (a richer prior would pay for itself), and for information at its ceiling (too few "
        "rows were watched: raise analysis.rows).",
    )


def _waterfall(found: Findings) -> Picture:
    said = "; ".join(
        f"{step.label} {nats(step.value if step.is_level else -step.value)}"
        for step in plots.waterfall_steps(found.held)[0]
    )
    return picture(
        plots.waterfall(found.held),
        f"Waterfall from the reconstruction to the ELBO on {found.split}: {said} nats per datum.",
        "From log p(x | z) down to the ELBO. The first bar is information about x that the code really carries; the "
        "second is what the prior's shape wastes. A long second bar: try a richer prior. The axis does not start at 0.",
    )


def _units(found: Findings, name: str) -> Picture:
    latent = found.collapse.latents[name]
    known = latent.active is not None
    said = f"{latent.active} of {latent.dim} coordinates of {name} are active." if known else f"KL of {name}."
    return picture(
        plots.units(name, latent),
        f"Bars, one per coordinate: KL, and variance of the posterior mean. {said}",
        f"Both charts have the same order. A unit is active when the variance of its posterior mean over the data is "
        f"above {ACTIVE} (dashed line). Look for a step: what lies behind it is not used. Where a prior reads other "
        f"latents the mean can move with it: there trust the KL.",
    )


def _codes(name: str, use: CodeUse) -> Picture:
    said = f"{use.used} of {use.states} codes are in use. " if use.used is not None else ""
    low, high = min(use.perplexity), max(use.perplexity)
    return picture(
        plots.code_use(name, use),
        f"Use of the codes of {name}. {said}Perplexity of positions: {nats(low)} to {nats(high)}.",
        "Under the aggregated posterior of these rows. A code is in use when its share is above a thousandth of an "
        "even one. Perplexity is the number of codes in use, weighed: a position at 1 says nothing of x. Look for a "
        "long flat end (codes that are never chosen: fewer would do) and for positions that stay dark.",
    )


def _labels(found: Findings) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels of the split's rows, where all rows are shown and there are at most ten classes."""
    split = found.run.data.split(found.split)
    if split.y is None or len(split.y) != len(found.drawn.reconstruction):
        return None, None
    labels = split.y.cpu().numpy()
    return (labels, found.run.data.label_names) if plots.groups(labels) else (None, None)


def _alt_of_plane(name: str, coloured: bool) -> str:
    extra = ", coloured by label" if coloured else ""
    return f"Draws of the aggregated posterior of {name} in its two leading directions{extra}, and the prior's lines."


def surgery_table(surgeries: Mapping[str, Surgery]) -> list[dict[str, Any]]:
    """One row per term with an Estimate per split."""
    by_split = {split: {term: e for term, e, _ in s.rows()} for split, s in surgeries.items()}
    last = list(surgeries.values())[-1]
    return [
        {"term": term, "meaning": meaning, "figures": [figures.get(term) for figures in by_split.values()]}
        for term, _, meaning in last.rows()
        if any(figures.get(term) is not None for figures in by_split.values())
    ]


def latent_table(found: Findings) -> list[dict[str, Any]]:
    """One row per latent: KL with its closed form, information, active units and their curve."""
    use = found.collapse.latents
    return [
        {"name": name, "surgery": z, "use": use[name], "curve": use[name].curve[::4]}
        for name, z in found.held.latents.items()
    ]


def code_table(found: Findings) -> list[dict[str, Any]]:
    """One row per latent of codes or bits: how many are in use."""
    use = {name: latent.codes for name, latent in found.collapse.latents.items() if latent.codes is not None}
    return [
        {
            "name": name,
            "use": codes,
            "dim": len(codes.perplexity),
            "mean": sum(codes.perplexity) / len(codes.perplexity),
        }
        for name, codes in use.items()
    ]


# ---------------------------------------------------------------------- files


def figures(found: Findings) -> dict[str, Any]:
    """Every number of the report."""
    run = found.run
    manifest = run.files.manifest
    return {
        "run": {"name": run.name, "id": run.path.name, "started": manifest.get("started")},
        "split": found.split,
        "seed": found.seed,
        "verdict": [{"text": s.text, "alert": s.is_alert} for s in verdict(found)],
        "surgery": {split: {**s.to_dict(), "rows": found.rows[split].note} for split, s in found.surgeries.items()},
        "train_gap": found.gap,
        "evidence": None if found.evidence is None else {**found.evidence.to_dict(), "rows": found.evidence_rows.note},
        "collapse": found.collapse.to_dict(),
        "reconstructions": {part.title: part.nats.tolist() for part in found.rebuilt},
        "missing": found.missing,
        "metrics": run.files.metrics_rows(),
        "environment": dict(environment(run)),
    }


def finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become null, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def surgery_csv(surgeries: Mapping[str, Surgery]) -> str:
    """All figures of all surgeries, one row each."""
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    sheet.writerow(["split", "term", "nats_per_datum", "standard_error", "data_error", "kind", "note", "meaning"])
    for split, s in surgeries.items():
        for term, e, meaning in s.rows():
            if e is not None:
                row = (split, term, e.value, e.standard_error, e.data_error, e.kind, e.note, meaning)
                sheet.writerow([cell(value) for value in row])
    return out.getvalue()


def environment(run: Run) -> list[tuple[str, str]]:
    """(what, value) from the run's manifest and status."""
    manifest, status = run.files.manifest, run.status
    data = _table(manifest.get("data"))
    git = _table(manifest.get("git"))
    told = [
        ("run", f"{run.name} / {run.path.name}"),
        ("started", manifest.get("started")),
        ("state", f"{status.get('state')}, epoch {status.get('epoch')} of {status.get('epochs')}"),
        ("training time", f"{status.get('seconds')} s"),
        ("device", manifest.get("device")),
        ("engine", status.get("engine", manifest.get("engine"))),
        ("threads", manifest.get("threads")),
        ("seed", manifest.get("seed")),
        ("data", f"{data.get('source')}, shape {data.get('shape')}"),
        ("data fingerprint", data.get("fingerprint")),
        ("commit", f"{git['commit']}{' (changed since)' if git.get('dirty') else ''}" if git.get("commit") else None),
        ("platform", manifest.get("platform")),
        *_table(manifest.get("versions")).items(),
    ]
    return [(str(what), str(value)) for what, value in told if value is not None]


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# ---------------------------------------------------------------------- the page


def nats(value: float | Estimate, digits: int = 2) -> str:
    """A figure with a true minus sign; a dash where there is none."""
    number = float(value)
    return plots.nats(number, digits) if math.isfinite(number) else "–"


def shown(value: Any) -> Any:
    """Text without control characters or marks that turn its direction; newlines stay."""
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup is a macro's own output, cleaned inside
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd" for c in value)


def signed_error(e: Estimate) -> str:
    """`± 0.012`, or nothing for an exact figure."""
    return f"± {nats(e.standard_error, 3)}" if e.standard_error and math.isfinite(e.standard_error) else ""


def kind_of(e: Estimate) -> str:
    """`lower bound`, `estimate, conservative`."""
    return ", ".join(part for part in (e.kind.replace("_", " "), e.note) if part)


def tiles(found: Findings) -> list[tuple[str, str, str]]:
    """The headline figures: (what, figure, unit and condition)."""
    s = found.held
    out = [("ELBO", nats(s.elbo), f"nats per datum, {found.split}")]
    if found.evidence is not None:
        out.append(("log p(x) − ELBO", nats(found.evidence.gap), f"nats or more, {found.evidence.n} rows"))
    if s.marginal_kl is not None:
        out.append(("marginal KL", nats(s.marginal_kl), "nats, the most a prior can win"))
    if found.gap is not None:
        out.append((f"train − {found.split}", nats(found.gap), "nats of ELBO"))
    return out


def page(template: str, **values: Any) -> str:
    """A template with its values, all of them escaped."""
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"nats": nats, "error": signed_error, "kind": kind_of}
    return engine.get_template(template).render(**values)


def render(found: Findings) -> str:
    """The page, with everything that comes from the run escaped."""
    run = found.run
    events = [(str(e.get("kind")), str(e.get("message"))) for e in run.files.events() if e.get("kind") in TOLD_EVENTS]
    return page(
        "report.html.j2",
        found=found,
        name=run.name,
        identity=run.path.name,
        started=str(run.files.manifest.get("started", "")),
        description=run.plan.description,
        formulas=formulas(run.plan) if isinstance(run.plan, Experiment) else None,
        spec=run.files.spec_text,
        verdict=verdict(found),
        tiles=tiles(found),
        pictures=pictures(found),
        surgery_rows=surgery_table(found.surgeries),
        latent_rows=latent_table(found),
        code_rows=code_table(found),
        events=list(dict.fromkeys(events)),
        environment=environment(run),
        active=ACTIVE,
    )
