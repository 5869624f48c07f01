"""Posterior collapse: active units of every latent, information of codes, and alerts that say what to change."""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet
from pvae.analysis.decompose.codes import duplicates
from pvae.analysis.decompose.posterior_draws import LatentDraw, draw
from pvae.analysis.figures.estimate import text, texts
from pvae.nn.codebook import Table
from pvae.pair import SILENT, Pair, Tally, codebook_of, in_use, perplexity, revival, silence
from pvae.util import Record

THRESHOLDS = tuple(round(10 ** (exponent / 4), 7) for exponent in range(-16, 1))
"""Variances at which the active coordinates are counted: 1e-4 to 1, four per decade."""


class CodeUse(Record):
    """Use of the codes of a discrete latent under the aggregated posterior q_agg of every grid position; exact."""

    states: int
    """Number of codes at every position, K."""
    perplexity: tuple[float, ...]
    """Perplexity, exp of the entropy of q_agg, at every position: between 1 and K."""
    dead: tuple[int, ...]
    """Number of dead codes at every position: those with a probability under q_agg below 1/1000 of 1/K."""
    grid: tuple[int, ...] = ()
    """Shape of the grid of positions; () for a single code."""
    share: tuple[float, ...] | None = None
    """Probability of every code under q_agg averaged over positions, in descending order; None for binary codes."""
    pooled_perplexity: float | None = None
    """Perplexity of all codebooks, exp of the entropy of `share`: between 1 and `tables` * K; None for binary codes."""
    used: int | None = None
    """Number of codes in use: those with a probability in `share` of at least 1/1000 of 1/K; None for binary codes."""
    duplicates: int | None = None
    """Number of codes in use whose codebook row nearly coincides with that of another one; None without a codebook."""
    revival: str = ""
    """Settings to change so that dead codes come into use."""
    tables: int = 1
    """Number of codebooks, of K codes each, that `share`, `used` and `duplicates` count together."""
    information: tuple[float, ...] = ()
    """Mutual information with x of every position, nats, at most log K; if that is smaller, its mean KL."""
    silent: int = 0
    """Number of positions without information: at most 1 % of log K nats."""
    alert: str | None = None
    """Alert that the latent as a whole carries no information, and what to change; None if it carries some."""
    parts: tuple["CodeUse", ...] = ()
    """Use of each of the codes that make one vector, such as the depths of a residual code; empty for single codes."""


class LatentCollapse(Record):
    """Activity of the coordinates of one latent, or use of its codes if it is discrete."""

    dim: int
    """Number of coordinates; of a discrete latent, number of positions."""
    activity: tuple[float, ...] | None
    """Variance over the data of the posterior mean of every coordinate; None where the posterior is not normal."""
    kl_per_dimension: tuple[float, ...] | None
    """Mean closed-form KL of every coordinate, nats; None where posterior or prior is not normal."""
    active: int | None
    """Number of active units, coordinates with `activity` above 0.01; None where the posterior is not normal."""
    idle: int | None
    """Number of coordinates without information: those that are not active and, if the prior depends on other latents,
    those with a KL of at most 0.01 nats; None where the posterior is not normal."""
    curve: tuple[tuple[float, int], ...]
    """Pairs (threshold, number of coordinates with a greater `activity`) for all `THRESHOLDS`."""
    codes: CodeUse | None = None
    """Use of the codes of a discrete latent; None for continuous latents."""
    kl: float | None = None
    """Mean KL of the latent, nats, exact or from one sample; None for a point (Delta)."""


class Collapse(Record):
    """Active units and code use of all latents; posterior collapse is reported in `alerts`, not raised as an error."""

    n: int
    latents: dict[str, LatentCollapse]
    alerts: tuple[str, ...]
    """Alerts, one text per latent with unused units or codes: their number, and the settings to change."""

    def to_dict(self) -> dict[str, Any]:
        """Return the use of every latent and the alerts as plain numbers and strings for JSON."""
        limits = {"n": self.n, "active_above": SILENT.variance, "silent": asdict(SILENT)}
        return {**limits, **asdict(self), "alerts": list(self.alerts)}

    def __str__(self) -> str:
        head = f"active units (variance of the posterior mean over {self.n} rows > {SILENT.variance})"
        lines = [f"{name}: {text('collapse.use', z=z)}" for name, z in self.latents.items()]
        return "\n".join([head, *lines, *(f"alert: {said}" for said in self.alerts)])

    def _repr_html_(self) -> str:
        uses = {name: text("collapse.use", z=z) for name, z in self.latents.items()}
        return text("collapse.html", found=self, uses=uses)


def activity(d: LatentDraw) -> Tensor | None:
    """Return the variance over the data of the posterior mean, `(D,)`; None for other than normals, and for one row."""
    return None if d.normal is None or len(d.normal.loc) < 2 else d.normal.loc.var(0)


