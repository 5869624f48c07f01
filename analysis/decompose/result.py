"""Result of an ELBO surgery: reconstruction, mutual information and marginal KL, which add up to the ELBO."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text

from pvae.analysis.figures.estimate import Estimate, Explained, Figures, Row, annotated, exact, merged, scaled, text
from pvae.analysis.population.interval import ON_NEW_DATA, Population
from pvae.util import Record, field, replace

SURGERY_TERMS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")


class Dimensions(Record):
    """Decomposition of the KL of one latent by coordinate (of discrete latents: by grid position); nats per datum."""

    mutual_information: tuple[float, ...]
    """Mutual information I_q[x, z_d] of the data and every coordinate."""
    marginal_kl: tuple[float, ...] | None
    """Marginal KL(q_agg(z_d) || p(z_d)) of every coordinate; None where the prior depends on other latents or does not
    factorise."""
    total_correlation: Annotated[Estimate, "of marginal_kl: coordinates that depend"]
    """Total correlation of the coordinates, KL(q_agg(z) || prod_d q_agg(z_d))."""
    coordinate_kl: Annotated[Estimate | None, "of marginal_kl: sum over coordinates, one by one"]
    """Sum of the coordinates' marginal KLs, sum_d KL(q_agg(z_d) || p(z_d)); the marginal KL of the latent is this sum
    plus the total correlation."""
    error: float
    """Largest error found, in nats, of the densities log q_agg(z_d), which are interpolated on a grid, against exact
    sums over all rows; 0 for discrete latents."""


class LatentSurgery(Record):
    """KL of one latent and its decomposition, nats per datum."""

    kl: Annotated[Estimate, "the level {name} alone"]
    """Mean KL of posterior to prior, E_q[log q(z | .) - log p(z | .)], each given the latents that it depends on."""
    kl_exact: Estimate | None
    """Mean of the closed-form KL(q || p) over the data; None where torch has no closed form."""
    mutual_information: Annotated[Estimate | None, "I_q[x, {name}]"]
    """Mutual information I_q[x, z] of the data and this latent; None where q(z | .) depends on other latents."""
    marginal_kl: Annotated[Estimate | None, "KL(q_agg({name}) || p({name}))"]
    """Marginal KL(q_agg(z) || p(z)) of this latent; None where its posterior or its prior depends on other latents."""
    kl_per_dimension: tuple[float, ...] | None
    """Mean closed-form KL of every coordinate; None unless posterior and prior are normal."""
    active_units: int | None
    """Number of active units: coordinates whose posterior mean has a variance over the data above 0.01; None unless the
    posterior is normal."""
    dimensions: Dimensions | None = None
    """Decomposition by coordinate; None for a single coordinate, and unless q(z | .) depends on x alone and is normal
    or discrete."""
    perplexity: tuple[float, ...] | None = None
    """Perplexity of the codes at every grid position, exp of the entropy of q_agg; None unless the latent is
    discrete."""
    states: int | None = None
    """Number of states of a code, K; None unless the latent is discrete."""
    tables: int = 1
    """Number of codebooks of K codes each, which `pooled_perplexity` and `used` count together."""
    pooled_perplexity: float | None = None
    """Perplexity of all codebooks together, exp of the entropy of q_agg averaged over grid positions, at most
    `tables` * K; None for binary codes and continuous latents."""
    used: int | None = None
    """Number of codes in use: those with a probability of at least 1/1000 of 1/K under q_agg averaged over grid
    positions; None for binary codes and continuous latents."""
    information_by_code: tuple[float, ...] | None = None
    """Mutual information I_q[x, c_i] given c_1 .. c_(i-1) of the i-th of the codes that make one vector (depths of a
    residual code), of all positions; they sum to `mutual_information`. None unless several certain codes make one."""
    marginal_kl_by_code: tuple[float, ...] | None = None
    """Marginal KL of the same codes given those before them, which sums to `marginal_kl`; None without
    `information_by_code`, and unless the prior factorises and is the same for all rows."""


class ClassSurgery(Record):
    """Terms of the ELBO surgery averaged over the data with one class label; nats per datum."""

    n: int
    elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    mutual_information: Estimate | None
    """Mean over the class of log q(z | x) - log q_agg(z), where q_agg is that of all data, not of the class alone."""
    marginal_kl: Estimate | None
    """Mean over the class of log q_agg(z) - log p(z), where q_agg is that of all data."""


class Surgery(Figures):
    """Decomposition of the mean ELBO of a data set; nats per datum.

    `elbo = reconstruction - kl` (minus `global_kl`, where there is one) and `kl = mutual_information + marginal_kl`
    hold exactly, because all terms are computed from the same samples (or from the same sum over all states).
    """

    n: int
    samples: int
    reconstruction: Annotated[Estimate, "E_q log p(x | z)"]
    kl: Annotated[Estimate, "E_q log q(z | x) - log p(z), the price of the code"]
    kl_exact: Annotated[Estimate | None, "the same in closed form"]
    mutual_information: Annotated[Estimate | None, "I_q[x, z], what the code says of the datum: at most log_n"]
    """Mutual information I_q[x, z] of data and latents; an upper bound where q_agg has a random subset of its
    components."""
    log_n: Annotated[Estimate, "the ceiling: every row told from every other"]
    mutual_information_lower: Annotated[Estimate | None, "the same from below"]
    """Lower bound of I_q[x, z]; None unless q_agg is computed from a random subset of the rows."""
    leave_one_out: Annotated[Estimate | None, "upper bound of I_q[x, z] under the distribution of the data"]
    """Upper bound, in expectation, of the mutual information of x and z under the distribution that the data come from:
    q_agg without the datum's own posterior."""
    label_information: Annotated[Estimate | None, "I_q[y, z]: what the code says of the label"]
    """Mutual information I_q[y, z] of class labels and latents; None without labels."""
    marginal_kl: Annotated[Estimate | None, "KL(q_agg || p): a prior that knows these rows would win it on them"]
    """Marginal KL(q_agg || p); a lower bound where q_agg is computed from a random subset of the rows."""
    marginal_kl_upper: Annotated[Estimate | None, "the same from above"]
    """Upper bound of KL(q_agg || p); None unless q_agg is computed from a random subset of the rows."""
    train_gain: Estimate | None
    """Mean of log q_agg(z) - log p(z) with the q_agg of other (training) rows: the ELBO gain on these data if that
    q_agg replaced the prior."""
    elbo: Estimate | Any
    """Mean ELBO, a lower bound on log p(x); None where the guide sets a continuous latent to a point (`log_joint`)."""
    latents: dict[str, LatentSurgery]
    log_joint: Estimate | Any = None
    """The same combination where the guide sets a continuous latent to a point (Delta), as in an autoencoder or a MAP
    estimate: the log joint density at the point, which bounds nothing. None elsewhere."""
    classes: dict[int, ClassSurgery] = field(default_factory=dict)
    """Terms of the decomposition by class label; empty without labels."""
    shared: dict[str, float] = field(default_factory=dict)
    """Mean log q - log p of every global latent, nats for the whole data set; divided by n, it is subtracted from
    `elbo` but is not part of `kl`."""
    global_kl: Estimate | None = None
    """KL of the global latents divided by n; where the guide sets them to points (Delta) it is minus their log prior
    density, and exact."""
    elements: int | None = None
    """Number of elements of a datum, if all of them are discrete, so that `bits_per_dimension` is defined; else
    None."""
    relaxed_elbo: Estimate | None = None
    """ELBO of relaxed (Concrete) latents with the KL declared for them, the objective of training; all other terms are
    those of the discrete codes. None unless a latent is relaxed."""
    population: Population | None = None
    """Interval for the gain of a better prior on new data with this encoder; None where the rows were fitted on
    (`seen`), where it was not asked for, and where `notes` gives another reason."""
    seen: bool = False
    """True for rows that the encoder or the prior was fitted on, which say nothing of new data."""
    notes: tuple[str, ...] = ()
    parts: dict[str, Any] = field(default_factory=dict)
    """Surgeries of the rows in which a latent is known and of those in which it is not, of which the terms are the
    means, weighted by their numbers of rows; empty where all rows are alike."""

    @property
    def bits_per_dimension(self) -> Estimate | None:
        """Bits per dimension, -elbo / (elements log 2), at least -log2 P(x) / elements; None for continuous data."""
        if self.elements is None or self.elbo is None:
            return None
        found = scaled(self.elbo, 1 / (self.elements * math.log(2)))
        return replace(found, value=-found.value)

    @property
    def total(self) -> Estimate:
        """Return reconstruction - kl - global_kl: the ELBO, or `log_joint` where the guide has points."""
        return self.log_joint if self.elbo is None else self.elbo

    @property
    def total_name(self) -> str:
        """Name of `total`: "ELBO" or "log joint"."""
        return "log joint" if self.elbo is None else "ELBO"

    def rows(self) -> Iterator[Row]:
        rest = " - global_kl" if self.shared else ""
        yield "elbo", self.elbo, f"reconstruction - kl{rest}, a lower bound of log p(x)"
        yield "log_joint", self.log_joint, f"reconstruction - kl{rest}: log p(x, z) at a point, which bounds nothing"
        yield "relaxed_elbo", self.relaxed_elbo, "of the relaxed codes, as trained: no bound of log p(x)"
        yield "bits_per_dimension", self.bits_per_dimension, "-elbo / (elements of x * log 2): bits, not nats"
        yield from super().rows()
        yield from () if self.population is None else self.population.rows()
        yield "train_gain", self.train_gain, "what q_agg of the training rows would win here as the prior"
        if self.global_kl is not None:
            how = "-log p at a point" if self.global_kl.kind == "exact" else "one draw for all data"
            yield "global_kl", self.global_kl, f"of {', '.join(self.shared)}: {how}, divided by n"
        for name, latent in self.latents.items():
            yield from self._level(name, latent)
        for part, s in self.parts.items():
            yield from ((f"{term}, {part}", getattr(s, term), f"of {s.n} rows") for term in SURGERY_TERMS)

    def _level(self, name: str, latent: LatentSurgery) -> Iterator[Row]:
        """Yield the table rows of one latent; its KL, information and marginal KL only if there are several latents."""
        prefix = f"{name}." if len(self.latents) > 1 else ""
        if prefix:
            yield from annotated(latent, prefix, name=name)
        if latent.dimensions is not None:
            yield from annotated(latent.dimensions, prefix)
        if latent.pooled_perplexity is not None:
            meaning = f"codes in use, weighed: at most {latent.tables * (latent.states or 1)}; a number, not nats"
            yield f"{prefix}perplexity", exact(latent.pooled_perplexity), meaning
        for i, nats in enumerate(latent.information_by_code or (), 1):
            yield f"{prefix}information_{i}", exact(nats), "of this code of a vector, given those before it"

    def to_dict(self) -> dict[str, Any]:
        """Return all terms, by latent and by class, as plain numbers and strings for JSON."""
        terms = ("latents", "classes", "shared", "seen", "population", "notes", "parts")
        return self.nested(log_n=self.log_n.value, **{name: getattr(self, name) for name in terms})

    def figure(self) -> Any:
        from pvae.analysis.pages.plots import bars

        return bars.waterfall(bars.waterfall_steps(self))

    def headline(self) -> str:
        """Return sentences on what a better prior wins: on new data, an interval; on these rows, the marginal KL."""
        if self.population is not None:
            return self.population.sentence(self.marginal_kl)
        return text("surgery.headline", found=self, reason=self._reason)

    @property
    def _reason(self) -> str:
        """Remark on why there is no figure on new data."""
        return next((note for note in self.notes if ON_NEW_DATA in note), f"no figure {ON_NEW_DATA} was computed")

    @property
    def remarks(self) -> tuple[str, ...]:
        return (self.headline(), *self.on_new_data, *(note for note in self.notes if note != self._reason))

    @property
    def on_new_data(self) -> tuple[str, ...]:
        """Sentences on the figures for new data, besides the headline; empty where there are none."""
        return () if self.population is None else self.population.remarks


