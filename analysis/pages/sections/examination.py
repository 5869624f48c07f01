"""Results of one run that the sections of a page share, each computed once, on first use."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import pandas
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.bounds.weights import Evidence
from pvae.analysis.decompose import collapse, posterior_draws, result, surgery, surgery_figures
from pvae.analysis.pages.document import document, words
from pvae.analysis.samples import quality, running, sample
from pvae.analysis.samples.features import ALWAYS_HELD_ROWS, HELD_ELEMENTS, MAX_CLASSES, Features, affordable
from pvae.data.streamed import Streamed
from pvae.errors import DataError, DeclarationError, refuse
from pvae.pair.layout import samples as sample_sites
from pvae.runs.run import Run
from pvae.util import Record, field, seeds

SURGERY_ROWS = {"train": 60_000, "held": 10_000}
"""Largest numbers of rows of an ELBO surgery: of the training split, and of the other split that is reported."""
SURGERY_DRAWS = 20_000
"""Largest number of posterior samples of an ELBO surgery over all data; each datum has at least one."""
SMALL_ROWS, SMALL_ELEMENTS = 4096, 1 << 18
"""Largest numbers of rows of a split, and of their elements, that are analysed with one thread."""
MODEL_SAMPLES = 5000
"""Largest number of samples of the model, used for pictures, plots of latents and sample quality."""

UNDEFINED = (DataError, DeclarationError)
"""Errors raised if an analysis is not defined for this model or these data."""
UNFIT = (*UNDEFINED, NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError, MemoryError)
"""Errors after which the report is written without the analysis that raised them; a hand-written pair may raise any."""

T = TypeVar("T")


class ChosenRows(Record):
    """Rows of a split that a result was computed on: all, or a random subset."""

    x: Tensor
    of: int
    """Number of rows of the split."""
    chosen: Tensor
    """Indices of the chosen rows within the split."""

    @property
    def note(self) -> str:
        """Description of the rows for a caption: `447 rows`, or `5000 of 50000 rows, drawn at random`."""
        n = len(self.x)
        return f"{n} rows" if n == self.of else f"{n} of {self.of} rows, drawn at random"


def some(x: Tensor | Streamed, most: int, seed: int) -> ChosenRows:
    """Return all rows, or a random subset of `most` rows if there are more, in their order; reproducible by `seed`."""
    chosen = seeds.subset(len(x), most, seeds.mix(seed, seeds.ANALYSIS, 2))
    return ChosenRows(x[chosen.to(x.device)], len(x), chosen)


def draws(wanted: int, n: int) -> int:
    """Return the number of posterior samples per datum: `wanted`, or fewer if n data need over `SURGERY_DRAWS`."""
    return max(1, min(wanted, SURGERY_DRAWS // n))


@dataclass(eq=False)
class Examination:
    """Run with the results that its report shows, each computed on first use and then cached."""

    run: Run
    split: str = "test"
    """Split that the report describes: "train", "validation" or "test"."""
    _: KW_ONLY
    samples: int = 8
    """Posterior samples per datum for the ELBO surgery; fewer if they would exceed `SURGERY_DRAWS` in total."""
    evidence_samples: int = 500
    """Importance samples per datum."""
    gap_steps: int = 200
    """Optimisation steps that refine q(z | x) for the inference gaps; 0 omits the gaps."""
    seed: int = 0
    train_rows: int = SURGERY_ROWS["train"]
    """Largest number of training rows of an ELBO surgery."""
    population: surgery_figures.Asked = "rows"
    """Source of the interval on new data, as in `surgery`."""
    most_evidence_rows: int = 500
    """Largest number of rows for importance sampling."""
    missing: dict[str, str] = field(default_factory=dict, init=False)
    """Reasons of the analyses that could not be computed, by name of the analysis."""
    stages: document.Stages = field(default_factory=document.Stages, init=False)

    def __post_init__(self) -> None:
        self.pair, self.data, self.part = self.run.pair, self.run.data, self.run.data.split(self.split)
        self.implicit = self.pair.implicit
        """True for a model without a likelihood, such as a GAN: it has no posterior and no ELBO."""
        self.shape = tuple(self.pair.frame.x)
        """Shape of one datum, without covariates."""

    def attempt(self, what: str, make: Callable[..., T], *given: Any, part: str = "", **named: Any) -> T | None:
        """Return the result of `make` with these arguments; None, with a note in `missing`, on one of `UNFIT`.

        If `make` takes `on_progress`, it reports to the part of the present stage that `part` names.
        """
        if part:
            named["on_progress"] = self.stages.part(part)
        try:
            return make(*given, **named)
        except UNFIT as error:
            self.missing[what] = (str(error).splitlines() or [type(error).__name__])[0][:300]
            return None

    # ------------------------------------------------------------------ rows

    @property
    def is_small(self) -> bool:
        """True if the splits are so small that several threads would mostly wait for each other."""
        shapes = (self.data.train.rows.shape, self.part.rows.shape)
        return all(shape[0] <= SMALL_ROWS and prod(shape) <= SMALL_ELEMENTS for shape in shapes)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Training metrics of the run: one dict per epoch and split."""
        return self.run.files.metrics_rows()

    def some(self, name: str, most: int) -> ChosenRows:
        """Return at most `most` random rows of the split `name`, or fewer if large rows would not fit into memory."""
        part = self.data.split(name)
        return some(part.rows, affordable(most, tuple(part.rows.shape[1:])), self.seed)

    @cached_property
    def rows(self) -> dict[str, ChosenRows]:
        """Rows that the ELBO surgery uses, by name of the split: of train, and of the reported split."""
        held = self.train_rows if self.split == "train" else SURGERY_ROWS["held"]
        return {name: self.some(name, most) for name, most in {"train": self.train_rows, self.split: held}.items()}

    @property
    def x(self) -> Tensor:
        """Rows of the reported split that the ELBO surgery uses, `(n, *row)`, as model and guide take them."""
        return self.rows[self.split].x

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels of the rows `x`, `(n,)`, NaN where one is missing; None for data without labels."""
        return None if (y := self.part.labels) is None else y.cpu()[self.rows[self.split].chosen.cpu()]

    @property
    def classes(self) -> Tensor | None:
        """Labels of the rows `x`; None for data without labels or with more than `MAX_CLASSES` distinct labels."""
        return None if self.labels is None or len(self.labels.nan_to_num().unique()) > MAX_CLASSES else self.labels

    @cached_property
    def scale_of_grey(self) -> tuple[float, float]:
        """Smallest and largest value of the training rows used, which images show as black and white."""
        x = self.data.train.observed(self.rows["train"].x)
        low, high = x[~x.isnan()].aminmax()
        return float(low), float(high)

    @cached_property
    def whole_rows(self) -> bool:
        """True if the model observes whole rows of data at its first site, so that what it makes compares with data."""
        if self.pair.declared:
            return True
        few = self.pair.structure.few(self.x)
        with quiet(self.pair, few, self.seed):
            site = running.datum(self.pair.layout, sample_sites(self.pair.model_trace(few)))
        return int(site["value"].numel()) == len(few) * prod(self.shape)

    @property
    def observed(self) -> Tensor:
        """Data of the rows `x`, `(n, *shape)`, without covariates."""
        return self.part.observed(self.x)

    def name_of(self, row: Tensor) -> str:
        """Return the id of a row of the reported split, or its number there if the data have no ids."""
        return str(int(row) if self.part.ids is None else self.part.ids[int(row)])

    @property
    def is_table(self) -> bool:
        """True for rows of at least three values, `(D,)`, whose samples are compared column by column."""
        return len(self.shape) == 1 and self.shape[0] > 2

    def in_units(self, x: Any) -> pandas.DataFrame:
        """Return rows of data or samples `(n, D)` as a data frame with named columns, in the units of the data."""
        known = self.run.transforms
        if known.columns:
            times = {name: f"{name} [{t}]" for name, c in known.columns.items() if (t := getattr(c, "time", None))}
            return known.to_frame(x).rename(columns=times)
        names = known.features or [f"x[{i}]" for i in range(x.shape[1])]
        return pandas.DataFrame(known.values(x), columns=list(names))

    def require_whole_rows(self) -> None:
        """Raise DataError unless the model observes whole rows of data."""
        refuse(not self.whole_rows, words.text("page.parts_of_rows", shape=list(self.shape)))

    # ------------------------------------------------------------------ figures

    @cached_property
    def surgeries(self) -> dict[str, result.Surgery]:
        """ELBO surgery by split: of train and of the reported split.

        The surgery of a held-out split also estimates the ELBO gain if q_agg of the training rows were the prior.
        """
        found: dict[str, result.Surgery] = {}
        for name, rows in self.rows.items():
            train = self.rows["train"].x if name != "train" else None
            given_label = any(entry.source == "label" for entry in self.pair.frame.covariates.values())
            labels = self.classes if name == self.split and not given_label else None
            told = self.stages.part(f"surgery of {name}")
            given: dict[str, Any] = {"seed": self.seed, "train": train, "labels": labels, "on_progress": told}
            given |= {"seen": name == "train", "population": self.population}
            found[name] = surgery.surgery(self.pair, rows.x, draws(self.samples, len(rows.x)), **given)
        return found

    @property
    def held(self) -> result.Surgery:
        """ELBO surgery of the reported split."""
        return self.surgeries[self.split]

    @property
    def gap(self) -> float | None:
        """Overfitting gap: ELBO of train minus ELBO of the reported split, nats per datum.

        The KL of global latents is not included. None if the reported split is train.
        """
        if self.split == "train":
            return None
        train, held = self.surgeries["train"], self.held
        return (train.reconstruction.value - train.kl.value) - (held.reconstruction.value - held.kl.value)

    @cached_property
    def evidence_rows(self) -> ChosenRows:
        """Rows of the reported split that importance sampling uses."""
        return self.some(self.split, self.most_evidence_rows)

    @cached_property
    def evidence(self) -> Evidence | None:
        """Importance-weighted bounds on log p(x), nats; None if undefined, as for delta posteriors, or failed."""
        # all samples of certain latents are equal
        samples = 1 if all(latent.certain for latent in self.drawn.latents.values()) else self.evidence_samples
        rows, part = self.evidence_rows.x, "importance sampling"
        return self.attempt("evidence", evidence, self.pair, rows, samples=samples, seed=self.seed, part=part)

    @cached_property
    def collapse(self) -> collapse.Collapse:
        """Posterior collapse on the rows `x`: active coordinates and KL, or code usage, of each latent."""
        return collapse.collapse(self.pair, self.x, self.seed)

    @cached_property
    def drawn(self) -> posterior_draws.Draw:
        """One posterior sample of every latent for the rows `x`, with log q, log p and log p(x | z)."""
        with quiet(self.pair, self.x, self.seed):
            return posterior_draws.draw(self.pair, self.x)

    @cached_property
    def binary(self) -> bool:
        """True for data of zeros and ones; means of p(x | z) are then no possible data."""
        data = self.part.observed(self.x[:ALWAYS_HELD_ROWS])
        return bool(((data == 0) | (data == 1)).all())

    @cached_property
    def sampled(self) -> sample.Samples | None:
        """Means of p(x | z) at samples z of the prior; samples of p(x | z) if it has no mean. None on failure."""
        count = max(100, min(MODEL_SAMPLES, HELD_ELEMENTS // max(1, prod(self.shape))))
        told = self.stages.part("samples")

        def make() -> sample.Samples:
            self.require_whole_rows()
            try:
                return sample.sample(self.run, count, mean=not self.implicit, seed=self.seed, on_progress=told)
            except UNDEFINED:
                return sample.sample(self.run, count, seed=self.seed, on_progress=told)

        return self.attempt("samples", make)

    @cached_property
    def draws(self) -> sample.Samples | None:
        """Samples x of the model, with likelihood noise, as many as in `sampled`; None if sampling fails."""
        if self.sampled is None or not self.sampled.is_mean:
            return self.sampled
        return self.attempt("draws", sample.sample, self.run, len(self.sampled.x), seed=self.seed, part="samples")

    @cached_property
    def space(self) -> Features | None:
        """Feature space to compare samples and data: features of a classifier of labels, or principal components."""
        return self.attempt("feature space", quality.space_of, self.run, self.seed)

    @property
    def prior(self) -> dict[str, Tensor]:
        """Samples of the prior by latent, flattened to `(m, D)`, from the same samples as `sampled`."""
        found = {} if self.sampled is None else self.sampled.latents
        return {z: found[z].reshape(len(found[z]), -1) for z in self.pair.layout.latents if z in found}
