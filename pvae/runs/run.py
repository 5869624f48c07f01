"""Class `Run`: a fitted experiment opened from its run directory, with declaration, model and guide, data, metrics."""

from __future__ import annotations

import platform
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvae.component import IMPORTED
from pvae.data import Dataset, Split, new
from pvae.data.rows.files import confined
from pvae.data.sources.python import PassedData, TensorSource
from pvae.errors import CheckpointError, DataError, DeclarationError, refuse, text
from pvae.experiment.experiment import Experiment, reading
from pvae.experiment.plan import Plan, side_columns
from pvae.objectives.base import named
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.applied import Applied
from pvae.runs.rundir import TRANSFORMS, RunDirectory
from pvae.runs.weights import attended, chosen, load_weights
from pvae.util import digest, read_inside

if TYPE_CHECKING:
    import pandas

    from pvae.analysis.export.datasets import PosteriorDraws
    from pvae.analysis.pages.plots.axes import RunPlots
    from pvae.analysis.samples.modules import PlainDecoder, PlainEncoder


class Run(Applied):
    """Fitted experiment in a run directory: its declaration, data, fitted model and guide, and metrics.

    Arguments:
        files: run directory.
        data: data set, if the fit used data passed in Python, or the path of a file of the data.
        pair: model/guide pair, if the fit used a hand-written one.
        data_dir: folder in which data files are looked for first.
        is_own: True if the caller has declared the same experiment, so that it names the data files.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> again = pvae.Run.load("vae", root=runs.name)  # by name: its newest run
        >>> again.path == run.path
        True
        >>> again.pair.layout.latents, again.data.shape, again.experiment.train.epochs
        (('z',), (1, 8, 8), 1)
        >>> runs.cleanup()
    """

    def __init__(
        self, files: RunDirectory, *, data: Dataset | str | Path | None = None, pair: Pair | None = None,
        data_dir: Path | None = None, is_own: bool = False,
    ) -> None:  # fmt: skip
        self.files, self._is_own, self._data_dir = files, is_own, data_dir
        self._given_data, self._given_pair = data, pair
        self._device: str | torch.device = "cpu"

    @classmethod
    def load(
        cls, path: str | Path, *, data: Any = None, pair: Pair | None = None, root: str | Path = "runs",
        data_dir: str | Path | None = None,
    ) -> Run:  # fmt: skip
        """Return a run by its folder, by name (for the newest run), by `name/id`, or by `latest`.

        A run of a hand-written pair, or of data passed in Python, needs the same `pair`, or the same `data` (any object
        that `Dataset.of` accepts), again; a file of them is read when it is needed.
        """
        run = cls(RunDirectory.open(path, Path(root)), pair=pair, data_dir=Path(data_dir) if data_dir else None)
        if pair is not None and data is not None and not isinstance(data, Dataset):
            data = pair.pack(data)
            if not pair.declared and not torch.as_tensor(data).is_floating_point():
                pair.accept(torch.as_tensor(data)[:100])  # whole numbers, before the data set makes them floats
        if data is not None and not isinstance(data, Dataset | str | Path):
            data = run._passed(data)
        run._given_data = data
        return run

    def _passed(self, data: Any) -> Dataset:
        bare = self.files.manifest.get("data", {}).get("shape") == []
        declared = self.plan.source if isinstance(self.plan, Experiment) else TensorSource(shape=() if bare else None)
        with reading(self.plan):
            return Dataset.of(data, declared if isinstance(declared, PassedData) else None)

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.files.path

    @property
    def name(self) -> str:
        """Name of the experiment, as declared."""
        return str(self.files.manifest.get("name", self.path.parent.name))

    @cached_property
    def plan(self) -> Plan:
        """Declaration of the run: an `Experiment`, or a `Plan` (training settings) for a hand-written pair."""
        origin, manifest = str(self.path / "spec.toml"), self.files.manifest
        read = Experiment.of_run if manifest.get("declared", True) else Plan.from_toml
        try:
            return read(self.files.spec_text, origin)
        except DeclarationError as error:
            missing = [name for name in manifest.get("imports", []) if name not in IMPORTED]
            hints = [f"The run was fitted with `pvae --import {name}`: say so again." for name in missing]
            raise DeclarationError([*error.problems, *hints]) from None

    @property
    def experiment(self) -> Experiment:
        """Declaration of the experiment; raises DeclarationError for a run of a hand-written pair."""
        if not isinstance(self.plan, Experiment):
            raise DeclarationError(f"{self.path}: expected a declared run; got one of a hand-written pair.")
        return self.plan

    @property
    def lacks_data(self) -> bool:
        """True if the fit used data passed in Python that were not passed again."""
        declared = isinstance(self.plan, Experiment) and not isinstance(self.plan.data, PassedData)
        return self._given_data is None and not declared

    @cached_property
    def data(self) -> Dataset:
        """Data set of the fit, read again; raises DataError if its fingerprint differs from the recorded one."""
        data = self._given_data
        if isinstance(data, str | Path):
            data = self._passed(data)
        refuse(self.lacks_data, "runs.run.no_data", path=self.path, said=self.files.manifest.get("origin"))
        if data is None:
            with confined(self.foreign):
                data = self.experiment.load_data(self._data_dir)
        if (wanted := self.files.manifest.get("data", {}).get("fingerprint")) and data.fingerprint != wanted:
            raise DataError.of("runs.run.other_data", path=self.path, wanted=str(wanted), found=data.fingerprint)
        return (self.plan.conditioned(data) if isinstance(self.plan, Experiment) else data).to(self._device)

    @cached_property
    def transforms(self) -> new.FittedTransforms:
        """Transforms of the fit, by which new rows are prepared; a run of an earlier version reads its data for them.

        Raises:
            DataError: the file of the run is not as it was written.
        """
        if (wanted := self.files.manifest.get("transforms")) is None:
            assert self.data.transforms is not None  # noqa: S101 - a data set that was read has them
            return self.data.transforms
        if digest(found := read_inside(self.path, TRANSFORMS, 1 << 30)) != wanted:
            raise DataError(f"{self.path / TRANSFORMS}: expected the file of the fit; got an edited one.")
        return new.FittedTransforms.parse(found, str(self.path / TRANSFORMS))

    def rows(self, data: Any, *, data_dir: str | Path | None = None) -> Split:
        """Return new data as the split "new", prepared as those of the fit were, none of which are needed.

        The transforms, levels and words of the fit are in the folder of the run. Columns are found by their names, in
        any order; labels may be absent unless the model is conditioned on them; words that the fit does not know get
        codes of their own. Values that are binarised at random are drawn once, from a published seed.

        Arguments:
            data: path of a file of any source (or of a folder of images), DataFrame, array or tensor `(n, *shape)`,
                sparse matrix, AnnData, torch dataset, or a tuple (x, y) of arrays or paths; for a hand-written pair of
                several arguments a tuple or dictionary of tensors. A path is read as the declaration of the run says
                where it is of the same format.
            data_dir: folder in which a relative path is looked for first.

        Raises:
            DataError: a column or a covariate is absent, a level is unknown, rows have another shape, or a value is not
                finite or outside the support of the likelihood; the message names row and column.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> import numpy, pvae
            >>> runs = TemporaryDirectory()
            >>> few = "data.splits.train=[0, 200]"
            >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
            >>> new = run.rows(numpy.full((3, 8, 8), 16, numpy.uint8))  # grey levels of the digits, 0 to 16
            >>> new.name, new.x.shape, new.numbers, float(new.x.mean())
            ('new', torch.Size([3, 1, 8, 8]), array([0, 1, 2]), 1.0)
            >>> runs.cleanup()
        """
        plan = self.plan if isinstance(self.plan, Experiment) else None
        if self._given_pair is not None and not isinstance(data, str | Path):
            data = self._given_pair.pack(data)
        labelled = plan is not None and any(known.of is None for known in plan.covariates.values())
        folder = Path(data_dir) if data_dir else None
        declared = None if plan is None else plan.data.with_side(side_columns(plan.covariates))
        with reading(self.plan):
            found = new.rows_of_new(data, declared, self.transforms, folder, labelled=labelled)
        split = self.transforms.split(found, closed=labelled)
        if plan is not None:
            split.require_support(plan.observed().support, plan.decoder.likelihood.hint, holed=plan.data.masked)
            split = plan.conditioned(split)
        return split.to(self._device)

    def labelled(self, split: Split, *, others: bool = False) -> torch.Tensor:
        """Return the rows `(m, *row)` of a split in which every observed latent y is known, with its values in them.

        Analyses of these rows are of log p(x, y) and q(z | x, y), of other rows of log p(x) and q(y, z | x). The
        surgery takes both at once.

        Arguments:
            split: one of `Run.data`, of which train has the labels that the fit saw, or of `Run.rows`.
            others: return the other rows, too, as they are known: all rows of the split in order.

        Raises:
            DataError: the split lacks the values, or one is none of the latent's.
        """
        values = torch.cat([*self.experiment.known(split).values()], 1)
        every = ~values.isnan().any(1) | others
        rows = split.rows[every.nonzero().squeeze(1)]
        return torch.cat([rows[:, : -values.shape[1]], values[every].to(rows)], 1)

    @property
    def foreign(self) -> str:
        """Kind of a declaration that may not choose the files that are read here; empty for one's own."""
        there = self.files.manifest
        here = there.get("host") == platform.node() and "fingerprint" in there.get("data", {})
        if self._is_own or (here and self.files.spec_is_own()):
            return ""
        return "a run of another machine, without a fingerprint of its data, or with an edited declaration"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a datum, as the manifest records it; raises DataError where it does not."""
        refuse("shape" not in (data := self.files.manifest.get("data", {})), "runs.run.shape", run=self)
        return tuple(data["shape"])

    @cached_property
    def checkpoint(self) -> checkpoint.Checkpoint:
        """Newest checkpoint whose checksums match; raises CheckpointError if there is none."""
        if (found := checkpoint.latest(self.path / "checkpoints")) is None:
            raise CheckpointError(f"{self.path}: expected a checkpoint; got none yet. Let the fit run longer.")
        return found

    @cached_property
    def pair(self) -> Pair:
        """Fitted model/guide pair with the selected weights, on the CPU, in evaluation mode."""
        pair = self.fresh_pair().cpu()
        load_weights(pair, chosen(self.checkpoint), str(self.checkpoint.path), self.plan.objective.dtype)
        return pair.eval()

    @property
    def decoder(self) -> PlainDecoder:
        """Decoder as a Module of tensors with the fitted weights: `run.decoder(z)` is E[x | z]."""
        from pvae.analysis.samples.modules import PlainDecoder  # here, because analysis imports pvae.runs

        return PlainDecoder(self.pair)

    @property
    def encoder(self) -> PlainEncoder:
        """Encoder as a Module of tensors with the fitted weights: `run.encoder(x)` is the mean of q(z | x)."""
        from pvae.analysis.samples.modules import PlainEncoder

        return PlainEncoder(self.pair)

    def fresh_pair(self) -> Pair:
        """Return the model/guide pair of the declaration with initial weights, before any checkpoint is loaded."""
        if self._given_pair is not None:
            self._given_pair.accept(self.data.train.rows)
            return self._given_pair
        if not isinstance(self.plan, Experiment):
            raise DeclarationError.of("runs.run.no_pair", path=self.path, said=self.files.manifest.get("origin"))
        is_given = isinstance(self._given_data, Dataset)
        shape = self.data.shape if is_given else self.shape  # the first compares the fingerprint
        return attended(self.plan.build(shape), lambda: self.data.train)

    @property
    def metrics(self) -> pandas.DataFrame:
        """Data frame of metrics, a row per epoch and split: elbo, reconstruction, kl, kl/<latent> (nats per datum)."""
        return self.files.metrics()

    @property
    def status(self) -> dict[str, object]:
        """Latest status of the run: its state, epoch, last ELBO and so on."""
        return self.files.status()

    def __repr__(self) -> str:
        status = self.status
        return f"Run({self.name!r}, {status.get('state')}, epoch {status.get('epoch')}, {str(self.path)!r})"

    @property
    def plot(self) -> RunPlots:
        """Plots as matplotlib axes: `run.plot.training()`, `latents()`, `surgery()` and `samples()`."""
        from pvae.analysis.pages.plots.axes import RunPlots

        return RunPlots(self)

    def _repr_html_(self) -> str:
        from pvae.analysis.pages.plots.base import pictured

        drawn = pictured(self.plot.training().figure, f"training of {self.name}") if self.files.metrics_rows() else ""
        known = {named(name): self.status[name] for name in ("elbo", "log_joint") if name in self.status}
        return text("runs.run.html", run=self, status=self.status, known=known) + drawn

    def posterior(
        self, split: str = "test", draws: int = 100, rows: int | None = None, seed: int = 0, **options: Any
    ) -> PosteriorDraws:
        """Return posterior samples of the latents of a split, with log densities and diagnostics.

        See `pvae.analysis.posterior` for the arguments.
        """
        from pvae.analysis.export.posterior import posterior  # here, because analysis imports pvae.runs

        return posterior(self, split, draws, rows, seed, **options)

    def to(self, device: str | torch.device) -> Run:
        """Move the pair to a device, and the data if they are read, and return the run itself."""
        self.__dict__["pair"] = self.pair.to(device)
        self._device = device
        if "data" in self.__dict__:
            self.__dict__["data"] = self.data.to(device)
        return self
