"""Posterior: an export of a run as plain xarray Datasets; saved, opened and summarised without torch."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray
from numpy.typing import NDArray

from pvae.errors import CheckpointError, DataError, MissingExtraError, StorageError, near
from pvae.util.files import read_inside, require_plain_target, sync_folder, write_atomic

if TYPE_CHECKING:
    import pandas

Array = NDArray[Any]
Variable = tuple[tuple[str, ...], Array, dict[str, Any]]
"""Dims, values, attributes."""

GROUPS = (
    ("posterior", "sample_stats", "guide", "diagnostics", "prior", "posterior_predictive")
    + ("observed_data", "constant_data")
)  # fmt: skip
RESERVED = frozenset({"chain", "draw", "datum", "datum_predictive", "sample", "variable", "column"})
NATS = {"units": "nats"}
HDI = 0.94
LONGEST = 64
_DIGEST_LINE = re.compile(rb"\\?([0-9a-f]{64}) [ *]")


# ---------------------------------------------------------------------- names


def dims_of(name: str, tail: Sequence[int]) -> tuple[str, ...]:
    """Dims of an event: none for a number, `<name>_dim` for a vector, `<name>_dim_0`, ... for more."""
    if len(tail) == 1:
        return (f"{name}_dim",)
    return tuple(f"{name}_dim_{axis}" for axis in range(len(tail)))


def safe_names(tails: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """A variable name for every site: ASCII letters, digits and `_`, clashing with no dim and no other name.

    A name that is fit stays as it is; any other keeps what it can, with a digest of itself where that is taken.

    Arguments:
        tails: the event shape of every site.
    """
    taken, names = set(RESERVED), {}
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
        yield f"{kept[: LONGEST - 9] or 'site'}_{digest}"


def _kept(site: str) -> str:
    """What is fit of a name, "" where nothing is or where cutting it would confuse it with another."""
    plain = unicodedata.normalize("NFKD", site).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9_]+", "_", plain)
    kept = kept if kept == site else kept.strip("_")
    return kept if len(kept) <= LONGEST else ""


def text(value: str) -> str:
    """A string that NetCDF can hold: itself, or its JSON where it has control characters or lone surrogates."""
    return value if value and value.isprintable() else json.dumps(value)


def dataset(
    variables: Mapping[str, Variable], attrs: Mapping[str, Any], rows: Mapping[str, Array] | None = None
) -> xarray.Dataset:
    """Variables with a coordinate for every dim: what `rows` gives for it, else 0, 1, ..."""
    sizes = {dim: size for dims, values, _ in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
    coords = {dim: (rows or {}).get(dim, np.arange(size)) for dim, size in sizes.items()}
    return xarray.Dataset(dict(variables), coords=coords, attrs=dict(attrs))


# ---------------------------------------------------------------------- the export


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Draws of a guide with their densities and diagnostics, as `xarray.Dataset`s of explicit dims.

    Arguments:
        groups: Datasets by name: `posterior`, `sample_stats`, `guide`, `diagnostics`, `prior`,
            `posterior_predictive`, `observed_data`, `constant_data`; those a pair cannot give are not there.
    """

    groups: Mapping[str, xarray.Dataset]

    def __getitem__(self, name: str) -> xarray.Dataset:
        if name not in self.groups:
            raise DataError(f"Expected a group, {', '.join(self.groups)}; got {name!r}{near(name, self.groups)}.")
        return self.groups[name]

    def summary(self, hdi: float = HDI) -> pandas.DataFrame:
        """One row per latent coordinate, over data and draws together.

        There is no `r_hat` and no `ess_bulk`: the draws of a guide are independent, so both would only say that,
        whatever the guide is worth. How well it fits is in `diagnostics`: khat, ess, and log_evidence above elbo.

        Arguments:
            hdi: the share of draws that the interval holds.

        Returns:
            `mean`; `sd` over data and draws; `sd_of_means`, over data, of the mean over draws (NaN for a global
            latent); the ends of the narrowest interval; `kl` in nats, the mean over data of the coordinate's closed
            KL(q || p) (NaN where it has none).

        Raises:
            DataError: `hdi` lies outside (0, 1).
        """
        import pandas

        if not 0 < hdi < 1:
            raise DataError(f"hdi: expected a share between 0 and 1; got {hdi}.")
        low, high = f"hdi_{50 * (1 - hdi):g}%", f"hdi_{50 * (1 + hdi):g}%"
        columns = ["mean", "sd", "sd_of_means", low, high, "kl"]
        return pandas.DataFrame.from_dict(dict(self._figures(hdi)), orient="index", columns=columns)

    def _figures(self, hdi: float) -> Iterator[tuple[str, list[float]]]:
        """Label and figures of every latent coordinate."""
        diagnostics = self.groups.get("diagnostics", xarray.Dataset())
        for name, draws in self["posterior"].data_vars.items():
            lead = _lead(draws)
            kl = diagnostics.get(f"{name}_kl")
            for index in np.ndindex(draws.shape[lead:]):
                mean_kl = np.nan if kl is None else float(kl.values[(slice(None), *index)].mean())
                label = f"{name}[{', '.join(map(str, index))}]" if index else str(name)
                yield label, [*_figures(draws.values[(slice(None),) * lead + index], hdi), mean_kl]

    def to_datatree(self) -> xarray.DataTree:
        """The groups as one `xarray.DataTree`."""
        return xarray.DataTree.from_dict(dict(self.groups))

    def to_arviz(self) -> Any:
        """What the installed ArviZ works on: `arviz.InferenceData` before ArviZ 1, `xarray.DataTree` since.

        Raises:
            MissingExtraError: ArviZ cannot be imported, for whatever reason.
        """
        arviz = _arviz()
        if int(arviz.__version__.partition(".")[0]) >= 1:
            return self.to_datatree()
        return arviz.InferenceData(**self.groups)

    # -- the file

    def save(self, path: str | Path) -> Path:
        """Write one NetCDF file with the groups, whole or not at all, and `<path>.sha256` beside it.

        Returns:
            The path. `sha256sum -c <path>.sha256` verifies the file in its folder.

        Raises:
            StorageError: it cannot be written; what stood there is unchanged.
        """
        path = Path(path)
        temporary = path.with_name(f".tmp-{os.urandom(8).hex()}")
        try:
            require_plain_target(path)
            try:
                self.to_datatree().to_netcdf(temporary, engine="h5netcdf")
                digest = _place(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError) as problem:  # HDF5 tells of a full disk by either
            raise StorageError(f"{path}: expected to be written; got {problem}. What stood there is unchanged.") from (
                problem
            )
        write_atomic(_checksum_of(path), f"{digest}  {path.name}\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """Open a saved file, its bytes verified before they are parsed; nothing is ever unpickled.

        Raises:
            CheckpointError: the file or its checksum is missing, they differ, or it is no such file.
        """
        path = Path(path)
        _verify(path)
        try:
            _require_plain(path)
            with xarray.open_datatree(path, engine="h5netcdf") as tree:
                found = {name: node.to_dataset().load().drop_encoding() for name, node in tree.children.items()}
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as problem:
            raise CheckpointError(f"{path}: expected NetCDF with groups; got {problem}. Export it again.") from problem
        return cls({name: found[name] for name in sorted(found, key=_rank)})

    # -- in words

    def _facts(self) -> list[tuple[str, str]]:
        drawn = self["posterior"]
        attrs, sizes = drawn.attrs, drawn.sizes
        latents = ", ".join(f"{name} {list(v.shape[_lead(v) :])}" for name, v in drawn.data_vars.items())
        return [
            ("run", f"{attrs.get('run')} {attrs.get('run_id')}"),
            ("split", f"{attrs.get('split')}: {sizes['draw']} draws x {sizes.get('datum', 0)} rows"),
            ("latents", latents),
            ("groups", ", ".join(self.groups)),
        ]

    def __repr__(self) -> str:
        return "Posterior(" + "; ".join(f"{name} {said}" for name, said in self._facts()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._facts())
        return f"<table><caption>Posterior</caption>{rows}</table>"


def _lead(draws: xarray.DataArray) -> int:
    """Number of dims before the event's."""
    return sum(dim in ("chain", "draw", "datum") for dim in draws.dims)


def _figures(draws: Array, hdi: float) -> list[float]:
    """Mean, sd, sd of the means over data, and the narrowest interval of one coordinate, `(1, draw[, datum])`."""
    wide = draws.astype(np.float64)
    of_means = wide.mean((0, 1)).std() if wide.ndim == 3 else np.nan
    ordered = np.sort(wide, axis=None)
    inside = int(hdi * len(ordered))
    first = int(np.argmin(ordered[inside:] - ordered[: len(ordered) - inside]))
    return [float(v) for v in (wide.mean(), wide.std(), of_means, ordered[first], ordered[first + inside])]


def _arviz() -> Any:
    """ArviZ; its import can fail in ways of its own (a cache it cannot write, a plotting package that mismatches)."""
    try:
        import arviz
    except Exception as problem:
        raise MissingExtraError(
            f"Expected ArviZ to import; got {type(problem).__name__}: {problem}. Install it with "
            f"`pip install 'arviz>=0.23.4,<2'`, or use .groups or .to_datatree(), which need only xarray."
        ) from problem
    return arviz


def _rank(name: str) -> tuple[int, str]:
    return (GROUPS.index(name) if name in GROUPS else len(GROUPS), name)


def _checksum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(temporary: Path, path: Path) -> str:
    """Make the temporary file durable and give it its name; returns its digest."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = _sha256(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return digest


def _require_plain(path: Path) -> None:
    """Refuse a file that HDF5 would read other files for, or that nests: none of that is ever written here."""
    import h5py

    with h5py.File(path, "r") as file:
        for name in file:
            group = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
            inside = list(group) if isinstance(group, h5py.Group) else []
            strange = [f"{name}/{item}" for item in inside if not _is_plain(group, item)]
            if strange or not isinstance(group, h5py.Group):
                raise CheckpointError(
                    f"{path}: expected groups of plain arrays; got {[*strange, name][0]!r} of another kind."
                )


def _is_plain(group: Any, name: str) -> bool:
    """Whether an item is an array whose numbers lie in this very file."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return False
    item = group[name]
    return isinstance(item, h5py.Dataset) and not item.external and not item.is_virtual


def _verify(path: Path) -> None:
    """Compare a file with the checksum beside it; raises CheckpointError."""
    checksum = _checksum_of(path)
    try:
        found = _DIGEST_LINE.match(read_inside(checksum.parent, checksum.name, 1 << 16))
        digest = _sha256(path)
    except (OSError, DataError) as problem:
        raise CheckpointError(
            f"{path}: expected the file and its {checksum.name}; got {problem} Copy both, or export it again."
        ) from problem
    if found is None:
        raise CheckpointError(f"{checksum}: expected a line of sha256sum; got none. Export the file again.")
    if (wanted := found[1].decode()) != digest:
        raise CheckpointError(
            f"{path}: expected SHA-256 {wanted}; got {digest} (its bytes changed). Copy it anew, or export it again."
        )
