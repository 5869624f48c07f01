"""Rate and distortion of several runs: the two terms whose negative sum is the ELBO."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from pvae.analysis.decompose import result, surgery
from pvae.analysis.figures.estimate import refuse
from pvae.experiment import captions, experiment
from pvae.runs.run import Run
from pvae.util import Progress, Record, field, plain, seeds, silent

RATE_COLUMNS = ("run", "rate", "rate_error", "distortion", "distortion_error", "elbo", "elbo_error", "n")


class RateDistortion(Record):
    """Runs on the rate-distortion plane, nats per datum: estimates with standard errors.

    Every row satisfies `elbo = -(rate + distortion)` exactly: all three come from the same samples.
    """

    split: str
    """Split that the runs are measured on."""
    rows: tuple[Mapping[str, Any], ...]
    """One row for each run in the given order, with the keys `RATE_COLUMNS`."""
    surgeries: Mapping[str, result.Surgery] = field(repr=False)
    """ELBO surgery of every run, by name."""

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per run: `rate`, `distortion`, `elbo`, their standard errors, and `n`."""
        return pandas.DataFrame([dict(row) for row in self.rows], columns=list(RATE_COLUMNS))

    def figure(self, cases: Mapping[str, tuple[int, str]] | None = None) -> Figure:
        """Return a plot of all runs in the rate-distortion plane, with lines of equal ELBO; `cases` look alike."""
        from pvae.analysis.pages.plots import comparisons

        return comparisons.rate_distortion(self.rows, cases)

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as plain numbers and strings, for JSON; a standard error that is not defined is None."""
        return {"unit": "nats per datum", "split": self.split, "runs": plain(self.rows)}

    def __rich__(self) -> Table:
        table = Table(title=Text(f"rate and distortion, nats per datum ({self.split}, n = {self.rows[0]['n']})"))
        for column in ("run", "rate", "distortion", "elbo"):
            table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run")
        for row in self.rows:
            figures = (f"{row[key]:.4f} ± {row[f'{key}_error']:.4f}" for key in ("rate", "distortion", "elbo"))
            table.add_row(Text(row["run"]), *figures)
        return table

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:.4f}".format)

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, float_format="{:.4f}".format))


def rate_distortion(
    runs: Sequence[Run], split: str = "test", rows: int | None = None, samples: int = 1, seed: int = 0, *,
    on_progress: Progress = silent,
) -> RateDistortion:  # fmt: skip
    """Compute rate and distortion of several runs on the same rows.

    With R = E_q[log q(z | x) - log p(z)], surgery's `kl` (plus the part of global latents where there are any), and
    D = -E_q[log p(x | z)], minus surgery's `reconstruction`, ELBO = -(R + D). Runs of equal ELBO may differ in both: a
    decoder that ignores z has rate 0, an autoencoder hardly any distortion. Where the posterior is a point (flows,
    autoencoders) the rate is not the length of a code, and may be negative.

    Warning: the distortions of a density and of a mass function (say likelihoods `normal` and `discretized_logistic`)
    have different units and do not compare; this is not checked.

    References:
        Fixing a Broken ELBO (Alemi et al., 2018), https://arxiv.org/abs/1711.00464

    Arguments:
        runs: runs on the same data, prepared alike; each counts once.
        split: "train", "validation" or "test".
        rows: number of rows, chosen at random with `seed`; default: all.
        samples: samples per datum.
        seed: seed of rows and samples, the same for all runs.
        on_progress: called with (samples done, samples of all runs).

    Returns:
        RateDistortion, nats per datum: estimates with surgery's standard errors (of one sample: conservative).

    Raises:
        DataError: there are no runs, or their figures do not compare: other data, binarisation, splits or covariates.
        DeclarationError: there is no split of that name.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> row = rate_distortion([example_run()]).rows[0]
        >>> abs(row["elbo"] + row["rate"] + row["distortion"]) < 1e-9
        True
    """
    refuse(not runs, "rate_distortion: expected at least one run; got none.")
    runs = list({run.path: run for run in runs}.values())
    for run in runs[1:]:
        require_alike(runs[0], run)
    names, found = named(runs), {}
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        part = run.data.split(split)
        x = part.rows[seeds.subset(len(part), rows, seed).to(part.rows.device)]
        found[name] = surgery.surgery(
            run.pair, x, samples=samples, seed=seed, seen=split == "train", population=None,
            on_progress=lambda done, total, i=i: on_progress(i * total + done, len(runs) * total),  # type: ignore[misc]
        )  # fmt: skip
    return rate_distortion_of(split, found)


def rate_distortion_of(split: str, found: Mapping[str, result.Surgery]) -> RateDistortion:
    """Return rate and distortion of several runs from their surgeries of the same rows of data, by name of the run."""
    return RateDistortion(split, tuple(_row(name, s) for name, s in found.items()), found)


def _row(name: str, s: result.Surgery) -> dict[str, Any]:
    kl = [s.kl] if s.global_kl is None else [s.kl, s.global_kl]
    rate, error = sum(e.value for e in kl), math.hypot(*(e.standard_error for e in kl))
    fit = -s.reconstruction.value, s.reconstruction.standard_error
    return dict(zip(RATE_COLUMNS, (name, rate, error, *fit, s.total.value, s.total.standard_error, s.n), strict=True))


def named(runs: Sequence[Run]) -> list[str]:
    """Return a name for every run, with its id appended where several runs have the same name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name}/{run.path.name}" for run in runs]


def require_alike(first: Run, other: Run) -> None:
    """Refuse to compare two runs on different data, binarisation, covariates, or given the sum of x and not.

    The DataError lists the differences.
    """
    one, two = _conditions(first), _conditions(other)
    differing = [key for key in one if key in two and one[key] != two[key]]
    unlike = {"fingerprint", "data.binarize", "covariates", "log density"}.intersection(differing)  # all splits
    refuse(unlike, "refused.other_data", first=first, other=other, one=one, two=two, keys=differing)


def _conditions(run: Run) -> dict[str, str]:
    """Return the properties of a run's data as far as they are known; a hand-written pair does not declare all."""
    data, plan = run.files.manifest.get("data", {}), run.plan
    found = {"fingerprint": str(data.get("fingerprint"))[:16], "source": str(data.get("source"))}
    if not isinstance(plan, experiment.Experiment):
        return found
    covariates = ", ".join(f"{name} ({y.labels or 'real'} values)" for name, y in plan.covariates.items())
    splits = ", ".join(f"{name} {low} .. {high}" for name, (low, high) in plan.data.splits.declared.items())
    declared = {"data.binarize": plan.data.binarize, "data.splits": splits or "the source's own"}
    given_sum = any(e.source == "sum" for e in plan.entries().values())
    declared["log density"] = f"of {', '.join(('x', *captions.scored(plan)))}" + " given its sum" * given_sum
    return {**found, **declared, "covariates": covariates or "none"}
