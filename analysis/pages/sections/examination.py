"""One run under examination: what the sections of its report read, each thing computed once and only if it is read."""

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
from pvae.analysis.pages import plots
from pvae.analysis.samples.features import ALWAYS_HELD_ROWS, HELD_ELEMENTS, MAX_CLASSES, Features, affordable
from pvae.analysis.samples.generated import Samples
from pvae.analysis.samples.quality import space_of
from pvae.analysis.samples.sample import sample
from pvae.data.streamed import Streamed
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.util import seeds

ROWS = {"train": 60_000, "held": 10_000}
"""Most rows of a surgery: of train, and of the split that is reported."""
EVIDENCE_ROWS = 500
SAMPLES = 5000
"""Draws of the model: for the pictures, the planes of latents, and the comparison with data."""
DRAWS = 20_000
"""Draws of a surgery in all: fewer for each datum where there are more data, at least one."""

T = TypeVar("T")
Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _what: str) -> None:
    """Tell nobody."""


REFUSED = (DataError, DeclarationError)
"""What says that a figure is not defined here."""
UNFIT = (*REFUSED, NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError, MemoryError)
"""What a hand-written pair may raise that cannot do what is asked: it loses a section, not the report."""


@dataclass(frozen=True)
class Rows:
    """Rows of a split that a figure was computed on."""

    x: Tensor
    of: int
    """Rows that the split has."""
    chosen: Tensor
    """Which they are."""

    @property
    def note(self) -> str:
        """`447 rows`, or `5000 of 50000 rows, drawn at random`."""
        n = len(self.x)
        return f"{n} rows" if n == self.of else f"{n} of {self.of} rows, drawn at random"


def some(x: Tensor | Streamed, most: int, seed: int) -> Rows:
    """All rows, or `most` of them drawn with a seed, in their order."""
    chosen = seeds.subset(len(x), most, seeds.mix(seed, seeds.ANALYSIS, 2))
    return Rows(x[chosen.to(x.device)], len(x), chosen)


def draws(wanted: int, n: int) -> int:
    """Draws for each of n data, `DRAWS` at most in all and at least one for each."""
    return max(1, min(wanted, DRAWS // n))


class Case:
    """A run with everything that its report says of it.

    Arguments:
        run: a run with a checkpoint.
        split: the rows that are reported: "train", "validation" or "test".
        samples: draws per datum for the surgery, `DRAWS` at most in all.
        evidence_samples: importance samples per datum, on at most `EVIDENCE_ROWS` rows.
        gap_steps: of the refinement behind the gaps; 0 leaves them out.
        seed: of all draws.
        train_rows: most training rows of a surgery.
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
        train_rows: int = ROWS["train"],
    ) -> None:
        self.run, self.pair, self.data = run, run.pair, run.data
        self.split, self.samples, self.evidence_samples, self.seed = split, samples, evidence_samples, seed
        self.gap_steps = gap_steps
        self.train_rows, self.part = train_rows, run.data.split(split)
        self.missing: dict[str, str] = {}
        """What could not be told, and why."""

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """What `make` gives; None where it cannot be had here, with the reason in `missing`."""
        try:
            return make()
        except UNFIT as error:
            self.missing[what] = (str(error).splitlines() or [type(error).__name__])[0][:300]
            return None

    # ------------------------------------------------------------------ rows

    @property
    def implicit(self) -> bool:
        """Whether the model has no likelihood: nothing is inferred."""
        return self.pair.implicit

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One row per epoch and split."""
        return self.run.files.metrics_rows()

    def some(self, name: str, most: int) -> Rows:
        """Rows of a split, few enough for memory."""
        part = self.data.split(name)
        return some(part.rows, affordable(most, tuple(part.rows.shape[1:])), self.seed)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """Rows of the surgery, by split: train, and the split of the report."""
        most = {"train": self.train_rows, self.split: self.train_rows if self.split == "train" else ROWS["held"]}
        return {name: self.some(name, count) for name, count in most.items()}

    @property
    def x(self) -> Tensor:
        """Rows of the split, as the pair takes them."""
        return self.rows[self.split].x

    @cached_property
    def labels(self) -> Tensor | None:
        """Their labels."""
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
        """Of a datum."""
        return tuple(self.pair.frame.x)

    def observed(self, rows: Tensor) -> Tensor:
        """The data of some rows, without covariates, `(m, *shape)`."""
        return self.part.observed(rows)

    # ------------------------------------------------------------------ figures

    @cached_property
    def surgeries(self) -> dict[str, Surgery]:
        """By split: train, and the split of the report; q_agg of train is tried as the prior of the other."""
        found: dict[str, Surgery] = {}
        for name, rows in self.rows.items():
            train = self.rows["train"].x if name != "train" else None
            labels = self.classes if name == self.split and not self.pair.frame.covariates else None
            found[name] = surgery(
                self.pair, rows.x, samples=draws(self.samples, len(rows.x)), seed=self.seed, train=train, labels=labels
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
    def evidence_rows(self) -> Rows:
        """Rows that importance sampling is done on."""
        return self.some(self.split, EVIDENCE_ROWS)

    @cached_property
    def evidence(self) -> Evidence | None:
        """None where nothing bounds log p(x): the code is a point."""
        certain = all(latent.certain for latent in self.drawn.latents.values())  # all draws of it are one draw
        samples = 1 if certain else self.evidence_samples
        return self.attempt(
            "evidence", lambda: evidence(self.pair, self.evidence_rows.x, samples=samples, seed=self.seed)
        )

    @cached_property
    def collapse(self) -> Collapse:
        """What each latent uses."""
        return collapse(self.pair, self.x, self.seed)

    @cached_property
    def drawn(self) -> Draw:
        """One draw of every latent for the rows of the split."""
        with quiet(self.pair, self.x, self.seed):
            return draw(self.pair, self.x)

    @cached_property
    def binary(self) -> bool:
        """Whether data are zeros and ones, so that the mean of p(x | z) is no datum."""
        data = self.observed(self.x[:ALWAYS_HELD_ROWS])
        return bool(((data == 0) | (data == 1)).all())

    @cached_property
    def sampled(self) -> Samples | None:
        """Means of p(x | z), or draws where it has none, for draws of the prior."""
        count = max(100, min(SAMPLES, HELD_ELEMENTS // max(1, prod(self.shape))))

        def make() -> Samples:
            try:
                return sample(self.run, count, mean=not self.implicit, seed=self.seed)
            except REFUSED:
                return sample(self.run, count, seed=self.seed)

        return self.attempt("samples", make)

    @cached_property
    def draws(self) -> Samples | None:
        """Draws of p(x | z) for as many draws of the prior: what is of the model's own law."""
        if self.sampled is None or not self.sampled.is_mean:
            return self.sampled
        count = len(self.sampled.x)
        return self.attempt("draws", lambda: sample(self.run, count, seed=self.seed))

    @cached_property
    def space(self) -> Features | None:
        """Where samples and data are compared: features of a classifier of the labels, or principal components."""
        return self.attempt("feature space", lambda: space_of(self.run, self.seed))

    @property
    def prior(self) -> dict[str, Tensor]:
        """Draws of the prior of every latent, `(m, D)`."""
        found = {} if self.sampled is None else self.sampled.latents
        return {z: found[z].reshape(len(found[z]), -1) for z in self.pair.layout.latents if z in found}


def array(t: Tensor) -> plots.Array:
    """A tensor as float64 on the CPU."""
    return np.asarray(t.detach().double().cpu().numpy())
