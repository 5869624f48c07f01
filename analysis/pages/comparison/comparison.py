"""Results of the runs of a comparison, computed once and shared by all sections of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from pvae.analysis.bounds.rate_distortion import named, require_alike
from pvae.analysis.pages.comparison.paired import Paired, elbos, paired
from pvae.analysis.pages.document.stages import Stages
from pvae.analysis.pages.document.text import Value
from pvae.analysis.pages.sections.anatomy import SURGERY_TERMS
from pvae.analysis.pages.sections.examination import Examination, draws
from pvae.analysis.pages.sections.quality import measure
from pvae.analysis.samples.quality import SampleQuality
from pvae.errors import DataError
from pvae.runs.run import Run

PAIRED_SAMPLES = 8
"""Posterior samples per datum for paired differences of ELBOs; fewer if there are many data."""
TRAIN_ROWS = 10_000
"""Largest number of training rows of an ELBO surgery, the same as of test rows.

The mutual information of both splits then has the same upper limit log n.
"""
PAIRED_EVIDENCE_ROWS = 250
"""Largest number of rows for importance sampling; paired differences need fewer rows than the bound of one run."""
STRIP = 10
"""Number of samples of each run that the page shows."""


class Comparison:
    """Runs of a comparison by name, with their results computed on first use; the first run is the reference."""

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
            if not _has_covariates(run) and not _has_covariates(runs[0]):
                run.__dict__["data"] = runs[0].data  # the same data by fingerprint: keep one copy in memory
        self.split, self.groups = split, groups
        settings = {"samples": samples, "evidence_samples": evidence_samples, "seed": seed}
        settings |= {"train_rows": TRAIN_ROWS, "most_evidence_rows": PAIRED_EVIDENCE_ROWS}
        self.exams = {name: Examination(run, split, **settings) for name, run in zip(names, runs, strict=True)}
        self.quality: dict[str, SampleQuality] = {}
        """Sample quality by run, all in the feature space of the first run; runs without it are absent."""
        self.stages = Stages()

    @property
    def names(self) -> list[str]:
        """Names of the runs on the page, in order."""
        return list(self.exams)

    @property
    def first(self) -> Examination:
        """Results of the first run, the reference."""
        return next(iter(self.exams.values()))

    @cached_property
    def scored(self) -> dict[str, Examination]:
        """Results of the runs whose model has a likelihood, and so an ELBO, by name."""
        return {name: exam for name, exam in self.exams.items() if not exam.implicit}

    @cached_property
    def elbos(self) -> dict[str, Tensor]:
        """Estimated ELBO of every row of the split, `(n,)`, nats, by name of the run."""
        found = self.scored.items()
        return {name: elbos(e.pair, e.x, draws(PAIRED_SAMPLES, len(e.x)), e.seed) for name, e in found}

    @cached_property
    def log_p(self) -> dict[str, Tensor]:
        """Importance-weighted bound on log p(x) of a subset of rows, `(m,)`, nats, for runs that have one."""
        found = {name: exam.evidence for name, exam in self.scored.items()}
        return {name: bound.log_p for name, bound in found.items() if bound is not None}

    @cached_property
    def all_bounded(self) -> bool:
        """True if every run with a likelihood has a bound on log p(x), which then replaces the ELBO in comparisons."""
        return len(self.log_p) == len(self.scored)

    @cached_property
    def figures(self) -> dict[str, dict[str, Value]]:
        """Scalar metrics of each run for the overview table, by run and by metric; also fills `quality`."""
        return {name: self._measure(name, exam) for name, exam in self.exams.items()}

    def _measure(self, name: str, exam: Examination) -> dict[str, Value]:
        """Return the metrics of a run: of its ELBO if the model has a likelihood, of its samples, and its seconds."""
        self.stages.begin(name)
        exam.stages = self.stages
        row: dict[str, Value] = {}
        if not exam.implicit:
            row |= {term: getattr(exam.held, term) for term in SURGERY_TERMS}
            if (bits := exam.held.bits_per_dimension) is not None:
                row["bits_per_dimension"] = bits
            bound = exam.evidence
            row["log_p"] = None if bound is None else bound.curve[-1][1]
            row["gap"] = None if bound is None else bound.gap
            row[f"train − {exam.split}"] = exam.gap
            row["train marginal_kl"] = exam.surgeries["train"].marginal_kl
        if (quality := self._quality(exam)) is not None:
            self.quality[name] = quality
            row |= {
                "two-sample accuracy": quality.test.accuracy,
                "Fréchet": quality.distances.frechet,
                "precision": quality.fidelity.precision,
                "coverage": quality.fidelity.coverage,
                "sharpness of means": quality.sharpness_of_means,
            }
        seconds = exam.run.status.get("seconds")
        return {**row, "seconds": float(seconds) if isinstance(seconds, int | float) else None}

    def _quality(self, exam: Examination) -> SampleQuality | None:
        """Return the quality of the samples of a run, and free those that the page does not show, to save memory."""
        exam.__dict__["space"] = self.first.space
        found = measure(exam, "draws", exam.draws)
        exam.__dict__["draws"] = None
        if exam.sampled is not None:
            kept = replace(exam.sampled, x=exam.sampled.x[:STRIP].clone(), latents={}, covariates={})
            exam.__dict__["sampled"] = kept
        return found

    def against(self, reference: str) -> dict[str, Paired]:
        """Return the paired differences of each other run to `reference`; of bounds on log p(x) if all have one."""
        known = self.log_p if self.all_bounded else {}
        return {
            name: paired(self.elbos[name], self.elbos[reference], known.get(name), known.get(reference))
            for name in self.elbos
            if name != reference
        }

    @cached_property
    def best(self) -> str | None:
        """Name of the run with the highest bound on log p(x), or ELBO if a run has no bound; None without ELBOs."""
        if not self.scored:
            return None
        values = self.log_p if self.all_bounded else self.elbos
        return max(values, key=lambda name: float(values[name].mean()))


def _has_covariates(run: Run) -> bool:
    """Return True if the rows of a run hold covariates in addition to the data."""
    return bool(getattr(run.plan, "covariates", None))
