"""Groups of an export in addition to the posterior samples: guide parameters, prior and predictive samples, data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pvae.analysis.export.latents import DRAW_DIMS, PosteriorRequest, SampledLatents, VariableGroup
from pvae.analysis.export.names import Variable
from pvae.analysis.export.sites import ExportedSites, as_value, numpy_of, parameters_of, rows_of, whole
from pvae.pair.layout import Layout, samples
from pvae.pair.structure import ROWS_OF_A_BATCH
from pvae.util.types import Array


def guide(request: PosteriorRequest, sites: ExportedSites) -> VariableGroup:
    """Return the group `guide`: the parameters of q(z | x) for all rows of the split."""
    pair, n, layout = request.pair, len(request.split), request.pair.layout
    shown = [site for site in sites.latents if site.site in sites.parameters]
    found: dict[str, Variable] = {
        f"{site.name}_{key}": (
            ("datum", *(*site.dims, f"{site.name}_code")[: one.ndim]),
            np.empty((n, *one.shape), one.dtype),
            site.attrs,
        )
        for site in shown
        for key, one in sites.parameters[site.site].items()
    }
    with request.quiet(0):
        for start in range(0, n, ROWS_OF_A_BATCH) if shown else ():
            x = pair.accept(request.split.rows[start : start + ROWS_OF_A_BATCH])
            nodes = samples(pair.guide_trace(x))
            for site in shown:
                for key, t in parameters_of(nodes[site.site], layout, len(x)).items():
                    found[f"{site.name}_{key}"][1][start : start + len(x)] = numpy_of(t)
    names = {site.site: site.name for site in sites.latents}
    return VariableGroup(found, {names[site]: why for site, why in sites.hidden.items()})


def prior(request: PosteriorRequest, sites: ExportedSites) -> VariableGroup:
    """Return the group `prior`: samples of p(z), each from its own run of the model, with its own global latents."""
    pair, n = request.pair, len(request.x)
    with request.quiet(1):
        draws = [
            dict(_values_of_prior(samples(pair.simulate(x)), sites, pair.layout, len(x)))
            for x in (request.x[torch.tensor([i % n, (i + 1) % n])] for i in range(request.draws))
        ]
    every = [site for site in (*sites.latents, *sites.shared) if site.site in draws[0]]
    stacked = {site: np.stack([draw[site.site] for draw in draws])[None] for site in every}
    return VariableGroup(
        {site.name: ((*DRAW_DIMS, *site.dims), values, site.attrs) for site, values in stacked.items()}
    )


def _values_of_prior(
    nodes: Mapping[str, Any], sites: ExportedSites, layout: Layout, count: int
) -> Iterator[tuple[str, Array]]:
    """Yield the latents of the first row and the global latents, by site; sites of the guide alone are left out."""
    for site in sites.latents:
        if node := nodes.get(site.site):
            yield site.site, numpy_of(rows_of(node["value"], node, layout, count)[0]).reshape(site.tail)
    for site in sites.shared:
        if node := nodes.get(site.site):
            yield site.site, numpy_of(whole(node))


def posterior_predictive(request: PosteriorRequest, sites: ExportedSites, drawn: SampledLatents) -> VariableGroup:
    """Return the group `posterior_predictive`: samples of p(x | z) at the first samples of z for the first rows."""
    pair, count, layout = request.pair, request.predictive_rows, request.pair.layout
    x = request.x[:count]
    if sites.summed:
        raise NotImplementedError(f"the model sums out {', '.join(sites.summed)}")
    out = {site.site: site.empty(1, request.predictive_draws, count) for site in sites.observed}
    with request.quiet(2):
        template = samples(pair.guide_trace(x))
        for draw in range(request.predictive_draws):
            with poutine.condition(data=dict(_values(drawn, template, layout, draw, count))):
                nodes = samples(pair.simulate(x))
            for site in sites.observed:
                node = nodes[site.site]
                out[site.site][0, draw] = numpy_of(rows_of(node["value"], node, layout, count))
    dims = (*DRAW_DIMS, "datum_predictive")
    return VariableGroup({site.name: ((*dims, *site.dims), out[site.site], site.attrs) for site in sites.observed})


def _values(
    drawn: SampledLatents, template: Mapping[str, Any], layout: Layout, draw: int, count: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored latents of one draw by site, in the shape and type that guide and model take."""
    for site in drawn.sites.latents:
        rows = torch.from_numpy(drawn.values[site.site][0, draw, :count])
        yield site.site, as_value(rows, template[site.site], layout)
    for site in drawn.sites.shared:
        value = template[site.site]["value"]
        yield site.site, torch.from_numpy(drawn.values[site.site][0, draw, ...]).to(value).reshape(value.shape)


def observed_data(request: PosteriorRequest, sites: ExportedSites) -> VariableGroup:
    """Return the group `observed_data`: the observed values of the rows of `posterior_predictive`."""
    pair, x = request.pair, request.x[: request.predictive_rows]
    with request.quiet(3):
        nodes = samples(pair.traces(x)[1])
    rows = {site: rows_of(nodes[site.site]["value"], nodes[site.site], pair.layout, len(x)) for site in sites.observed}
    return VariableGroup({s.name: (("datum_predictive", *s.dims), numpy_of(t), s.attrs) for s, t in rows.items()})


def constant_data(request: PosteriorRequest) -> VariableGroup:
    """Return the group `constant_data`: indices of the rows, and class labels if the split has them."""
    found: dict[str, Variable] = {"row": (("datum",), request.rows.numpy(), {})}
    if request.split.y is not None:
        found["label"] = (("datum",), numpy_of(request.split.y)[request.rows.numpy()], {})
    return VariableGroup(found)