# ---------------------------------------------------------------------- tables of several


def side_by_side(found: Mapping[str, Surgery]) -> Explained:
    """Return a table of several surgeries with one row per term and one column per surgery (a split or a run)."""
    return Explained(partial(_beside, found), [(row[0], row[-1]) for row in merged(found)])


def _beside(found: Mapping[str, Surgery], meanings: bool) -> Table:
    counts = ", ".join(f"{name} n = {s.n}" for name, s in found.items())
    remarks = [f"{name}: {' '.join((s.headline(), *s.on_new_data))}" for name, s in found.items()]
    title = Text(f"ELBO surgery, nats per datum ({counts})")
    table = Table(title=title, caption=Text("\n".join(remarks)), caption_justify="left")
    table.add_column("term", no_wrap=True)
    for name in found:
        table.add_column(Text(name), justify="right", no_wrap=True)
    if meanings:
        table.add_column("what it is")
    for term, *figures, meaning in merged(found):
        cells = [Text("" if e is None else f"{e.value:.4f} ± {e.standard_error:.4f}") for e in figures]
        table.add_row(Text(term), *cells, *([Text(meaning)] if meanings else ()))
    return table


def class_table(found: Surgery, split: str, names: Sequence[str] | None = None) -> Table:
    """Return a table of the terms by class label, one row per label; `names` are the names of the classes."""
    table = Table(title=Text(f"by label of {split}, nats per datum (n = {found.n})"))
    for column in ("label", "n", *SURGERY_TERMS):
        table.add_column(column, justify="left" if column == "label" else "right", no_wrap=True)
    for label, c in found.classes.items():
        shown = names[label] if names and 0 <= label < len(names) else str(label)
        figures = [getattr(c, term) for term in SURGERY_TERMS]
        table.add_row(Text(shown), str(c.n), *("" if e is None else f"{e.value:.4f}" for e in figures))
    return table