def active_units(d: LatentDraw) -> int | None:
    """Return the number of active units, whose posterior mean has a variance above 0.01; None unless normal."""
    variance = activity(d)
    return None if variance is None else int((variance > SILENT.variance).sum())


def collapse(pair: Pair, x: Tensor, seed: int = 0) -> Collapse:
    """Return the number of active units of every latent, or the use of its codes, with alerts for posterior collapse.

    A coordinate is active when the variance over the data of its posterior mean is above 0.01. If the prior depends on
    other latents, the posterior mean can follow the prior and vary without any information; such a coordinate counts
    as idle when its KL is at most 0.01 nats. A latent whose posterior is not normal has collapsed when its mean KL is
    at most 0.01 nats per coordinate, and at most 0.1. A code of K states, or a bit, is silent when its mutual
    information with x, or its mean KL, is at most 1 % of log K; a code of one state never is. Single silent positions
    are counted; an alert is for a grid of which at least 95 % are silent, or that carries at most 0.1 nats in sum.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        seed: seed of the sample of the latents; it matters only where a posterior depends on other latents.

    Returns:
        Collapse; exact for latents whose posterior depends on x alone, else an estimate from one sample.

    Raises:
        DataError: `x` has no rows.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> collapse(pair, torch.zeros(4, 1, 8, 8)).latents["z"].active
        0
    """
    x = accept(pair, x)
    with quiet(pair, x, seed):
        drawn = draw(pair, x)
    latents = {name: _read(name, d, codebook_of(pair, name)) for name, d in drawn.latents.items()}
    alerts = [said for name, latent in latents.items() if (said := alert(name, latent))]
    return Collapse(len(x), latents, tuple(alerts))


def code_use(name: str, found: Tally, book: Table | None = None) -> CodeUse:
    """Return the use of the codes of a discrete latent, from the sums over its posteriors, and its codebook if any."""
    pooled, tables = not found.bits, found.tables
    rows = None if book is None else book.table.detach().to(found.mass.device).reshape(tables, found.states, -1)
    pairs = () if rows is None else zip(rows, found.used.reshape(tables, -1), strict=True)
    parts = tuple(code_use(name, found.part(i)) for i in range(found.count)) if found.count > 1 else ()
    return CodeUse(
        states=found.states, perplexity=tuple(perplexity(found.share).tolist()),
        dead=tuple((~in_use(found.share)).sum(-1).tolist()), grid=tuple(found.grid),
        share=tuple(found.pooled.sort(descending=True).values.tolist()) if pooled else None,
        pooled_perplexity=float(perplexity(found.pooled)) if pooled else None,
        used=int(found.used.sum()) if pooled else None,
        duplicates=None if rows is None else sum(len(duplicates(table[used])) for table, used in pairs),
        revival=revival(name, book), tables=tables, parts=parts,
        information=tuple(found.information.tolist()), silent=int(found.silent.sum()),
        alert=silence(name, found, book),
    )  # fmt: skip


def _read(name: str, d: LatentDraw, book: Table | None) -> LatentCollapse:
    if d.tally is not None:
        return LatentCollapse(d.tally.positions, None, None, None, None, (), code_use(name, d.tally, book))
    variance, each, dim, prior = activity(d), d.coordinate_kl, d.value.shape[1], d.normal_prior
    kl = None if each is None else tuple(each.mean(0).tolist())
    total = None if d.point else float((d.log_q - d.log_p if d.kl is None else d.kl).mean())
    if variance is None:
        return LatentCollapse(dim, None, kl, None, None, (), kl=total)
    idle = variance <= SILENT.variance
    if kl is not None and prior is not None and bool((prior.loc != prior.loc[:1]).any()):
        idle = idle | (torch.tensor(kl, device=idle.device) <= SILENT.coordinate)
    active, *above = (int((variance > limit).sum()) for limit in (SILENT.variance, *THRESHOLDS))
    curve = tuple(zip(THRESHOLDS, above, strict=True))
    return LatentCollapse(dim, tuple(variance.tolist()), kl, active, int(idle.sum()), curve, kl=total)


def alert(name: str, latent: LatentCollapse) -> str | None:
    """Return an alert for a latent with idle units or unused codes that says what to change; None if it has none."""
    if (use := latent.codes) is None:
        return text("collapse.units", name=name, z=latent, hardly_any=SILENT.of_real(latent.dim)) or None
    if use.used is None or use.silent == len(use.perplexity):
        return use.alert
    limit = SILENT.capacity * math.log(use.states)
    awake = [dead for dead, nats in zip(use.dead, use.information, strict=True) if nats > limit]
    said = texts("collapse.codes", name=name, use=use, revival=use.revival, awake=awake)
    return " ".join(filter(None, (use.alert, *said))) or None
