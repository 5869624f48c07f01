"""Command `verify`: check of every file of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pvae.data.sources.python import TensorSource
from pvae.data.sources.tabular import FrameSource
from pvae.errors import CheckpointError, DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.find import is_stale
from pvae.runs.run import Run
from pvae.runs.rundir import RUN_STATES, RunDirectory
from pvae.upkeep import folder, weights
from pvae.util.checks import Check, Checks, Level, attempt
from pvae.util.files import read_inside, read_lines


def verify(
    run: Run | str | Path, *, root: str | Path = "runs", data: bool = False, data_dir: str | Path | None = None
) -> Checks:
    """Return the results of checks of every file of a run; writes nothing, and works also while the run is fitted.

    Every checkpoint is read (SHA-256 and format version), compared with the names and shapes of the declaration, and
    searched for weights that are not finite. A check fails if `Run.load` would fail or load older weights; a damaged
    checkpoint that is not needed, an incomplete last line and an unexpected file are warnings.

    Arguments:
        run: a `Run`, its folder, its name (for the newest run), `name/id`, or "latest".
        root: folder in which runs are looked up by name.
        data: also read the data, compare their fingerprint, and compute the recorded validation metrics again: they are
            bit-identical on the same host with the same threads, else equal within `ELBO_TOLERANCE`.
        data_dir: folder in which data files are looked for first.

    Returns:
        Results of the checks, one or more for each file; `facts["loads"]` is the name of the checkpoint that would be
        loaded, or None.

    Raises:
        DeclarationError: there is no such run.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> checks = pvae.verify(run)
        >>> checks.ok, checks.facts["loads"]
        (True, 'step-00000002')
        >>> runs.cleanup()
    """
    opened = (
        run if isinstance(run, Run) else Run(_directory(run, Path(root)), data_dir=Path(data_dir) if data_dir else None)
    )
    look = _Inspection(opened)
    checks = [check for name, ask in look.asked(data) for check in attempt(name, ask)]
    loads = look.saved.path.name if look.saved else None
    return Checks(f"run {opened.path}", tuple(checks), {"run": str(opened.path), "loads": loads})


def _directory(path: str | Path, root: Path) -> RunDirectory:
    """Return the directory of a run; also a folder with files of a run but without its manifest."""
    where = Path(path)
    lost = not os.path.lexists(where / "manifest.json")
    if lost and any(os.path.lexists(where / name) for name in ("spec.toml", "status.json", "checkpoints")):
        return RunDirectory(where.resolve())
    return RunDirectory.open(path, root)


class _Inspection:
    """Checks of one run; the status, pair and checkpoint that a check reads are used by the checks after it."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.path
        self.saved: checkpoint.Checkpoint | None = None
        self.status: Mapping[str, Any] = {}
        self.pair: Pair | None = None

    def asked(self, data: bool) -> Iterator[tuple[str, Any]]:
        """Yield the names of all checks of a run with their functions, in order; that of the data only if `data`."""
        yield "manifest.json", self.manifest
        yield "spec.toml", self.spec
        yield "status.json", self.state
        yield "metrics.jsonl", partial(self.lines, "metrics.jsonl")
        yield "events.jsonl", partial(self.lines, "events.jsonl")
        yield "pair", self.build
        yield "checkpoints", self.checkpoints
        yield "analysis", partial(folder.analyses, self.path)
        yield "files", lambda: folder.strangers(self.path, self._live)  # when the status is known
        if data:
            yield "data", self.data

    def manifest(self) -> Iterator[Check]:
        """Yield the check of manifest.json: name, id and start time are strings, and the data are described."""
        found = self.run.files.manifest
        for key in ("name", "id", "started"):
            if not isinstance(found.get(key), str):
                raise DataError(f"{self.path / 'manifest.json'}: expected text for {key!r}; got {found.get(key)!r}.")
        if "data" not in found:
            yield Check("manifest.json", "warning", "the fit was stopped before it said what its data are", "Fit anew.")
            return
        _shape(found)
        yield Check("manifest.json", "ok", f"{found['name']}, started {found['started']}")

    def spec(self) -> Iterator[Check]:
        """Yield the check of spec.toml: it parses, round-trips, was not edited, and agrees with the manifest."""
        plan = self.run.plan
        text = plan.to_toml()
        if type(plan).from_toml(text, "spec.toml") != plan:
            raise DataError(
                f"{self.path / 'spec.toml'}: expected a declaration that round-trips; got another. Report it."
            )
        manifest = self.run.files.manifest
        for key, found in (("seed", plan.seed), ("name", plan.name)):
            if key in manifest and manifest[key] != found:
                raise DataError(
                    f"{self.path / 'spec.toml'}: expected {key} = {manifest[key]!r}, as in the manifest; got {found!r}."
                    " Put back what was edited."
                )
        if text != self.run.files.spec_text:
            yield Check("spec.toml", "warning", "not as it was written: edited, or of another version of pvae")
        else:
            yield Check("spec.toml", "ok", f"declaration {plan.name}")

    def state(self) -> Iterator[Check]:
        """Yield the check of status.json: its state is known, its process is alive, and no write failed."""
        self.status = self.run.files.status()
        state = self.status.get("state", "created")
        if state not in (*RUN_STATES, "created"):
            raise DataError(f"{self.path / 'status.json'}: expected a state of {', '.join(RUN_STATES)}; got {state!r}.")
        said = f"{state}, epoch {self.status.get('epoch', 0)} of {self.status.get('epochs', '?')}"
        if state == "running" and not self._live:
            yield Check("status.json", "warning", f"{said}, but its process is gone", "Go on with pvae resume.")
        elif "degraded" in self.status:
            yield Check("status.json", "warning", f"{said}; degraded: {self.status['degraded']}")
        else:
            yield Check("status.json", "ok", said)

    @property
    def _live(self) -> bool:
        return self.status.get("state") == "running" and not is_stale(self.status)

    @property
    def _trained(self) -> bool:
        epoch = self.status.get("epoch")
        return isinstance(epoch, int) and epoch > 0

    def lines(self, name: str) -> Iterator[Check]:
        """Yield the check of a JSON lines file: all lines are valid; an incomplete last line is a warning."""
        if not os.path.lexists(self.path / name):
            level: Level = "failed" if name == "metrics.jsonl" and self._trained else "ok"
            yield Check(
                name, level, f"missing after {self.status.get('epoch')} epochs" if level == "failed" else "none"
            )
            return
        rows = read_lines(self.path, name)
        content = read_inside(self.path, name, 1 << 31)
        torn = len([line for line in content.split(b"\n") if line.strip()]) - len(rows)
        if torn and not self._live:
            yield Check(name, "warning", f"{len(rows)} rows, and a torn last line, which readers drop")
        else:
            yield Check(name, "ok", f"{len(rows)} rows")

    def checkpoints(self) -> Iterator[Check]:
        """Yield a check of every checkpoint, newest first; the first readable one is that which `Run.load` loads."""
        folder = self.path / "checkpoints"
        if folder.is_symlink():  # found by `strangers`
            return
        found = [
            check
            for path in checkpoint.newest_first(folder)
            for check in attempt(f"checkpoints/{path.name}", partial(self._checkpoint, path))
        ]
        yield from found or [self._without()]

    def _without(self) -> Check:
        state = self.status.get("state", "created")
        level: Level = "failed" if state == "finished" else "ok" if self._live else "warning"
        return Check("checkpoints", level, f"none; the run is {state}", "" if level == "ok" else "Fit anew.")

    def _checkpoint(self, path: Path) -> Iterator[Check]:
        """Yield the check of one checkpoint; nothing if a fit in progress has removed it meanwhile."""
        name, needed = f"checkpoints/{path.name}", self.saved is None
        level: Level = "failed" if needed else "warning"
        try:
            saved = checkpoint.read(path)
        except CheckpointError as problem:
            if os.path.lexists(path):
                advice = "The next older one is loaded in its place." if needed else "A newer one is loaded."
                yield Check(name, level, str(problem), advice, {"reads": False})
            return
        if needed:
            self.saved = saved
        facts = {"reads": True, "loads": needed, "step": saved.step}
        if problems := list(weights.unsound(saved, self.pair)):
            advice = "Its bytes are as they were written: the declaration was edited, or the fit went wrong."
            yield Check(name, level, "; ".join(problems), advice, facts)
        elif foreign := weights.foreign_files(saved):
            yield Check(
                name, "warning", f"holds foreign files: {', '.join(foreign[: weights.LISTED_TENSORS])}", facts=facts
            )
        else:
            yield Check(name, "ok", f"step {saved.step}{', would be loaded' if needed else ''}", facts=facts)

    def build(self) -> Iterator[Check]:
        """Yield a check that model and guide can be built; checkpoints are compared with their names and shapes."""
        plan = self.run.plan
        if isinstance(plan, Experiment):
            self.pair = plan.build(_shape(self.run.files.manifest))
        elif self.run._given_pair is not None:
            self.pair = self.run.fresh_pair()
        if self.pair is None:
            advice = "Pass pvae.verify a Run that has its pair."
            yield Check("pair", "ok", "written by hand, and not at hand: names and shapes are not compared", advice)
        else:
            yield Check("pair", "ok", f"{sum(p.numel() for p in self.pair.parameters())} parameters")

    def data(self) -> Iterator[Check]:
        """Yield checks of the data's fingerprint, and of the validation metrics of the weights against the recorded."""
        plan = self.run.plan
        passed = not isinstance(plan, Experiment) or isinstance(plan.data, TensorSource | FrameSource)
        if self.run._given_data is None and passed:
            yield Check("data", "ok", "passed in Python, and not at hand", "Pass pvae.verify a Run that has its data.")
            return
        yield Check("data", "ok", f"fingerprint {self.run.data.fingerprint[:16]}")
        yield from attempt("elbo", partial(weights.elbo, self.run, self.saved))


def _shape(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a datum that a run's manifest records; raises DataError if it is invalid."""
    data = manifest.get("data")
    shape = data.get("shape") if isinstance(data, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and 0 < n <= 1 << 24 for n in shape):
        raise DataError(f"manifest.json: expected the shape of a datum in data.shape; got {shape!r}.")
    return tuple(shape)
