"""One run under examination: everything that the sections of a page read, computed once and only if it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.decompose.collapse import Collapse, collapse
from pvae.analysis.decompose.entry import quiet
from pvae.analysis.decompose.posterior_draws import Draw, draw
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.pages.document.stages import Stages
from pvae.analysis.samples.features import ALWAYS_HELD_ROWS, HELD_ELEMENTS, MAX_CLASSES, Features, affordable
from pvae.analysis.samples.generated import Samples
from pvae.analysis.samples.quality import space_of
from pvae.analysis.samples.sample import sample
from pvae.data.streamed import Streamed
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.util import seeds
from pvae.util.types import Array

SURGERY_ROWS = {"train": 60_000, "held": 10_000}
"""Largest numbers of rows of a surgery: of the training split, and of the split that is reported."""
SURGERY_DRAWS = 20_000
"""Samples of a surgery in all: fewer for each datum where there are more data, at least one."""
EVIDENCE_ROWS = 500
MODEL_SAMPLES = 5000
"""Samples of the model: for pictures, planes of latents, and the comparison with data."""

UNDEFINED = (DataError, DeclarationError)
"""Errors that say that a figure is not defined here."""
UNFIT = (*UNDEFINED, NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError, MemoryError)
"""Errors of a hand-written pair that cannot do what is asked: it loses a section, not the report."""

T = TypeVar("T")


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a split that a figure was computed on."""

    x: Tensor
    of: int
    """Number of rows of the split."""
    chosen: Tensor
    """Their numbers within the split."""

    @property
    def note(self) -> str:
        """`447 rows`, or `5000 of 50000 rows, drawn at random`."""
        n = len(self.x)
        return f"{n} rows" if n == self.of else f"{n} of {self.of} rows, drawn at random"


def some(x: Tensor | Streamed, most: int, seed: int) -> ChosenRows:
    """Return all rows, or `most` of them drawn with a seed, in their order."""
    chosen = seeds.subset(len(x), most, seeds.mix(seed, seeds.ANALYSIS, 2))
    return ChosenRows(x[chosen.to(x.device)], len(x), chosen)


