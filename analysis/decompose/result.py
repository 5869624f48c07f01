"""Result of a surgery: the parts of an ELBO, as estimates that add up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pvae.analysis.figures.estimate import CONSERVATIVE, Estimate, exact
from pvae.analysis.figures.table import Figures, Row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Dimensions:
    """One latent coordinate by coordinate; nats per datum."""

    mutual_information: tuple[float, ...]
    """I_q[x, z_d]."""
    marginal_kl: tuple[float, ...] | None
    """KL(q_agg(z_d) || p(z_d)); None where the prior reads other latents or does not factorise."""
    total_correlation: Estimate
    """KL(q_agg(z) || prod_d q_agg(z_d))."""
    coordinate_kl: Estimate | None
    """sum_d KL(q_agg(z_d) || p(z_d)); with the total correlation it is the marginal KL."""
    error: float
    """Largest difference found between densities on a grid and the sum over all pairs, nats; 0 for codes."""


@dataclass(frozen=True)
class LatentSurgery:
    """KL of one latent and its parts, nats per datum."""

    kl: Estimate
    """E[log q(z|.) - log p(z|.)]."""
    kl_exact: Estimate | None
    """The same in closed form, where torch knows it."""
    mutual_information: Estimate | None
    """I_q[x, z_l] under the exact aggregated posterior; None where q(z_l | .) reads other latents."""
    marginal_kl: Estimate | None
    """KL(q_agg(z_l) || p(z_l)); None where either side reads other latents."""
    kl_per_dimension: tuple[float, ...] | None
    """Mean closed-form KL of every coordinate, for normal posterior and normal prior."""
    active_units: int | None
    """Coordinates whose posterior mean varies over the data by more than 0.01 (variance)."""
    dimensions: Dimensions | None = None
    """Coordinate by coordinate; None where q(z_l | .) reads other latents or is of another family."""
    perplexity: tuple[float, ...] | None = None
    """exp of the entropy of q_agg at every position of a code; None for other latents."""
    states: int | None = None
    """Number of states of a code, K; None for other latents."""
    pooled_perplexity: float | None = None
    """exp of the entropy of q_agg averaged over the positions of codes; None for bits and other latents."""
    used: int | None = None
    """Number of codes with at least a thousandth of an even share of that average; None as above."""


@dataclass(frozen=True)
class ClassSurgery:
    """The rows of one label; nats per datum."""

    n: int
    elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    mutual_information: Estimate | None
    """Mean of log q(z|x) - log q_agg(z) over the class, q_agg over all rows."""
    marginal_kl: Estimate | None
    """Mean of log q_agg(z) - log p(z) over the class."""


@dataclass(frozen=True, repr=False)
class Surgery(Figures):
    """The ELBO of a data set, taken apart; nats per datum.

    `elbo = reconstruction - kl` (less `global_kl`) and `kl = mutual_information + marginal_kl` hold exactly, because
    one set of draws (or one sum over all states) serves every term.
    """

    n: int
    samples: int
    reconstruction: Estimate
    kl: Estimate
    kl_exact: Estimate | None
    mutual_information: Estimate | None
    """I_q[x, z]; an upper bound where components are a subset."""
    mutual_information_lower: Estimate | None
    """Lower bound of I_q[x, z], where components are a subset."""
    marginal_kl: Estimate | None
    """KL(q_agg || p); a lower bound where components are a subset."""
    marginal_kl_upper: Estimate | None
    """Upper bound of KL(q_agg || p), where components are a subset."""
    leave_one_out: Estimate | None
    """Upper bound of the mutual information under the distribution of the data."""
    label_information: Estimate | None
    """I_q[y, z] of the labels."""
    train_gain: Estimate | None
    """E[log q_agg(z) - log p(z)] with q_agg over other (training) rows: what it would win here as the prior."""
    elbo: Estimate
    log_n: Estimate
    latents: dict[str, LatentSurgery]
    classes: dict[int, ClassSurgery] = field(default_factory=dict)
    """Terms by label, where labels were given."""
    shared: dict[str, float] = field(default_factory=dict)
    """log q - log p of global latents, nats for the whole data set; their share is taken off `elbo` alone."""
    global_kl: Estimate | None = None
    """KL of the global latents divided by n; exact, minus the log prior density, where they are points."""
    elements: int | None = None
    """Numbers to a datum, where all of them are discrete: `bits_per_dimension` is then defined."""
    relaxed_elbo: Estimate | None = None
    """The ELBO of relaxed latents, with the KL they declare: what was trained. All other figures are of the codes they
    stand for."""
    notes: tuple[str, ...] = ()

    @property
    def bits_per_dimension(self) -> Estimate | None:
        """-elbo / (elements log 2): bits that store one element, an upper bound of -log2 P(x) / elements."""
        if self.elements is None:
            return None
        bits, e = self.elements * math.log(2), self.elbo
        data_error = None if e.data_error is None else e.data_error / bits
        return Estimate(-e.value / bits, e.standard_error / bits, e.kind, data_error, e.note)

    @property
    def title(self) -> str:
        return f"ELBO surgery, nats per datum (n = {self.n}, {self.samples} draw{'s' * (self.samples > 1)})"

    def rows(self) -> Iterator[Row]:
        rest = " - global_kl" if self.shared else ""
        yield "elbo", self.elbo, f"reconstruction - kl{rest}, a lower bound of log p(x)"
        yield "relaxed_elbo", self.relaxed_elbo, "of the relaxed codes, as trained: no bound of log p(x)"
        yield "bits_per_dimension", self.bits_per_dimension, "-elbo / (elements of x * log 2): bits, not nats"
        yield "reconstruction", self.reconstruction, "E_q log p(x | z)"
        yield "kl", self.kl, "E_q log q(z | x) - log p(z), the price of the code"
        yield "kl_exact", self.kl_exact, "the same in closed form"
        yield "mutual_information", self.mutual_information, "I_q[x, z], what the code says of the datum: at most log_n"
        yield "log_n", self.log_n, "the ceiling: every row told from every other"
        yield "mutual_information_lower", self.mutual_information_lower, "the same from below"
        yield "leave_one_out", self.leave_one_out, "upper bound of I_q[x, z] under the distribution of the data"
        yield "label_information", self.label_information, "I_q[y, z]: what the code says of the label"
        yield "marginal_kl", self.marginal_kl, "KL(q_agg || p), the most a better prior can win with this encoder"
        yield "marginal_kl_upper", self.marginal_kl_upper, "the same from above"
        yield "train_gain", self.train_gain, "what q_agg of the training rows would win here as the prior"
        if self.global_kl is not None:
            how = "-log p at a point" if self.global_kl.kind == "exact" else "one draw for all data"
            yield "global_kl", self.global_kl, f"of {', '.join(self.shared)}: {how}, divided by n"
        for name, latent in self.latents.items():
            yield from self._level(name, latent)

    def _level(self, name: str, latent: LatentSurgery) -> Iterator[Row]:
        """Rows of one latent: all of them beside others, else what the rows above do not say."""
        prefix = f"{name}." if len(self.latents) > 1 else ""
        if prefix:
            yield f"{prefix}kl", latent.kl, f"the level {name} alone"
            yield f"{prefix}mutual_information", latent.mutual_information, f"I_q[x, {name}]"
            yield f"{prefix}marginal_kl", latent.marginal_kl, f"KL(q_agg({name}) || p({name}))"
        if latent.dimensions is not None:
            d = latent.dimensions
            yield f"{prefix}total_correlation", d.total_correlation, "of marginal_kl: coordinates that depend"
            yield f"{prefix}coordinate_kl", d.coordinate_kl, "of marginal_kl: sum over coordinates, one by one"
        if latent.pooled_perplexity is not None:
            meaning = f"codes in use, weighed: at most {latent.states}; a number, not nats"
            yield f"{prefix}perplexity", exact(latent.pooled_perplexity), meaning

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "n": self.n,
            "samples": self.samples,
            "log_n": self.log_n.value,
            "figures": self.figures(),
            "latents": {name: _plain(latent) for name, latent in self.latents.items()},
            "classes": {str(label): _plain(c) for label, c in self.classes.items()},
            "shared": {name: value if math.isfinite(value) else None for name, value in self.shared.items()},
            "notes": list(self.notes),
        }

    def headline(self) -> str:
        """Return the most that a better prior could win, as a sentence."""
        if self.marginal_kl is None:
            return "marginal KL not defined or not available for this posterior"
        low, high = self.marginal_kl.value, (self.marginal_kl_upper or self.marginal_kl).value
        figure = f"{high:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
        return (
            f"marginal KL {figure} nats: the most a better prior can win with this encoder (on these {self.n} points)"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        conservative = "conservative: one draw cannot tell Monte Carlo noise from spread over data; take more samples"
        told = any(CONSERVATIVE in e.note for _, e, _ in self.known())
        return (self.headline(), *self.notes, *((conservative,) if told else ()))


def _plain(part: Any) -> Any:
    """A dataclass of estimates and numbers as nested dicts."""
    if isinstance(part, Estimate):
        return part.to_dict()
    if isinstance(part, Dimensions | LatentSurgery | ClassSurgery):
        return {name: _plain(value) for name, value in vars(part).items()}
    return part


# ---------------------------------------------------------------------- tables of several


def side_by_side(found: Mapping[str, Surgery]) -> Table:
    """One column for each surgery, by split or by run."""
    from rich.table import Table
    from rich.text import Text

    last = list(found.values())[-1]
    counts = ", ".join(f"{name} n = {s.n}" for name, s in found.items())
    remarks = [f"{name}: {s.headline()}" for name, s in found.items()]
    table = Table(
        title=Text(f"ELBO surgery, nats per datum ({counts})"), caption=Text("\n".join(remarks)), caption_justify="left"
    )
    table.add_column("term", no_wrap=True)
    for name in found:
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column("what it is")
    columns = [{term: e for term, e, _ in s.known()} for s in found.values()]
    for term, _, meaning in last.rows():
        cells = [f"{c[term].value:.4f} ± {c[term].standard_error:.4f}" if term in c else "" for c in columns]
        if any(cells):
            table.add_row(Text(term), *cells, Text(meaning))
    return table


def class_table(found: Surgery, split: str, names: Sequence[str] | None = None) -> Table:
    """One row for each label."""
    from rich.table import Table
    from rich.text import Text

    terms = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")
    table = Table(title=Text(f"by label of {split}, nats per datum (n = {found.n})"))
    for column in ("label", "n", *terms):
        table.add_column(column, justify="left" if column == "label" else "right", no_wrap=True)
    for label, c in found.classes.items():
        shown = names[label] if names and 0 <= label < len(names) else str(label)
        figures = [getattr(c, term) for term in terms]
        table.add_row(Text(shown), str(c.n), *("" if e is None else f"{e.value:.4f}" for e in figures))
    return table
