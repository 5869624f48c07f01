"""Metrics of the finished runs of a study, cached in each run's folder, and the tables of a study."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose import result, surgery
from pvae.analysis.figures.estimate import cell
from pvae.analysis.pages.document.words import text
from pvae.analysis.samples.features import affordable
from pvae.errors import CheckpointError, DataError
from pvae.runs import RunDirectory, checkpoint
from pvae.runs.run import Run
from pvae.studies.sweep import FIRST, Measure
from pvae.util import digest, plain, pretty, read_inside, read_object, seeds, write_atomic

STUDY_FILE = "study.json"
STUDY_SCHEMA = 2
NEW_DATA = {"new_gain": "gain", "new_gain_upper": "gain_upper"}
"""Names of the metrics of the test split for what a better prior wins on new data, and attributes of `Population`."""
ESTIMATES = (*result.SURGERY_TERMS, *NEW_DATA, "iwae", *(f"train_{term}" for term in result.SURGERY_TERMS))
STUDY_FIGURES = (*ESTIMATES, "seconds")
"""Names of the metrics of a run: ELBO terms and IWAE of the test split, ELBO terms of train, seconds of training."""
TERMINAL_FIGURES = {
    "elbo": "ELBO", "mutual_information": "I_q", "marginal_kl": "marginal KL",
    "new_gain": "new ≥", "new_gain_upper": "new ≤", "iwae": "IWAE",
}  # fmt: skip
"""Metrics shown in the terminal table of a study: column title by name of the metric."""
RUN_COLUMNS = ("case", "seed", "stage")


# ---------------------------------------------------------------------- metrics of one run


def figures(run: Run, measure: Measure) -> dict[str, Any]:
    """Return the metrics of a finished run, from its `analysis/study.json` or, if this is not valid, computed anew.

    The file is valid for one checkpoint and one `measure`; newly computed metrics replace it.

    Arguments:
        run: a finished run.
        measure: numbers of posterior samples, of importance samples and of rows.

    Returns:
        A dict. `test` and `train` map each term of the ELBO surgery to an estimate in nats per datum (the dict of
        `Estimate.to_dict`), or to None if it is undefined; `iwae` is a lower bound of the mean log p(x) of the test
        split, or None; `seconds` is the training time; `notes` lists the errors of metrics that failed.

    Raises:
        DataError: the data are missing, or differ from those of the fit.
        CheckpointError: the run has no valid checkpoint.
    """
    if (found := kept(run.files, measure)) is None:
        key = _key(run.files, measure)
        found = _measured(run, measure)
        write_atomic(run.files.analysis / STUDY_FILE, pretty({"schema": STUDY_SCHEMA, "key": key, "figures": found}))
    return found


def kept(files: RunDirectory, measure: Measure) -> dict[str, Any] | None:
    """Return the cached metrics of a run; None if missing, damaged, or of another checkpoint or `measure`."""
    try:
        table = read_object(files.path / "analysis", STUDY_FILE)
        found = table.get("figures")
        fresh = table.get("schema") == STUDY_SCHEMA and table.get("key") == _key(files, measure)
    except (DataError, CheckpointError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(split), dict) for split in ("test", "train"))
    return found if fresh and whole else None


def _key(files: RunDirectory, measure: Measure) -> dict[str, Any]:
    """Return the key of cached metrics: SHA-256 of the newest checkpoint's manifest, and the fields of `measure`."""
    if not (newest := checkpoint.newest_first(files.path / "checkpoints")):
        raise CheckpointError(f"{files.path}: expected a checkpoint; got none. Fit the run anew.")
    return {"checkpoint": digest(read_inside(newest[0], "manifest.json")), **measure.model_dump()}


def _rows(run: Run, split: str, measure: Measure) -> Tensor:
    """Return the rows of a split on which figures are computed, no more than fit into memory."""
    part = run.data.split(split)
    most = measure.rows or affordable(len(part), tuple(part.rows.shape[1:]))
    return part.rows[seeds.subset(len(part), most, 0).to(part.rows.device)]


def _measured(run: Run, measure: Measure) -> dict[str, Any]:
    found: dict[str, Any] = {"iwae": None, "seconds": run.status.get("seconds"), "notes": []}
    for split in ("test", "train"):
        x = _rows(run, split, measure)
        found[split] = dict.fromkeys(result.SURGERY_TERMS)
        try:
            parts = surgery.surgery(run.pair, x, samples=measure.samples, seen=split == "train")
            found[split] = {term: getattr(parts, term) for term in result.SURGERY_TERMS}
            if parts.population is not None:
                found[split] |= {term: getattr(parts.population, name) for term, name in NEW_DATA.items()}
        except DataError as problem:  # a model without a likelihood has no ELBO
            found["notes"].append(f"{split}: {problem}")
        if split == "test" and measure.evidence:
            try:
                found["iwae"] = evidence(run.pair, x, measure.evidence).iwae
            except DataError as problem:  # delta posteriors give no bound on log p(x)
                found["notes"].append(f"iwae: {problem}")
    return dict(plain(found))


