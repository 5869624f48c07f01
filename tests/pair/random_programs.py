"""Random hand-written programs: graphs of one to four latents, with plates, masks, factors, points and enumeration.

Each is a model and a guide as a user of Pyro writes them, with data and, by brute force over a grid of all latents, the
exact log p(x) of every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

K = 3
"""Number of states of a categorical latent."""
INNER = 2
"""Size of the plate beside that of the rows."""
CONTINUOUS = ("normal", "vector", "positive", "point")
AXIS = torch.linspace(-6.5, 6.5, 33, dtype=torch.float64)
"""Grid of every continuous coordinate: the trapezoidal rule is exact to many digits for densities this wide."""
COORDINATES = 3
"""Largest number of continuous coordinates of a row that are put on a grid."""


@dataclass(frozen=True)
class Site:
    """One latent."""

    name: str
    kind: str
    """normal, vector, positive, point (a Delta in the guide), category or bit; how discrete ones are summed is drawn
    for the whole program."""
    place: str
    """global, data or inner."""
    parents: tuple[str, ...]
    read_by_guide: bool
    hidden: bool
    """True if a mask hides the site in rows whose flag is 0."""


@dataclass(frozen=True)
class Drawn:
    """A random program."""

    sites: tuple[Site, ...]
    flavour: str
    """Treatment of discrete latents: sampled (score function), expected (enumerated in the guide), summed (in the
    model alone)."""
    outer: bool
    """True if the inner plate lies left of the data plate, False if right of it."""
    index: str
    """Way to take the coordinates of a vector: dots, left or reshape."""
    factor: str
    """Penalty of the guide: none, pathwise or score."""
    factor_reads: bool
    """True if the penalty depends on the latents beside the rows."""
    moving: bool
    """True if hidden sites are written only in batches with at least one flagged row."""
    second: bool
    """True if a second column is observed, under a mask."""
    record: bool
    rows: int
    seed: int

    @property
    def dim(self) -> int:
        return -1 if self.outer or not self.has_inner else -2

    @property
    def has_inner(self) -> bool:
        return any(site.place == "inner" for site in self.sites)

    @property
    def data(self) -> Tensor:
        """Columns x0, x1, flag; the first row is flagged."""
        noise = torch.Generator().manual_seed(self.seed)
        x = 1.3 * torch.randn(self.rows, 2, generator=noise)
        flag = torch.rand(self.rows, 1, generator=noise) < 0.6
        flag[0] = True
        return torch.cat([x, flag.float()], 1)

    def plain(self) -> Drawn:
        """The program without the guide's penalty, which is no part of the ELBO."""
        return replace(self, factor="none")

    # ------------------------------------------------------------------ the two programs

    def column(self, x: Tensor) -> Tensor:
        """A value per row in the shape of the data plate."""
        return x if self.dim == -1 else x[:, None]

    def plates(self, x: Tensor) -> dict[str, Any]:
        """The plate of the rows and the one beside it, where there is one."""
        inner = {"inner": pyro.plate("inner", INNER, dim=-2 if self.outer else -1)} if self.has_inner else {}
        return {"data": pyro.plate("data", len(x), dim=self.dim), **inner}

    @contextmanager
    def around(self, site: Site, x: Tensor, plates: dict[str, Any]) -> Iterator[None]:
        """The plates and the mask of a site."""
        with ExitStack() as stack:
            if site.place != "global":
                stack.enter_context(plates["data"])
            if site.place == "inner":
                stack.enter_context(plates["inner"])
            if site.hidden:
                stack.enter_context(poutine.mask(mask=self.column(x[:, 2]) > 0))
            yield

    def absent(self, site: Site, x: Tensor) -> bool:
        return site.hidden and self.moving and not bool((x[:, 2] > 0).any())

    def feature(self, site: Site, value: Tensor, x: Tensor, inner: bool) -> Tensor:
        """The value that children read of a latent; nothing in rows where it is hidden."""
        if site.kind == "vector":
            if self.index == "left":
                value = z[:, 0] - 0.5 * z[:, 1] if (z := value).dim() == 2 else z[:, :, 0] - 0.5 * z[:, :, 1]
            elif self.index == "reshape" and site.place == "data":
                flat = value.reshape(len(x), -1)
                value = self.column(flat[:, 0] - 0.5 * flat[:, 1])
            else:
                value = value[..., 0] - 0.5 * value[..., 1]
        elif site.kind == "category":
            value = torch.tensor([-1.0, 0.3, 1.2], dtype=x.dtype)[value.long()]
        elif site.kind == "positive":
            value = value.log()
        if site.place == "inner" and not inner:
            value = value.sum(-2 if self.outer else -1, keepdim=True)
        return value * self.column(x[:, 2]) if site.hidden else value

    def total(self, site: Site | None, values: dict[str, Tensor], x: Tensor, inner: bool = False) -> Tensor:
        """Sum of the features of the parents of a latent; of all leaves, for an observed site."""
        read = {p for s in self.sites for p in s.parents}
        names = site.parents if site else [s.name for s in self.sites if s.name not in read]
        parts = [self.feature(s, values[s.name], x, inner) for s in self.sites if s.name in names and s.name in values]
        return sum(parts, torch.zeros((), dtype=x.dtype))

    @staticmethod
    def law(kind: str, loc: Tensor, scale: float) -> Any:
        """Distribution of a latent around a location."""
        if kind == "vector":
            return dist.Normal(torch.stack([loc, -0.5 * loc], -1), scale).to_event(1)
        if kind == "category":
            return dist.Categorical(logits=loc[..., None] * torch.arange(K, dtype=loc.dtype) * scale)
        if kind == "bit":
            return dist.Bernoulli(logits=loc * scale)
        return dist.LogNormal(loc, scale) if kind == "positive" else dist.Normal(loc, scale)

    def model(self, x: Tensor) -> None:
        values, plates = {}, self.plates(x)
        for site in self.sites:
            if self.absent(site, x):
                continue
            discrete = site.kind not in CONTINUOUS
            infer = {"enumerate": "parallel"} if discrete and self.flavour == "summed" else {}
            with self.around(site, x, plates):
                loc = 0.3 + 0.6 * self.total(site, values, x, site.place == "inner")
                values[site.name] = pyro.sample(site.name, self.law(site.kind, loc, 1.0), infer=infer)
            if self.record and site.place == "data":
                pyro.deterministic(f"{site.name}_seen", values[site.name] * 1.0)
        scale = pyro.param("model_scale", torch.tensor(0.9, dtype=x.dtype))
        summed_inside = self.flavour == "summed" and any(
            s.place == "inner" and s.kind not in CONTINUOUS for s in self.sites
        )
        with plates["data"]:
            if self.has_inner:
                with plates["inner"]:
                    wide = x[:, :2].T if self.outer else x[:, :2]
                    pyro.sample("pixels", dist.Normal(self.total(None, values, x, True), scale), obs=wide)
            if not summed_inside:
                loc = self.total(None, values, x)
                pyro.sample("x", dist.Normal(loc, scale), obs=self.column(x[:, 0]))
                if self.second:
                    with poutine.mask(mask=self.column(x[:, 2]) > 0):
                        pyro.sample("y", dist.Normal(0.5 * loc, 1.0), obs=self.column(x[:, 1]))

    def guide(self, x: Tensor) -> None:
        values, plates, width = {}, self.plates(x), None
        drawn = [s for s in self.sites if s.kind in CONTINUOUS or self.flavour != "summed"]
        if drawn or self.factor != "none":
            slope = pyro.param("slope", torch.tensor(0.35, dtype=x.dtype))
        if any(site.kind != "point" for site in drawn):
            width = pyro.param("width", torch.tensor(0.85, dtype=x.dtype), constraint=dist.constraints.positive)
        for site in drawn:
            discrete = site.kind not in CONTINUOUS
            if self.absent(site, x):
                continue
            infer = {"enumerate": "parallel"} if discrete and self.flavour == "expected" else {}
            loc = slope * (0.4 if site.place == "global" else self.column(x[:, 0]))
            if site.place == "inner":
                loc = slope * (x[:, :2].T if self.outer else x[:, :2])
            with self.around(site, x, plates):
                if site.read_by_guide:
                    loc = loc + 0.4 * self.total(site, values, x, site.place == "inner")
                law = dist.Delta(loc) if site.kind == "point" else self.law(site.kind, loc, width)
                values[site.name] = pyro.sample(site.name, law, infer=infer)
        if self.factor != "none":
            with plates["data"]:
                penalty = 0.7 * (slope - 1.0) ** 2 + 0.1 * self.column(x[:, 0])
                if self.factor_reads:
                    local = [site for site in drawn if site.place == "data" and site.name in values]
                    penalty = penalty + sum(0.2 * self.feature(s, values[s.name], x, False) for s in local)
                pyro.factor("penalty", penalty, has_rsample=self.factor == "pathwise")

    # ------------------------------------------------------------------ the truth

    def coordinates(self, site: Site) -> int:
        return (2 if site.kind == "vector" else 1) * (INNER if site.place == "inner" else 1)

    @property
    def on_a_grid(self) -> bool:
        """True if few enough coordinates are continuous for a grid."""
        free = [self.coordinates(s) for s in self.sites if s.kind in CONTINUOUS[:3]]
        states = math.prod(
            {"category": K, "bit": 2}[s.kind] ** self.coordinates(s) for s in self.sites if s.kind not in CONTINUOUS
        )
        return len(AXIS) ** sum(free) * states * self.rows <= len(AXIS) ** COORDINATES * 4

    @torch.no_grad()
    def log_p(self, x: Tensor, points: dict[str, Tensor]) -> float:
        """Return the mean log p(x), exactly, from the model's own densities on a grid; of global `points` given them.

        One run of the model holds every combination of values for every row; all densities are those of Pyro's trace.
        """
        axes, weights = [], []
        for site in self.sites:
            if site.kind == "point":
                continue
            line = AXIS if site.kind in CONTINUOUS else torch.arange({"category": K, "bit": 2}[site.kind]).double()
            log_step = math.log(float(AXIS[1] - AXIS[0])) if site.kind in CONTINUOUS else 0.0
            for _ in range(self.coordinates(site)):
                axes.append(line)
                weights.append(log_step)
        grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        tiled = x.double().repeat(len(grid), 1)
        flat, jacobian, at = grid.repeat_interleave(len(x), 0), torch.zeros(len(tiled)).double(), 0
        values = {name: value.double() for name, value in points.items()}
        for site in self.sites:
            if site.kind == "point":
                continue
            part = flat[:, at : at + self.coordinates(site)]
            at += self.coordinates(site)
            if site.kind == "positive":
                jacobian, part = jacobian + part.sum(1), part.exp()
            values[site.name] = self._shaped(site, part)
        with poutine.trace() as tracer, poutine.condition(data=values), pyro.validation_enabled(False):
            self.model(tiled)
        joint = jacobian + sum(weights)
        for name, node in tracer.trace.nodes.items():
            skipped = name in {*points, "data", "inner"} or node["infer"].get("_deterministic")
            if node["type"] != "sample" or skipped:
                continue
            score = node["fn"].log_prob(node["value"])
            if node["is_observed"] and node["mask"] is not None and name not in values:
                score = score * node["mask"]
            joint = joint + self._by_row(score, len(tiled))
        shared = [s for s in self.sites if s.place == "global" and s.kind != "point"]
        joint = joint.reshape(len(grid), len(x))
        if not shared:
            return float(joint.logsumexp(0).mean())
        first = len(AXIS) ** len(shared)  # global latents are scalars, and their prior counts once for all rows
        joint = joint.reshape(first, -1, len(x)).logsumexp(1)
        nodes = [(site, tracer.trace.nodes[site.name]) for site in shared]
        prior = sum(node["fn"].log_prob(node["value"]).reshape(-1) for _, node in nodes)
        prior = prior + sum(node["value"].reshape(-1).log() for site, node in nodes if site.kind == "positive")
        prior = prior.reshape(first, -1)[:, 0] + sum(weights[: len(shared)])
        return float(((joint - prior[:, None]).sum(1) + prior).logsumexp(0)) / len(x)

    def _shaped(self, site: Site, part: Tensor) -> Tensor:
        """Values `(tiles, coordinates)` in the shape of a site."""
        if site.place == "inner":
            wide = part.reshape(len(part), INNER, -1)
            wide = wide.movedim(1, 0) if self.outer else wide
            return wide if site.kind == "vector" else wide[..., 0]
        value = part if self.dim == -1 else part[:, None]
        return value if site.kind == "vector" else value[..., 0]

    def _by_row(self, score: Tensor, rows: int) -> Tensor:
        if self.dim == -2:
            return score.expand(rows, score.shape[-1]).sum(-1)
        return score.sum(0) if score.dim() == 2 else score


