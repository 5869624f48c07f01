"""Posterior samples as plain xarray Datasets; saved, opened and summarised without torch."""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas
import xarray

from pvae.errors import CheckpointError, DataError, MissingExtraError, StorageError, instead, near, refuse
from pvae.util import Record
from pvae.util.files import file_digest, read_inside, replaced, write_atomic

GROUP_NAMES = (
    ("posterior", "sample_stats", "guide", "diagnostics", "prior", "posterior_predictive")
    + ("observed_data", "constant_data")
)  # fmt: skip
_DIGEST_LINE = re.compile(rb"\\?([0-9a-f]{64}) [ *]")


class PosteriorDraws(Record, eq=False, repr=False):
    """Posterior samples of a guide with densities and diagnostics, as `xarray.Dataset`s; the result of `posterior`.

    Arguments:
        groups: Datasets by name: `posterior`, `sample_stats`, `guide`, `diagnostics`, `prior`,
            `posterior_predictive`, `observed_data`, `constant_data`; groups that a pair cannot give are missing.
    """

    groups: Mapping[str, xarray.Dataset]

    def __getitem__(self, name: str) -> xarray.Dataset:
        known = ", ".join(self.groups)
        refuse(name not in self.groups, f"Expected a group, {known}; got {name!r}{near(name, self.groups)}.")
        return self.groups[name]

    def summary(self, hdi: float = 0.94) -> pandas.DataFrame:
        """Summarise every latent coordinate over data and samples together, one row each.

        There is no `r_hat` and no `ess_bulk`: samples of a guide are independent, so both would be trivial for any
        guide. Its quality is in the group `diagnostics`: khat, ess, and the difference of log_evidence and elbo.

        Arguments:
            hdi: proportion of samples in the highest-density interval.

        Returns:
            `mean`; `sd` over data and samples; `sd_of_means`, the standard deviation over data of the mean over samples
            (NaN for a global latent); the ends of the narrowest interval; `kl`, nats, the mean over data of the
            closed-form KL(q || p) of the coordinate or code (NaN where there is none).

        Raises:
            DataError: `hdi` lies outside (0, 1).
        """
        refuse(not 0 < hdi < 1, f"hdi: expected a proportion between 0 and 1; got {hdi}.")
        low, high = f"hdi_{50 * (1 - hdi):g}%", f"hdi_{50 * (1 + hdi):g}%"
        columns = ["mean", "sd", "sd_of_means", low, high, "kl"]
        return pandas.DataFrame.from_dict(dict(self._figures(hdi)), orient="index", columns=columns)

    def _figures(self, hdi: float) -> Iterator[tuple[str, list[float]]]:
        """Yield the label and the summary statistics of every latent coordinate."""
        for name, draws in self["posterior"].data_vars.items():
            lead = _lead(draws)
            kl = self.groups.get("diagnostics", xarray.Dataset()).get(f"{name}_kl")
            for index in np.ndindex(draws.shape[lead:]):
                mean_kl = np.nan if kl is None else float(kl.values[(slice(None), *index)].mean())
                label = f"{name}[{', '.join(map(str, index))}]" if index else str(name)
                yield label, [*_figures(draws.values[(slice(None),) * lead + index], hdi), mean_kl]

    def to_datatree(self) -> xarray.DataTree:
        """Return the groups as one `xarray.DataTree`."""
        return xarray.DataTree.from_dict(dict(self.groups))

    def to_arviz(self) -> Any:
        """Return the object that the installed ArviZ works on: `arviz.InferenceData`, from ArviZ 1 `xarray.DataTree`.

        Raises:
            MissingExtraError: ArviZ cannot be imported.
        """
        # it can fail in many ways: a read-only cache, a plotting package too old or new
        with instead(Exception, "analysis.datasets.arviz", MissingExtraError):
            import arviz
        if int(arviz.__version__.partition(".")[0]) >= 1:
            return self.to_datatree()
        return arviz.InferenceData(**dict[str, Any](self.groups))

    def save(self, path: str | Path) -> Path:
        """Write one NetCDF file with the groups atomically, and its checksum to `<path>.sha256`.

        Returns:
            The path. `sha256sum -c <path>.sha256` verifies the file in its folder.

        Raises:
            OutputError: no file can be created there; StorageError: the disk is full. An older file is unchanged.
        """
        path = Path(path)
        unwritten = f"{path}: expected to be written; got {{problem}}. What stood there is unchanged."
        with replaced(path) as temporary:
            with instead(RuntimeError, unwritten, StorageError):  # HDF5 raises it, too, on a full disk
                self.to_datatree().to_netcdf(temporary, engine="h5netcdf")
            digest = file_digest(temporary)
        write_atomic(path.with_name(f"{path.name}.sha256"), f"{digest}  {path.name}\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a saved file after verifying its checksum; nothing is unpickled.

        Raises:
            CheckpointError: the file or its checksum is missing, they do not match, or the file has another format.
        """
        path = Path(path)
        _verify(path)
        wrong = (OSError, ValueError, KeyError, RuntimeError, TypeError)
        with instead(wrong, f"{path}: expected NetCDF with groups; got {{problem}}. Export it again.", CheckpointError):
            _require_plain(path)
            with xarray.open_datatree(path, engine="h5netcdf") as tree:
                found = {name: node.to_dataset().load().drop_encoding() for name, node in tree.children.items()}
        order = (*GROUP_NAMES, *sorted(found.keys() - set(GROUP_NAMES)))
        return cls({name: found[name] for name in order if name in found})

    def _facts(self) -> dict[str, str]:
        drawn = self["posterior"]
        attrs, sizes = drawn.attrs, drawn.sizes
        return {
            "run": f"{attrs.get('run')} {attrs.get('run_id')}",
            "split": f"{attrs.get('split')}: {sizes['draw']} draws x {sizes.get('datum', 0)} rows",
            "latents": ", ".join(f"{name} {list(v.shape[_lead(v) :])}" for name, v in drawn.data_vars.items()),
            "groups": ", ".join(self.groups),
        }

    def __repr__(self) -> str:
        return "Posterior(" + "; ".join(f"{name} {said}" for name, said in self._facts().items()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in self._facts().items())
        return f"<table><caption>Posterior</caption>{rows}</table>"


def _lead(draws: xarray.DataArray) -> int:
    """Return the number of the dims chain, draw and datum, which precede those of the event."""
    return sum(dim in ("chain", "draw", "datum") for dim in draws.dims)


def _figures(draws: np.ndarray, hdi: float) -> list[float]:
    """Return mean, sd, sd of the means over data, and the narrowest interval of one coordinate `(1, draw[, datum])`."""
    wide = draws.astype(np.float64)
    of_means = wide.mean((0, 1)).std() if wide.ndim == 3 else np.nan
    ordered = np.sort(wide, axis=None)
    inside = int(hdi * len(ordered))
    first = int(np.argmin(ordered[inside:] - ordered[: len(ordered) - inside]))
    return [float(v) for v in (wide.mean(), wide.std(), of_means, ordered[first], ordered[first + inside])]


def _require_plain(path: Path) -> None:
    """Refuse links to other files and nested groups, which `save` never writes."""
    import h5py

    def is_plain(parent: Any, name: str, kind: Any) -> bool:
        if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
            return False
        item = parent[name]
        return isinstance(item, kind) and not (kind is h5py.Dataset and (item.external or item.is_virtual))

    with h5py.File(path, "r") as file:
        strange = [name for name in file if not is_plain(file, name, h5py.Group)]
        for name in (name for name in file if name not in strange):
            strange += [f"{name}/{item}" for item in file[name] if not is_plain(file[name], item, h5py.Dataset)]
    refuse(strange, "analysis.datasets.strange", CheckpointError, path=path, names=strange)


def _verify(path: Path) -> None:
    """Compare a file with the SHA-256 checksum stored next to it; raise CheckpointError if they differ."""
    checksum = path.with_name(f"{path.name}.sha256")
    with instead((OSError, DataError), "analysis.datasets.checksum", CheckpointError, path=path):
        found = _DIGEST_LINE.match(read_inside(checksum.parent, checksum.name, 1 << 16))
        digest = file_digest(path)
    wanted = found[1].decode() if found else ""
    refuse(not wanted, f"{checksum}: expected a line of sha256sum; got none. Export the file again.", CheckpointError)
    refuse(wanted != digest, "analysis.datasets.digest", CheckpointError, path=path, wanted=wanted, digest=digest)
