"""Sample sites of any pair as arrays with one row per datum: valid names, shapes, and posterior parameters."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw_chunk
from pvae.distributions.codes import Certain
from pvae.pair import Layout, Pair, numbers_of, samples, site_shape, unwrapped
from pvae.util import Record, field

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, Any]]
"""Variable of an xarray Dataset: names of its dims, values, attributes."""
RESERVED_DIMS = frozenset({"chain", "draw", "datum", "datum_predictive", "sample", "variable", "column"})
LONGEST_NAME = 64
"""Largest length of a variable name."""
TRACED_ROWS = 16
"""Number of rows on which guide and model are run to find their sample sites."""
EXPORTED_PROBABILITIES = 4096
"""Largest number of posterior probabilities of a discrete latent, per datum, that are exported."""


# ---------------------------------------------------------------------- names


def dims_of(name: str, tail: Sequence[int]) -> tuple[str, ...]:
    """Return the names of a variable's event dims: `<name>_dim` for a vector, `<name>_dim_0`, ... for more dims."""
    return (f"{name}_dim",) if len(tail) == 1 else tuple(f"{name}_dim_{axis}" for axis in range(len(tail)))


def safe_names(tails: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return a variable name for every site: ASCII letters, digits and `_`, distinct from all dims and other names.

    A valid name is kept; any other one is reduced to its valid characters, with a digest appended if that is taken.

    Arguments:
        tails: event shape of every site.
    """
    taken, names = set(RESERVED_DIMS), {}
    for site in sorted(tails, key=lambda site: _kept(site) != site):
        name = next(c for c in _candidates(site) if not {c, *dims_of(c, tails[site])} & taken)
        taken |= {name, *dims_of(name, tails[site])}
        names[site] = name
    return {site: names[site] for site in tails}


def _candidates(site: str) -> Iterator[str]:
    kept, digest = _kept(site), site
    yield from filter(None, [kept])
    while True:
        digest = hashlib.sha256(digest.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        yield f"{kept[: LONGEST_NAME - 9] or 'site'}_{digest}"


def _kept(site: str) -> str:
    """Return the valid characters of a site's name; empty if there are none, or if they are too many."""
    plain = unicodedata.normalize("NFKD", site).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9_]+", "_", plain)
    kept = kept if kept == site else kept.strip("_")
    return kept if len(kept) <= LONGEST_NAME else ""


def storable(value: str) -> str:
    """Return a string as NetCDF can hold it: as JSON if it has control characters or lone surrogates."""
    return value if value and value.isprintable() else json.dumps(value)


def group(variables: Mapping[str, Variable], why: str = "", missing: Iterable[str] = ()) -> xarray.Dataset:
    """Return a group with the given variables, and the reason why others are missing as attributes `missing_<name>`."""
    return xarray.Dataset(dict(variables), attrs={f"missing_{name}": storable(why) for name in missing})


# ---------------------------------------------------------------------- values


def rows_of(t: Tensor, node: Mapping[str, Any], layout: Layout, count: int, codes: int = 0) -> Tensor:
    """Return a site's value or parameter with one entry per datum, `(count, *tail)`, for any plates around the site.

    Arguments:
        t: the tensor.
        node: node of the site in a trace.
        layout: layout of the pair.
        count: rows of the batch.
        codes: number of last dims that are not part of the event: 1 for the probabilities of a categorical.
    """
    fn = node["fn"]
    event = (*fn.event_shape, *t.shape[t.dim() - codes :])
    t = t.detach().expand(*fn.batch_shape, *event).movedim(len(fn.batch_shape) + layout.dim, 0)
    plates = [size for size in t.shape[1 : len(fn.batch_shape)] if size > 1]
    return t.expand(count, *t.shape[1:]).reshape(count, *plates, *event)


def as_value(rows: Tensor, node: Mapping[str, Any], layout: Layout) -> Tensor:
    """Invert `rows_of`: return any number of rows as a value of the site in `node`, in its shape and type."""
    return site_shape(node, layout).spread(rows.to(node["value"]).reshape(len(rows), -1))


def numpy_of(t: Tensor) -> np.ndarray:
    """Return a tensor as an array on the CPU; bfloat16, which NumPy lacks, as float32."""
    t = t.detach().cpu()
    return np.asarray((t.float() if t.dtype is torch.bfloat16 else t).numpy())


# ---------------------------------------------------------------------- posteriors


def parameters_of(node: Mapping[str, Any], layout: Layout, count: int) -> dict[str, Tensor]:
    """Return `loc` and `scale` of a diagonal normal, `probs` of discrete families, `(count, ...)`; {} for others.

    Deterministic codes, and those with more than `EXPORTED_PROBABILITIES` per datum, have no entries.
    """
    fn = unwrapped(node["fn"])
    if isinstance(fn, torch.distributions.Normal):
        return {key: rows_of(t, node, layout, count) for key, t in (("loc", fn.loc), ("scale", fn.scale))}
    if numbers_of(node["fn"]) > EXPORTED_PROBABILITIES and not isinstance(fn, torch.distributions.Bernoulli):
        return {}
    families = torch.distributions.Categorical, torch.distributions.OneHotCategorical, torch.distributions.Bernoulli
    codes = int(isinstance(fn, torch.distributions.Categorical))
    return {"probs": rows_of(fn.probs, node, layout, count, codes)} if isinstance(fn, families) else {}


