"""Command `verify`: check of every file of a run."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pvae.errors import CheckpointError, DataError, instead, refuse
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs import RunDirectory, checkpoint, find, rundir, seal, state_of
from pvae.runs.run import Run
from pvae.training.launch import changed_keys, own_plan
from pvae.upkeep import weights
from pvae.util.checks import Check, Checks, Level, attempt
from pvae.util.files import MIB, digest, read_inside, read_lines, walk

FILES = ("manifest.json", "spec.toml", rundir.TRANSFORMS, "status.json", "metrics.jsonl", "events.jsonl", ".lock")
FOLDERS = ("checkpoints", "analysis", "report", "exports")
LISTED_FILES = 20
"""Largest number of unexpected files that are listed by name; any others are only counted."""
_DIGEST = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)\n?\Z")


Place = str | Path


def verify(run: Run | Place, *, root: Place = "runs", data: bool = False, data_dir: Place | None = None) -> Checks:
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
    where = Path(data_dir) if data_dir else None
    opened = run if isinstance(run, Run) else Run(_directory(run, Path(root)), data_dir=where)
    look = _Inspection(opened)
    checks = [check for name, ask in look.asked(data).items() for check in attempt(name, ask)]
    facts = {"run": str(opened.path), "loads": look.saved.path.name if look.saved else None}
    return Checks(f"run {opened.path}", tuple(checks), facts)


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

    def asked(self, data: bool) -> dict[str, Any]:
        """Return the functions of all checks of a run by name, in order; that of the data only if `data`."""
        lines = {name: partial(self.lines, name) for name in ("metrics.jsonl", "events.jsonl")}
        asked = {"manifest.json": self.manifest, "spec.toml": self.spec, "status.json": self.state, **lines}
        asked |= {"pair": self.build, "checkpoints": self.checkpoints}
        asked |= {"analysis": partial(_analyses, self.path / "analysis"), "files": self.strangers}
        return {**asked, "data": self.data} if data else asked

    def manifest(self) -> Iterator[Check]:
        """Yield the check of manifest.json: name, id and start time are strings; data and transforms are described."""
        if missing := {"name", "id", "started"} - (found := self.run.files.manifest).keys():
            raise DataError(f"{self.path / 'manifest.json'}: expected {' and '.join(sorted(missing))}; got none.")
        if "data" not in found:
            yield Check("manifest.json", "warning", "the fit was stopped before it said what its data are", "Fit anew.")
            return
        _ = self.run.shape, self.run.transforms if "transforms" in found else None
        refuse(lines := seal.edits(self.run.files), "upkeep.verify.edits", path=self.path, lines=lines)
        told = "" if "spec" in found else "; not sealed (of an earlier version): edits of the run are not seen"
        yield Check("manifest.json", "ok", f"{found['name']}, started {found['started']}{told}")

    def spec(self) -> Iterator[Check]:
        """Yield the check of spec.toml: it parses, round-trips, was not edited, and agrees with the manifest."""
        plan, where = self.run.plan, self.path / "spec.toml"
        refuse(type(plan).from_toml(plan.to_toml(), "spec.toml") != plan, "upkeep.verify.other_plan", where=where)
        manifest = self.run.files.manifest
        for key, found in (("seed", plan.seed), ("name", plan.name)):
            if key in manifest and manifest[key] != found:
                raise DataError.of("upkeep.verify.other_key", where=where, key=key, wanted=manifest[key], found=found)
        refuse(lines := changed_keys(own_plan(self.run), plan).values(), "upkeep.verify.edits", path=where, lines=lines)
        own = self.run.files.spec_is_own()
        found = f"declaration {plan.name}" if own else "not as it was written: edited"
        yield Check("spec.toml", "ok" if own else "warning", found)

    def state(self) -> Iterator[Check]:
        """Yield the check of status.json: its state is known, its process is alive, and no write failed."""
        self.status = self.run.files.status()
        state = state_of(self.run.files, self.status)
        said = f"{state}, epoch {self.status.get('epoch', 0)} of {self.status.get('epochs', '?')}"
        if state == "running" and not self._live:
            yield Check("status.json", "warning", f"{said}, but its process is gone", "Go on with pvae resume.")
        elif "degraded" in self.status:
            yield Check("status.json", "warning", f"{said}; degraded: {self.status['degraded']}")
        else:
            yield Check("status.json", "ok", said)

    @property
    def _live(self) -> bool:
        return self.status.get("state") == "running" and not find.is_stale(self.status)

    def lines(self, name: str) -> Iterator[Check]:
        """Yield the check of a JSON lines file: all lines are valid; an incomplete last line is a warning."""
        if not os.path.lexists(self.path / name):
            epoch = self.status.get("epoch")
            lost = name == "metrics.jsonl" and isinstance(epoch, int) and epoch > 0
            yield Check(name, "failed" if lost else "ok", f"missing after {epoch} epochs" if lost else "none")
            return
        rows = read_lines(self.path, name)
        written = [line for line in read_inside(self.path, name, 1 << 31).split(b"\n") if line.strip()]
        torn = ", and a torn last line, which readers drop" if len(written) > len(rows) and not self._live else ""
        yield Check(name, "warning" if torn else "ok", f"{len(rows)} rows{torn}")

    def checkpoints(self) -> Iterator[Check]:
        """Yield a check of every checkpoint, newest first; the first readable one is that which `Run.load` loads."""
        if (folder := self.path / "checkpoints").is_symlink():  # found by `strangers`
            return
        found: list[Check] = []
        for path in checkpoint.newest_first(folder):
            found += attempt(f"checkpoints/{path.name}", partial(self._checkpoint, path))
        yield from found
        if not found:
            state = self.status.get("state", "created")
            level: Level = "failed" if state == "finished" else "ok" if self._live else "warning"
            yield Check("checkpoints", level, f"none; the run is {state}", "" if level == "ok" else "Fit anew.")

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
        own = {"manifest.json", "state.json", *(f"{group}.safetensors" for group in saved.tensors)}
        facts = {"reads": True, "loads": needed, "step": saved.step}
        if problems := list(weights.unsound(saved, self.pair)):
            advice = "Its bytes are as they were written: the declaration was edited, or the fit went wrong."
            yield Check(name, level, "; ".join(problems), advice, facts)
        elif foreign := sorted(set(os.listdir(path)) - own):
            yield Check(name, "warning", f"holds foreign files: {', '.join(foreign[:LISTED_FILES])}", facts=facts)
        else:
            yield Check(name, "ok", f"step {saved.step}{', would be loaded' if needed else ''}", facts=facts)

    def build(self) -> Iterator[Check]:
        """Yield a check that model and guide can be built; checkpoints are compared with their names and shapes."""
        plan = self.run.plan
        if isinstance(plan, Experiment):
            self.pair = plan.build(self.run.shape).to("cpu", plan.objective.dtype)
        elif self.run._given_pair is not None:
            self.pair = self.run.fresh_pair()
        if self.pair is None:
            advice = "Pass pvae.verify a Run that has its pair."
            yield Check("pair", "ok", "written by hand, and not at hand: names and shapes are not compared", advice)
        else:
            yield Check("pair", "ok", f"{sum(p.numel() for p in self.pair.parameters())} parameters")

    def data(self) -> Iterator[Check]:
        """Yield checks of the data's fingerprint, and of the validation metrics of the weights against the recorded."""
        if self.run.lacks_data:
            yield Check("data", "ok", "passed in Python, and not at hand", "Pass pvae.verify a Run that has its data.")
            return
        yield Check("data", "ok", f"fingerprint {self.run.data.fingerprint[:16]}")
        yield from attempt("elbo", partial(weights.elbo, self.run, self.saved))

    def strangers(self) -> Iterator[Check]:
        """Yield checks of unexpected files in a run's folder: links, devices, files not written by pvae.

        Temporary files of interrupted writes are reported unless the run is being fitted.
        """
        left = set(find.leftovers(self.path))
        found = [check for entry in walk(self.path) for check in self._stranger(entry, Path(entry.path) in left)]
        yield from found[:LISTED_FILES]
        if len(found) > LISTED_FILES:
            yield Check("files", "warning", f"{len(found) - LISTED_FILES} more that are no part of a run")
        if not found:
            yield Check("files", "ok", "no links, nothing foreign, nothing left by an interrupted write")

    def _stranger(self, entry: os.DirEntry[str], is_left: bool) -> Iterator[Check]:
        where = Path(entry.path).relative_to(self.path)
        name, own = str(where), where.parts[0] in (*FILES, "checkpoints") or str(where) in FOLDERS
        if not entry.is_dir(follow_symlinks=False) and not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            kind = f"a link to {os.readlink(entry.path)}" if entry.is_symlink() else "a device, pipe or socket"
            yield Check(name, "failed" if own else "warning", kind, "Remove it: pvae follows no links in a run.")
        elif is_left:
            if not self._live:
                yield Check(name, "warning", "left by an interrupted write", "See pvae clean.")
        elif entry.name.startswith(".old-"):
            yield Check(name, "warning", "set aside, and not replaced", "pvae resume gives it its name back.")
        elif len(where.parts) == 1 and entry.name not in (*FILES, *FOLDERS):
            yield Check(name, "warning", "not of pvae", "Keep files of your own elsewhere.")