@st.composite
def programs(draw: st.DrawFn) -> Drawn:
    """Strategy of random programs."""
    flavour = draw(st.sampled_from(["sampled", "expected", "summed"]))
    outer = draw(st.booleans())
    places = sorted(
        draw(st.lists(st.sampled_from(["data", "data", "global", "inner"]), min_size=1, max_size=4)),
        key=["global", "data", "inner"].index,
    )
    if all(place == "global" for place in places):
        places[-1] = "data"
    sites: list[Site] = []
    for i, place in enumerate(places):
        kinds = [*CONTINUOUS, "normal", "vector", "category", "bit"]
        if place == "global":
            kinds = ["normal", "positive", "point"]
        elif place == "inner" and flavour == "expected":
            kinds = ["normal", "vector", "positive"]
        elif place == "inner":
            kinds = ["normal", "vector", "positive", "category", "bit"]
        kind = draw(st.sampled_from(kinds))
        parents = tuple(s.name for s in sites if draw(st.booleans()))
        discrete = kind not in CONTINUOUS
        hidden = place == "data" and not (discrete and flavour != "sampled") and draw(st.integers(0, 4)) == 0
        reads = draw(st.booleans()) and (kind, place) != ("point", "global")  # else it is no one point
        sites.append(Site(f"z{i}", kind, place, parents, reads, hidden))
    if flavour != "sampled" or any(s.place != "data" for s in sites):
        index = "dots"
    else:
        index = draw(st.sampled_from(["dots", "left", "reshape"]))
    return Drawn(
        tuple(sites),
        flavour,
        outer,
        index,
        draw(st.sampled_from(["none", "none", "pathwise", "pathwise" if flavour == "expected" else "score"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(2, 4)),
        draw(st.integers(0, 2**16)),
    )
