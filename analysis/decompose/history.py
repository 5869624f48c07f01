"""Information and marginal KL over training: a cheap surgery every few epochs."""

from __future__ import annotations

from pvae.analysis.decompose.surgery import surgery
from pvae.data import Dataset
from pvae.experiment.plan import Plan
from pvae.pair.pair import Pair
from pvae.util import seeds

RECORDED = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl", "total_correlation", "coordinate_kl")
"""Terms of a surgery that are recorded."""


def record(plan: Plan, pair: Pair, data: Dataset) -> dict[str, float]:
    """Return the surgery of a few rows as a row of metrics: mean terms and active units, nats per datum.

    The same rows and the same noise every time, so that what changes is the pair.
    """
    watched = plan.analysis
    x = data.split(watched.split).rows
    chosen = seeds.subset(len(x), watched.rows, seeds.mix(plan.seed, seeds.ANALYSIS, 4)).to(x.device)
    found = surgery(pair, x[chosen], samples=watched.samples, seed=plan.seed)
    figures = {name: e.value for name, e, _ in found.known() if name in RECORDED}
    active = {f"active/{name}": z.active_units for name, z in found.latents.items() if z.active_units is not None}
    return {**figures, "log_n": found.log_n.value, **active}
