"""Results of the runs of a comparison, computed once and shared by all sections; paired differences of two runs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet
from pvae.analysis.bounds.rate_distortion import named, require_alike
from pvae.analysis.decompose import posterior_draws, result
from pvae.analysis.figures.estimate import Estimate, Figures, over_rows, proportion, refuse
from pvae.analysis.pages.document import document, words
from pvae.analysis.pages.sections.examination import Examination, draws
from pvae.analysis.pages.sections.samples import measure
from pvae.analysis.samples.quality import SampleQuality
from pvae.pair import Pair, sum_over
from pvae.runs.run import Run

Given = Sequence[str] | None
PAIRED_SAMPLES = 8
"""Posterior samples per datum for paired differences of ELBOs; fewer if there are many data."""
STRIP = 10
"""Number of samples of each run that the page shows."""


# ---------------------------------------------------------------------- paired differences


class Paired(Figures):
    """Mean paired differences, run minus reference, on the same data; nats per datum, positive if the run is better."""

    n: int
    elbo: Annotated[Estimate, "ELBO less that of the reference, datum by datum"]
    log_p: Annotated[Estimate | None, "bound on log p(x) less that of the reference, datum by datum"]
    """Difference of the importance-weighted bounds on log p(x); None if either run has no such bound."""
    wins: Annotated[Estimate, "proportion of data that are more probable than under the reference"]
    """Proportion of data whose bound on log p(x), or ELBO if there is no bound, is higher than under the reference.

    Ties count half.
    """


def elbos(pair: Pair, x: Tensor, samples: int = 8, seed: int = 0) -> Tensor:
    """Return unbiased estimates of the ELBO of every datum from `samples` posterior samples: `(n,)`, nats, float64.

    The KL of global latents is not included, as it belongs to the data set as a whole.

    Raises:
        DataError: `x` has no rows, or `samples` is below 1.
    """
    refuse(not len(x) or samples < 1, "refused.no_elbos", x=x, samples=samples)
    x = accept(pair, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with quiet(pair, x, seed):
        for _ in range(samples):
            drawn = posterior_draws.draw(pair, x)
            total += drawn.reconstruction - sum_over([z.log_q - z.log_p for z in drawn.latents.values()])
    return total / samples


def paired(elbo: Tensor, other: Tensor, log_p: Tensor | None = None, other_log_p: Tensor | None = None) -> Paired:
    r"""Return the mean paired differences between a run and a reference, with standard errors over the data.

    The mean of d_i = a_i - b_i has the standard error sd(d) / sqrt(n), which covers the choice of data and the Monte
    Carlo noise. The variation between easy and hard data cancels, so that it is far smaller than that of either mean.

    Arguments:
        elbo: ELBO of every datum under the run, `(n,)`, nats.
        other: ELBO of the same data under the reference, `(n,)`, nats.
        log_p: bounds on log p(x) under the run, of these data or of a subset, `(m,)`, nats.
        other_log_p: bounds on log p(x) of the same `m` data under the reference.

    Raises:
        DataError: the numbers of data of the two runs differ, or are below two.
    """
    refuse(len(elbo) != len(other) or len(elbo) < 2, "refused.unpaired", one=elbo, other=other)
    bound = None
    if log_p is not None and other_log_p is not None:
        refuse(len(log_p) != len(other_log_p), "refused.unpaired_bounds", one=log_p, other=other_log_p)
        bound = (log_p - other_log_p).double().cpu()
    difference = (elbo - other).double().cpu()
    judged = difference if bound is None else bound
    wins = (judged > 0).double() + 0.5 * (judged == 0)
    return Paired(len(elbo), over_rows(difference), None if bound is None else over_rows(bound), proportion(wins))


# ---------------------------------------------------------------------- runs


class Comparison:
    """Runs of a comparison by name, with their results computed on first use; the first run is the reference.

    `settings` are those of `Examination`: `split`, `samples`, `evidence_samples`, `seed`.
    """

    def __init__(self, runs: Sequence[Run], names: Given = None, groups: Given = None, **settings: Any) -> None:
        if names is None:
            runs = list({run.path: run for run in runs}.values())
            names = named(runs)
        refuse(len(runs) < 2 or len(set(names)) != len(runs), "refused.compared", names=names)
        refuse(groups is not None and len(groups) != len(runs), "refused.groups", runs=runs, groups=groups)
        for run in runs[1:]:
            require_alike(runs[0], run)
            if not any(getattr(one.plan, "covariates", None) for one in (runs[0], run)):
                run.__dict__["data"] = runs[0].data  # the same data by fingerprint: keep one copy in memory
        self.groups = groups
        # As many rows of train as of test: the mutual information of both has the same limit log n. Paired differences
        # need fewer rows for importance sampling than the bound of one run.
        settings = {"samples": 2, "train_rows": 10_000, "most_evidence_rows": 250, **settings}
        self.exams = {name: Examination(run, **settings) for name, run in zip(names, runs, strict=True)}
        self.quality: dict[str, SampleQuality] = {}
        """Sample quality by run, all in the feature space of the first run; runs without it are absent."""
        self.split, self.stages = self.first.split, document.Stages()

    @cached_property
    def cases(self) -> dict[str, tuple[int, str]]:
        """Number of the case of each run, and the case's name at its first run; without groups each run is a case."""
        groups, found = list(self.groups or self.exams), dict[str, tuple[int, str]]()
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        for i, (name, group) in enumerate(zip(self.exams, groups, strict=True)):
            found[name] = numbers[group], "" if group in groups[:i] else group
        return found

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the runs of each case."""
        groups = list(zip(self.exams, self.groups or self.exams, strict=True))
        return {case: [name for name, own in groups if own == case] for case in dict.fromkeys(own for _, own in groups)}

    @property
    def repeated(self) -> bool:
        """True if a case has several runs, which differ in their seeds."""
        return any(not name for _, name in self.cases.values())

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
        return {name: elbos(e.pair, e.x, draws(PAIRED_SAMPLES, len(e.x)), e.seed) for name, e in self.scored.items()}

    @cached_property
    def log_p(self) -> dict[str, Tensor]:
        """Importance-weighted bound on log p(x) of a subset of rows, `(m,)`, nats; it replaces the ELBO in comparisons.

        Empty unless every run with a likelihood has such a bound.
        """
        found = {name: exam.evidence for name, exam in self.scored.items()}
        known = {name: bound.log_p for name, bound in found.items() if bound is not None}
        return known if len(known) == len(found) else {}

    @cached_property
    def figures(self) -> dict[str, dict[str, words.Value]]:
        """Scalar metrics of each run for the overview table, by run and by metric; also fills `quality`."""
        return {name: self._measure(name, exam) for name, exam in self.exams.items()}

    def _measure(self, name: str, exam: Examination) -> dict[str, words.Value]:
        """Return the metrics of a run: of its ELBO if the model has a likelihood, of its samples, and its seconds."""
        self.stages.begin(name)
        exam.stages = self.stages
        row: dict[str, words.Value] = {}
        if not exam.implicit:
            row |= {term: getattr(exam.held, term) for term in result.SURGERY_TERMS}
            if (bits := exam.held.bits_per_dimension) is not None:
                row["bits_per_dimension"] = bits
            bound = exam.evidence
            row["log_p"] = None if bound is None else bound.curve[-1][1]
            row["gap"] = None if bound is None else bound.gap
            row[f"train − {exam.split}"] = exam.gap
            row["train marginal_kl"] = exam.surgeries["train"].marginal_kl
            if (new := exam.held.population) is not None:
                row |= {"new data, at least": new.gain, "new data, at most": new.gain_upper}
        if (quality := self._quality(exam)) is not None:
            self.quality[name] = quality
            f, sharpness = quality.fidelity, quality.sharpness_of_means
            row |= {"two-sample accuracy": quality.test.accuracy, "Fréchet": quality.distances.frechet}
            row |= {"precision": f.precision, "coverage": f.coverage, "sharpness of means": sharpness}
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
        own, known = self.elbos, self.log_p
        others = [name for name in own if name != reference]
        return {name: paired(own[name], own[reference], known.get(name), known.get(reference)) for name in others}

    @cached_property
    def best(self) -> str | None:
        """Name of the run with the highest bound on log p(x), or ELBO if a run has no bound; None without ELBOs."""
        if not self.scored:
            return None
        values = self.log_p or self.elbos
        return max(values, key=lambda name: float(values[name].mean()))