def _analyses(folder: Path) -> Iterator[Check]:
    """Yield checks of a run's analysis files: those with a `.sha256` file against it, JSON files for validity."""
    count = 0
    for path in [] if folder.is_symlink() else sorted(folder.glob("*")):
        if check := {".sha256": _compare_digest, ".json": _parse_json}.get(path.suffix):
            found = attempt(f"analysis/{path.name}", partial(check, path))
            count += not found
            yield from found
    yield Check("analysis", "ok", f"{count} files as they were written")


def _compare_digest(path: Path) -> None:
    """Raise DataError if the file that a `.sha256` file names differs from it."""
    if (found := _DIGEST.match(read_inside(path.parent, path.name, 1 << 16).decode(errors="replace"))) is None:
        raise DataError(f"{path}: expected a line of sha256sum; got another. Export the file again.")
    if (now := digest(read_inside(path.parent, found[2], 1 << 40))) != found[1]:
        raise DataError(f"{path.parent / found[2]}: expected SHA-256 {found[1]}; got {now}. Export it again.")


def _parse_json(path: Path) -> None:
    """Raise DataError if a file is not JSON."""
    with instead((ValueError, RecursionError), f"{path}: expected JSON; got {{problem}}. Run the analysis again."):
        json.loads(read_inside(path.parent, path.name, 64 * MIB))