# ---------------------------------------------------------------------- sites


class ExportedSite(Record, eq=False):
    """One sample site of a pair, as a variable of the export."""

    site: str
    """Name of the sample site in the pair."""
    name: str
    """Name of the variable in the export."""
    like: np.ndarray
    """Value of one datum, or of a global latent, which gives shape and type."""
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Posterior parameters of the first row, of a supported family that depends on x alone; else none."""
    hidden: str = ""
    """Reason why the parameters of the posterior are not exported; empty if they are."""
    closed: bool = False
    """True for a latent with a closed-form KL(q || p) of each of its numbers: q and p are normal, or independent codes,
    and the prior does not depend on latents that the guide infers from this one."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the event dims of the variable, one for every axis of a value."""
        return dims_of(self.name, self.like.shape)

    def empty(self, *lead: int) -> np.ndarray:
        """Return an array of zeros, `(*lead, *event)`, of the site's type."""
        return np.zeros((*lead, *self.like.shape), self.like.dtype)

    def variable(self, values: np.ndarray, *lead: str, **attrs: str) -> Variable:
        """Return values `(*lead, *event)` as a variable, whose attributes name the sample site."""
        return (*lead, *self.dims), values, {**attrs, "site": storable(self.site)}


class ExportedSites(Record):
    """All sample sites of a pair that are exported."""

    latents: tuple[ExportedSite, ...]
    """Latents of the guide, and sites that the model sums out."""
    shared: tuple[ExportedSite, ...]
    """Global latents."""
    observed: tuple[ExportedSite, ...]
    """Observed sites."""
    summed: tuple[str, ...]
    """Latents that the model sums out: their densities are expectations."""


def read_sites(pair: Pair, x: Tensor) -> ExportedSites:
    """Return the sample sites of a pair, found by running it on the first rows of `x` `(n, *event)`."""
    x = x[:TRACED_ROWS]
    with quiet(pair, x, 0):
        guide, model = (samples(trace) for trace in pair.traces(x))
        exact = {name for name, z in draw_chunk(pair, x).latents.items() if z.number_kl is not None}
    layout, count, dependencies = pair.layout, len(x), pair.dependencies(x)
    named = ((layout.latents, guide), (layout.shared, guide), (layout.observed, model))
    values, shared, observed = ({z: value_of(nodes[z], layout, count) for z in names} for names, nodes in named)
    # The joint state of all sites that the model sums out, unless the guide has a latent beside them.
    summed = ("+".join(layout.enumerated),) if layout.enumerated and not layout.latents else ()
    states = dict.fromkeys(summed, np.zeros((), np.int64))
    names = safe_names({name: v.shape for name, v in {**values, **states, **shared, **observed}.items()})
    latents = []
    for name, value in values.items():
        node, found = guide[name], parameters_of(guide[name], layout, count)
        why = _why_hidden(node, found, bool(dependencies.guide.get(name)))
        shown = {} if why else {key: numpy_of(t[0]) for key, t in found.items()}
        latents.append(ExportedSite(name, names[name], value, shown, why, name in exact - dependencies.bottom_up))
    no_guide = "the model sums it out; it has no guide"
    latents += [ExportedSite(n, names[n], value, hidden=no_guide, closed=n in exact) for n, value in states.items()]
    whole_sites, seen = (tuple(ExportedSite(z, names[z], v) for z, v in found.items()) for found in (shared, observed))
    return ExportedSites(tuple(latents), whole_sites, seen, summed)


def values_of(node: Mapping[str, Any], layout: Layout, count: int) -> np.ndarray:
    """Return the value of a site for `count` rows, `(count, *event)`."""
    return numpy_of(rows_of(node["value"], node, layout, count))


def value_of(node: Mapping[str, Any], layout: Layout, count: int) -> np.ndarray:
    """Return the value of a site for the first of `count` rows, `(*event)`; of a global latent, its only value."""
    return values_of(node, layout, count)[0] if layout.holds(node) else whole(node)


def whole(node: Mapping[str, Any]) -> np.ndarray:
    """Return the value of a global latent, without plates of size one."""
    fn = node["fn"]
    return numpy_of(node["value"].reshape((*(size for size in fn.batch_shape if size > 1), *fn.event_shape)))


def _why_hidden(node: Mapping[str, Any], found: Mapping[str, Tensor], reads_latents: bool) -> str:
    """Return the reason why the parameters of a posterior are not exported; empty if they are."""
    fn = unwrapped(node["fn"])
    if isinstance(fn, Certain):
        return "a deterministic code has no parameters"
    if found:
        return "its parameters read other latents" if reads_latents else ""
    if isinstance(fn, torch.distributions.Categorical):
        return f"expected at most {EXPORTED_PROBABILITIES} probabilities of a datum; got {numbers_of(node['fn'])}"
    return f"expected a diagonal normal, categorical, one-hot or Bernoulli posterior; got {type(fn).__name__}"