def validation_figure(run: Run, name: str, measure: Measure) -> float:
    """Return a figure of `[search]` on the validation split, nats per datum (bits, for bits per dimension).

    Raises DataError where the model has none.
    """
    found: Any = None
    if name == "elbo":
        rows = [row for row in run.files.metrics_rows() if row.get("split") == "validation"]
        elbos = {row["epoch"]: row.get("elbo", row.get("log_joint")) for row in rows}
        best = run.checkpoint.state.get("best_epoch") if run.experiment.train.keep == "best" else None
        found = elbos.get(best, next(reversed(elbos.values()), None))
    elif name == "iwae":
        found = evidence(run.pair, _rows(run, "validation", measure), measure.evidence).iwae
    else:
        parts = surgery.surgery(run.pair, _rows(run, "validation", measure), samples=measure.samples)
        interval = parts.population and parts.population.gain_upper
        found = interval if name == "new_gain_upper" else parts.bits_per_dimension
    if (value := getattr(found, "value", found)) is None or not math.isfinite(value):
        raise DataError(f"search.figure: expected a model with a finite {name} on validation rows; got {value}.")
    return float(value)


# ---------------------------------------------------------------------- tables of many runs


def row_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a run as one row: `STUDY_FIGURES` and their Monte Carlo standard errors, NaN if unknown.

    The key of an error is `<metric>_error`; the seconds of training have none.
    """
    named = {**found["test"], "iwae": found.get("iwae"), **{f"train_{k}": v for k, v in found["train"].items()}}
    row = {"seconds": _number(found, "seconds")}
    for name in ESTIMATES:
        estimate = named.get(name)
        row |= {name: _number(estimate, "value"), f"{name}_error": _number(estimate, "standard_error")}
    return row


def _number(found: object, key: str) -> float:
    """Return the number at `key` of a dict; NaN if there is no number, or no dict."""
    value = found.get(key) if isinstance(found, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return a data frame with one row per run: case, seed, stage, settings, metrics with errors, folder of the run."""
    ends = (*_with_errors(ESTIMATES), "seconds", "run")
    declared = dict.fromkeys(key for row in rows for key in row if key not in (*RUN_COLUMNS, *ends))
    return pandas.DataFrame([dict(row) for row in rows], columns=[*RUN_COLUMNS, *declared, *ends])


def csv(found: pandas.DataFrame) -> str:
    """Return a data frame as CSV text; cells that a spreadsheet would evaluate as a formula are escaped."""
    return str(found.map(cell).rename(columns=cell).to_csv(index=False))


def summary(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return mean and standard error of each metric over seeds: one row per case and stage, in the order of `frame`.

    `seeds` is the number of runs n; `<metric>_error` is the sample standard deviation over seeds divided by sqrt(n), or
    NaN for one seed. It measures the variation between fits, not the Monte Carlo error of one fit.
    """
    groups = runs.groupby(["case", "stage"], sort=False)[list(STUDY_FIGURES)]
    both = groups.mean().join(groups.sem().add_suffix("_error"))[_with_errors(STUDY_FIGURES)]
    both.insert(0, "seeds", groups.size())
    return both.reset_index()


def _with_errors(names: Sequence[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_error")]


def table(means: pandas.DataFrame, title: str) -> Table:
    """Return a `summary` as a rich table for the terminal: mean ± standard error over seeds, nats per datum."""
    drawn = Table(title=Text(title), caption=Text(text("study.summary")), caption_justify="left")
    drawn.add_column("case", overflow="fold", min_width=9)
    for column in ("seeds", *TERMINAL_FIGURES.values()):
        drawn.add_column(column, justify="right")
    for row in means.to_dict("records"):
        stage = "" if row["stage"] == FIRST else f": {row['stage']}"
        figures = [_shown(row[name], row[f"{name}_error"]) for name in TERMINAL_FIGURES]
        drawn.add_row(Text(f"{row['case']}{stage}"), str(row["seeds"]), *figures)
    return drawn


def _shown(value: float, error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f}\n± {error:.2f}"
