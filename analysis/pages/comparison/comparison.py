"""Runs under comparison: everything that the sections of the page read, computed once."""

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
"""Samples per datum behind a paired difference of ELBOs, fewer where there are many data."""
TRAIN_ROWS = 10_000
"""Largest number of training rows of a surgery: as many as of test, so that both have the same ceiling log n."""
PAIRED_EVIDENCE_ROWS = 250
"""Rows of importance sampling: paired by datum, differences need fewer of them than the bound of one run."""
STRIP = 10
"""Samples of each run that are shown."""


class Comparison:
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
            if not _has_covariates(run) and not _has_covariates(runs[0]):
                run.__dict__["data"] = runs[0].data  # the same by its fingerprint, and held once
        self.split, self.groups = split, groups
        self.exams = {
            name: Examination(
                run,
                split,
                samples=samples,
                evidence_samples=evidence_samples,
                seed=seed,
                train_rows=TRAIN_ROWS,
                evidence_rows=PAIRED_EVIDENCE_ROWS,
            )
            for name, run in zip(names, runs, strict=True)
        }
        self.stages = Stages()

    @property
    def names(self) -> list[str]:
        """Names of the runs."""
        return list(self.exams)

    @property
    def first(self) -> Examination:
        """The first run."""
        return next(iter(self.exams.values()))

    @cached_property
    def scored(self) -> dict[str, Examination]:
        """Runs with a likelihood."""
        return {name: exam for name, exam in self.exams.items() if not exam.implicit}

    @cached_property
    def elbos(self) -> dict[str, Tensor]:
        """ELBO of every row, by run."""
        return {
            name: elbos(exam.pair, exam.x, draws(PAIRED_SAMPLES, len(exam.x)), exam.seed)
            for name, exam in self.scored.items()
        }

    @cached_property
    def log_p(self) -> dict[str, Tensor]:
        """Bound on log p(x) of some rows, by run; runs without one are left out."""
        found = {name: exam.evidence for name, exam in self.scored.items()}
        return {name: bound.log_p for name, bound in found.items() if bound is not None}

    @cached_property
    def all_bounded(self) -> bool:
        """True if every run with a likelihood has a bound on log p(x), so that these are compared and not ELBOs."""
        return len(self.log_p) == len(self.scored)

    @property
    def quality(self) -> dict[str, SampleQuality]:
        """Quality of the samples of each run, in one space of features."""
        return {name: found for name, (_, found) in self._measured.items() if found is not None}

    @property
    def figures(self) -> dict[str, dict[str, Value]]:
        """Figures of each run that fit into one row."""
        return {name: row for name, (row, _) in self._measured.items()}

    @cached_property
    def _measured(self) -> dict[str, tuple[dict[str, Value], SampleQuality | None]]:
        found = {}
        for name, exam in self.exams.items():
            self.stages.begin(name)
            exam.stages = self.stages
            row, quality = self._terms(exam), self._quality(exam)
            seconds = exam.run.status.get("seconds")
            row |= _of_samples(quality) | {"seconds": float(seconds) if isinstance(seconds, int | float) else None}
            found[name] = row, quality
        return found

    def _terms(self, exam: Examination) -> dict[str, Value]:
        """Surgery, bound on log p(x) and gaps of a run."""
        if exam.implicit:
            return {}
        row: dict[str, Value] = {term: getattr(exam.held, term) for term in SURGERY_TERMS}
        if (bits := exam.held.bits_per_dimension) is not None:
            row["bits_per_dimension"] = bits
        bound = exam.evidence
        row["log_p"] = None if bound is None else bound.curve[-1][1]
        row["gap"] = None if bound is None else bound.gap
        row[f"train − {exam.split}"] = exam.gap
        row["train marginal_kl"] = exam.surgeries["train"].marginal_kl
        return row

    def _quality(self, exam: Examination) -> SampleQuality | None:
        """Quality of a run's samples, which are then let go but for those shown: many runs would fill the memory."""
        exam.__dict__["space"] = self.first.space
        found = measure(exam, ("draws",)).get("draws")
        exam.__dict__["draws"] = None
        if exam.sampled is not None:
            kept = replace(exam.sampled, x=exam.sampled.x[:STRIP].clone(), latents={}, covariates={})
            exam.__dict__["sampled"] = kept
        return found

    def against(self, reference: str) -> dict[str, Paired]:
        """Return paired differences of all other runs to one; of bounds on log p(x) only if all runs have one."""
        known = self.log_p if self.all_bounded else {}
        return {
            name: paired(self.elbos[name], self.elbos[reference], known.get(name), known.get(reference))
            for name in self.elbos
            if name != reference
        }

    @cached_property
    def best(self) -> str | None:
        """The run with the highest bound on log p(x), or ELBO if one run has no bound."""
        if not self.scored:
            return None
        values = self.log_p if self.all_bounded else self.elbos
        return max(values, key=lambda name: float(values[name].mean()))


def _has_covariates(run: Run) -> bool:
    """True for a run whose rows hold covariates beside data."""
    return bool(getattr(run.plan, "covariates", None))


def _of_samples(quality: SampleQuality | None) -> dict[str, Value]:
    """Figures of sample quality that fit into one row."""
    if quality is None:
        return {}
    return {
        "two-sample accuracy": quality.test.accuracy,
        "Fréchet": quality.distances.frechet,
        "precision": quality.fidelity.precision,
        "coverage": quality.fidelity.coverage,
        "sharpness of means": quality.sharpness_of_means,
    }
