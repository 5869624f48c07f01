"""Valid names of exported variables and dims, and xarray Datasets with explicit dims."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray

from pvae.util.types import Array

Variable = tuple[tuple[str, ...], Array, dict[str, Any]]
"""Variable of an xarray Dataset: names of its dims, values, attributes."""
NATS = {"units": "nats"}
RESERVED_DIMS = frozenset({"chain", "draw", "datum", "datum_predictive", "sample", "variable", "column"})
LONGEST_NAME = 64
"""Largest length of a variable name."""


def dims_of(name: str, tail: Sequence[int]) -> tuple[str, ...]:
    """Return the names of a variable's event dims: `<name>_dim` for a vector, `<name>_dim_0`, ... for more dims."""
    if len(tail) == 1:
        return (f"{name}_dim",)
    return tuple(f"{name}_dim_{axis}" for axis in range(len(tail)))


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
    if kept:
        yield kept
    while True:
        digest = hashlib.sha256(digest.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        yield f"{kept[: LONGEST_NAME - 9] or 'site'}_{digest}"


def _kept(site: str) -> str:
    """Return the valid characters of a site's name; empty if there are none, or if they are too many."""
    plain = unicodedata.normalize("NFKD", site).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9_]+", "_", plain)
    kept = kept if kept == site else kept.strip("_")
    return kept if len(kept) <= LONGEST_NAME else ""


def text(value: str) -> str:
    """Return a string as NetCDF can hold it: as JSON if it has control characters or lone surrogates."""
    return value if value and value.isprintable() else json.dumps(value)


def dataset(
    variables: Mapping[str, Variable], attrs: Mapping[str, Any], rows: Mapping[str, Array] | None = None
) -> xarray.Dataset:
    """Return variables as a Dataset with a coordinate for every dim: that of `rows` if there is one, else 0, 1, ..."""
    sizes = {dim: size for dims, values, _ in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
    coords = {dim: (rows or {}).get(dim, np.arange(size)) for dim, size in sizes.items()}
    return xarray.Dataset(dict(variables), coords=coords, attrs=dict(attrs))