def draws(wanted: int, n: int) -> int:
    """Return the samples for each of n data: `SURGERY_DRAWS` at most in all, at least one for each."""
    return max(1, min(wanted, SURGERY_DRAWS // n))


def array(t: Tensor) -> Array:
    """Return a tensor as float64 on the CPU."""
    return np.asarray(t.detach().double().cpu().numpy())


class Examination:
    """Run with everything that its report says of it.

    Arguments:
        run: a run with a checkpoint.
        split: the rows that are reported: "train", "validation" or "test".
        samples: samples per datum for the surgery, `SURGERY_DRAWS` at most in all.
        evidence_samples: importance samples per datum.
        gap_steps: steps of the refinement behind the inference gaps; 0 leaves them out.
        seed: seed of all samples.
        train_rows: most training rows of a surgery.
        evidence_rows: most rows of importance sampling.
    """

    def __init__(
        self,
        run: Run,
        split: str = "test",
        *,
        samples: int = 8,
        evidence_samples: int = 500,
        gap_steps: int = 200,
        seed: int = 0,
        train_rows: int = SURGERY_ROWS["train"],
        evidence_rows: int = EVIDENCE_ROWS,
    ) -> None:
        self.run, self.pair, self.data = run, run.pair, run.data
        self.split, self.samples, self.evidence_samples, self.seed = split, samples, evidence_samples, seed
        self.gap_steps = gap_steps
        self.train_rows, self.most_evidence_rows, self.part = train_rows, evidence_rows, run.data.split(split)
        self.missing: dict[str, str] = {}
        """Figures that could not be computed, and why."""
        self.stages = Stages()

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """Return the result of `make`; None where it cannot be had here, with the reason in `missing`."""
        try:
            return make()
        except UNFIT as error:
            self.missing[what] = (str(error).splitlines() or [type(error).__name__])[0][:300]
            return None

    # ------------------------------------------------------------------ rows

    @property
    def implicit(self) -> bool:
        """True for a model without a likelihood: nothing is inferred."""
        return self.pair.implicit

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One row per epoch and split."""
        return self.run.files.metrics_rows()

    def some(self, name: str, most: int) -> ChosenRows:
        """Return rows of a split, few enough for memory."""
        part = self.data.split(name)
        return some(part.rows, affordable(most, tuple(part.rows.shape[1:])), self.seed)

    @cached_property
    def rows(self) -> dict[str, ChosenRows]:
        """Rows of the surgery, by split: train, and the split of the report."""
        held = self.train_rows if self.split == "train" else SURGERY_ROWS["held"]
        return {name: self.some(name, most) for name, most in {"train": self.train_rows, self.split: held}.items()}

    @property
    def x(self) -> Tensor:
        """Rows of the split, as the pair takes them."""
        return self.rows[self.split].x

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels of these rows."""
        return None if self.part.y is None else self.part.y.cpu()[self.rows[self.split].chosen.cpu()]

    @property
    def classes(self) -> Tensor | None:
        """The labels, where there are few enough."""
        return None if self.labels is None or len(self.labels.unique()) > MAX_CLASSES else self.labels

    @cached_property
    def scale_of_grey(self) -> tuple[float, float]:
        """Least and greatest number among training data."""
        low, high = self.data.train.observed(self.rows["train"].x).aminmax()
        return float(low), float(high)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of a datum."""
        return tuple(self.pair.frame.x)

    def observed(self, rows: Tensor) -> Tensor:
        """Return the data of some rows, without covariates, `(m, *shape)`."""
        return self.part.observed(rows)

    # ------------------------------------------------------------------ figures

    @cached_property
    def surgeries(self) -> dict[str, Surgery]:
        """Surgeries by split: train, and the split of the report, for which q_agg of train is tried as the prior."""
        found: dict[str, Surgery] = {}
        for name, rows in self.rows.items():
            found[name] = surgery(
                self.pair,
                rows.x,
                samples=draws(self.samples, len(rows.x)),
                seed=self.seed,
                train=self.rows["train"].x if name != "train" else None,
                labels=self.classes if name == self.split and not self.pair.frame.covariates else None,
                on_progress=self.stages.part(f"surgery of {name}"),
            )
        return found

    @property
    def held(self) -> Surgery:
        """The surgery of the report's split."""
        return self.surgeries[self.split]

    @property
    def gap(self) -> float | None:
        """ELBO of train minus that of the split, nats per datum, without what global latents cost."""
        if self.split == "train":
            return None
        one, other = ((s.reconstruction.value - s.kl.value) for s in (self.surgeries["train"], self.held))
        return one - other

    @cached_property
    def evidence_rows(self) -> ChosenRows:
        """Rows that importance sampling is done on."""
        return self.some(self.split, self.most_evidence_rows)

    @cached_property
    def evidence(self) -> Evidence | None:
        """Bounds on log p(x); None where nothing bounds it, because the code is a point."""
        certain = all(latent.certain for latent in self.drawn.latents.values())  # all samples of it are one sample
        samples = 1 if certain else self.evidence_samples
        told = self.stages.part("importance sampling")
        return self.attempt(
            "evidence",
            lambda: evidence(self.pair, self.evidence_rows.x, samples=samples, seed=self.seed, on_progress=told),
        )

    @cached_property
    def collapse(self) -> Collapse:
        """Use of each latent."""
        return collapse(self.pair, self.x, self.seed)

    @cached_property
    def drawn(self) -> Draw:
        """One sample of every latent for the rows of the split."""
        with quiet(self.pair, self.x, self.seed):
            return draw(self.pair, self.x)

    @cached_property
    def binary(self) -> bool:
        """True for data of zeros and ones, so that the mean of p(x | z) is no datum."""
        data = self.observed(self.x[:ALWAYS_HELD_ROWS])
        return bool(((data == 0) | (data == 1)).all())

    @cached_property
    def sampled(self) -> Samples | None:
        """Means of p(x | z), or samples where it has none, for samples of the prior."""
        count = max(100, min(MODEL_SAMPLES, HELD_ELEMENTS // max(1, prod(self.shape))))
        told = self.stages.part("samples")

        def make() -> Samples:
            try:
                return sample(self.run, count, mean=not self.implicit, seed=self.seed, on_progress=told)
            except UNDEFINED:
                return sample(self.run, count, seed=self.seed, on_progress=told)

        return self.attempt("samples", make)

    @cached_property
    def draws(self) -> Samples | None:
        """Samples of p(x | z) for as many samples of the prior: they have the model's own distribution."""
        if self.sampled is None or not self.sampled.is_mean:
            return self.sampled
        count, told = len(self.sampled.x), self.stages.part("samples")
        return self.attempt("draws", lambda: sample(self.run, count, seed=self.seed, on_progress=told))

    @cached_property
    def space(self) -> Features | None:
        """Space where samples and data are compared: features of a classifier of labels, or principal components."""
        return self.attempt("feature space", lambda: space_of(self.run, self.seed))

    @property
    def prior(self) -> dict[str, Tensor]:
        """Samples of the prior of every latent, `(m, D)`."""
        found = {} if self.sampled is None else self.sampled.latents
        return {z: found[z].reshape(len(found[z]), -1) for z in self.pair.layout.latents if z in found}
