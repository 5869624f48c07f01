"""Is every file of a run what it should be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.data.sources.python import TensorSource
from pvae.data.sources.tabular import FrameSource
from pvae.errors import CheckpointError, DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.owner import is_stale
from pvae.runs.run import Run, chosen, load_weights
from pvae.runs.rundir import RUN_STATES, RunDirectory
from pvae.training.diagnose import bad_weights
from pvae.training.evaluation import evaluate
from pvae.training.trainer import State
from pvae.util.checks import Check, Checks, Level, attempt
from pvae.util.files import MIB, read_inside, read_lines, walk
from pvae.util.provenance import provenance

FILES = ("manifest.json", "spec.toml", "status.json", "metrics.jsonl", "events.jsonl", ".lock")
FOLDERS = ("checkpoints", "analysis", "report")
TEMPORARY = (".tmp-", ".old-")
TOLERANCE = 1e-4
"""Nats per datum, relative to the larger of the figure and one nat, that a recomputed ELBO may be off: another number
of threads, another build of torch, another processor add up in another order."""
SHOWN = 20
_DIGEST = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)\n?\Z")


def verify(
    run: Run | str | Path, *, root: str | Path = "runs", data: bool = False, data_dir: str | Path | None = None
) -> Checks:
    """Look at every file of a run; writes nothing, also where the run is at work.

    Every checkpoint is read (SHA-256 and schema), compared with the names and shapes of the declaration, and searched
    for weights that are not finite. What would stop `Run.load`, or make it load older weights, has failed; a damaged
    checkpoint that is not needed, a torn last line, a foreign file is a warning.

    Arguments:
        run: a `Run`, its folder, its name (the newest), `name/id`, or "latest".
        root: where runs are looked up by name.
        data: also read the data, compare their fingerprint, and compute the recorded validation figures again: the
            same bits on the same host with the same threads, else to `TOLERANCE`.
        data_dir: where to look for data first.

    Returns:
        Checks, one or more for each file; `facts["loads"]` names the checkpoint that would be loaded, or is None.

    Raises:
        DeclarationError: there is no such run.
    """
    opened = (
        run if isinstance(run, Run) else Run(_directory(run, Path(root)), data_dir=Path(data_dir) if data_dir else None)
    )
    look = _Look(opened)
    checks = [check for name, ask in look.asked(data) for check in attempt(name, ask)]
    loads = look.saved.path.name if look.saved else None
    return Checks(f"run {opened.path}", tuple(checks), {"run": str(opened.path), "loads": loads})


def _directory(path: str | Path, root: Path) -> RunDirectory:
    """The run; also a folder that has lost its manifest."""
    folder = Path(path)
    lost = not os.path.lexists(folder / "manifest.json")
    if lost and any(os.path.lexists(folder / name) for name in ("spec.toml", "status.json", "checkpoints")):
        return RunDirectory(folder.resolve())
    return RunDirectory.open(path, root)


class _Look:
    """One look at a run; later checks use what earlier ones have read."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.path
        self.saved: checkpoint.Checkpoint | None = None
        self.status: Mapping[str, Any] = {}
        self.pair: Pair | None = None

    def asked(self, data: bool) -> Iterator[tuple[str, Any]]:
        """Name and check, in their order."""
        yield "manifest.json", self.manifest
        yield "spec.toml", self.spec
        yield "status.json", self.state
        yield "metrics.jsonl", partial(self.lines, "metrics.jsonl")
        yield "events.jsonl", partial(self.lines, "events.jsonl")
        yield "pair", self.build
        yield "checkpoints", self.checkpoints
        yield "analysis", self.analyses
        yield "files", self.strangers
        if data:
            yield "data", self.data

    # -- texts

    def manifest(self) -> Iterator[Check]:
        """Name, id and start are text; what the data were is there."""
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
        """The declaration parses, round-trips, and is that of the manifest."""
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
        """The status reads; a run whose process is gone, or that could not write, is told."""
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
        """Every line reads; a torn last one is dropped by all readers."""
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

    # -- checkpoints

    def checkpoints(self) -> Iterator[Check]:
        """Every checkpoint, newest first: the first that reads is the one that is loaded."""
        folder = self.path / "checkpoints"
        if folder.is_symlink():  # told by `strangers`
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
        """What there is to say of one; nothing of one that a live run has removed since."""
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
        if problems := list(_unsound(saved, self.pair)):
            advice = "Its bytes are as they were written: the declaration was edited, or the fit went wrong."
            yield Check(name, level, "; ".join(problems), advice, facts)
        elif foreign := _foreign(saved):
            yield Check(name, "warning", f"holds foreign files: {', '.join(foreign[:SHOWN])}", facts=facts)
        else:
            yield Check(name, "ok", f"step {saved.step}{', would be loaded' if needed else ''}", facts=facts)

    def build(self) -> Iterator[Check]:
        """The pair that checkpoints are compared with, before any weights, and without reading data."""
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

    # -- the rest of the folder

    def analyses(self) -> Iterator[Check]:
        """Every file of an analysis that has a checksum beside it, and every JSON file."""
        folder = self.path / "analysis"
        names = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else []
        count = 0
        for name in [n for n in names if n.endswith((".sha256", ".json"))]:
            check = _digest if name.endswith(".sha256") else _json
            found = attempt(f"analysis/{name}", partial(check, folder, name))
            count += not found
            yield from found
        yield Check("analysis", "ok", f"{count} files as they were written")

    def strangers(self) -> Iterator[Check]:
        """Links, devices, foreign files, and what interrupted writes have left."""
        found = [check for entry in walk(self.path) if (check := self._stranger(entry)) is not None]
        yield from found[:SHOWN]
        if len(found) > SHOWN:
            yield Check("files", "warning", f"{len(found) - SHOWN} more that are no part of a run")
        if not found:
            yield Check("files", "ok", "no links, nothing foreign, nothing left by an interrupted write")

    def _stranger(self, entry: os.DirEntry[str]) -> Check | None:
        where = Path(entry.path).relative_to(self.path)
        own = where.parts[0] in FILES or where.parts[0] == "checkpoints" or str(where) in FOLDERS
        if not entry.is_dir(follow_symlinks=False) and not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            what = f"a link to {os.readlink(entry.path)}" if entry.is_symlink() else "a device, pipe or socket"
            return Check(str(where), "failed" if own else "warning", what, "Remove it: pvae follows no links in a run.")
        if entry.name.startswith(TEMPORARY):
            return (
                None if self._live else Check(str(where), "warning", "left by an interrupted write", "See pvae clean.")
            )
        if len(where.parts) == 1 and entry.name not in (*FILES, *FOLDERS):
            return Check(str(where), "warning", "not of pvae", "Keep what is yours elsewhere.")
        return None

    # -- the data

    def data(self) -> Iterator[Check]:
        """The data are those of the fit, and the weights make the recorded figures of them."""
        plan = self.run.plan
        passed = not isinstance(plan, Experiment) or isinstance(plan.data, TensorSource | FrameSource)
        if self.run._given_data is None and passed:
            yield Check("data", "ok", "passed in Python, and not at hand", "Pass pvae.verify a Run that has its data.")
            return
        yield Check("data", "ok", f"fingerprint {self.run.data.fingerprint[:16]}")
        yield from attempt("elbo", self.elbo)

    def elbo(self) -> Iterator[Check]:
        """The recorded validation figures, computed again from the weights that would be loaded."""
        device = str(self.run.files.manifest.get("device", "cpu"))
        if self.saved is None:
            yield Check("elbo", "ok", "not computed: there are no weights")
        elif device.startswith("cuda") and not torch.cuda.is_available():
            yield Check("elbo", "ok", "not computed: the fit was on a GPU, whose draws a CPU does not make")
        elif (recorded := _recorded(self.run.files.metrics_rows(), self.saved)) is None:
            yield Check("elbo", "ok", "not computed: no validation was recorded of these weights")
        else:
            yield self._same(recorded, self._measured(device, self.saved), device)

    def _measured(self, device: str, saved: checkpoint.Checkpoint) -> dict[str, float]:
        plan, pair = self.run.plan, self.run.fresh_pair()
        load_weights(pair, chosen(saved), str(saved.path))
        pair = pair.to(torch.device(device), plan.objective.dtype).eval()
        data = self.run.data.to(device)
        x, fitted = data.validation.rows, len(data.train)
        return plan.objective.measure(pair, x, plan.seed) or evaluate(pair, x, plan.seed, fitted)

    def _same(self, recorded: Mapping[str, Any], measured: Mapping[str, float], device: str) -> Check:
        names = [name for name in measured if isinstance(recorded.get(name), float)]
        off = {name: abs(measured[name] - recorded[name]) for name in names}
        wrong = [name for name in names if not off[name] <= TOLERANCE * max(1.0, abs(recorded[name]))]
        facts = {name: {"recorded": recorded[name], "computed": measured[name]} for name in names}
        if wrong:
            told = ", ".join(f"{name} {recorded[name]:.6f} recorded, {measured[name]:.6f} computed" for name in wrong)
            advice = "Weights, declaration or data are not those that were measured; fit anew."
            return Check("elbo", "failed", told, advice, facts)
        unit = " nats per datum" if "elbo" in names else ""
        first = f"{names[0]} {recorded[names[0]]:.6f}{unit}" if names else "nothing"
        largest = max(off.values(), default=0.0)
        how = (
            "the same bits" if not largest else f"within {TOLERANCE:g}, off by {largest:.1e}: {self._elsewhere(device)}"
        )
        return Check("elbo", "ok", f"{first}, as recorded for validation: {how}", facts=facts)

    def _elsewhere(self, device: str) -> str:
        """Why bits may differ."""
        there, here = self.run.files.manifest, {**provenance(), "threads": torch.get_num_threads()}
        keys = [key for key in ("host", "threads", "versions") if there.get(key) != here[key]]
        return f"other {' and '.join(keys)}" if keys else f"same host, threads and versions ({device})"


def _shape(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a datum that a manifest tells; raises DataError."""
    data = manifest.get("data")
    shape = data.get("shape") if isinstance(data, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and 0 < n <= 1 << 24 for n in shape):
        raise DataError(f"manifest.json: expected the shape of a datum in data.shape; got {shape!r}.")
    return tuple(shape)


def _unsound(saved: checkpoint.Checkpoint, pair: Pair | None) -> Iterator[str]:
    """What is wrong with a checkpoint whose bytes are right: names, shapes, numbers, state."""
    weights = saved.tensors.get("weights")
    if weights is None:
        yield f"expected a group of weights; got {', '.join(saved.tensors) or 'none'}"
        return
    for group in [name for name in ("weights", "best", "average") if name in saved.tensors]:
        try:
            bad = _bad(group, {**weights, **saved.tensors[group]}, pair)
            yield from (f"{group}: {name} is not finite" for name in bad[:SHOWN])
        except CheckpointError as problem:
            yield str(problem)
    bad = _bad("optimizer", saved.tensors.get("optimizer", {}), None)
    yield from (f"optimizer: {name} is not finite" for name in bad[:SHOWN])
    if str(saved.state.get("select", "weights")) not in saved.tensors:
        yield f"expected the weights {saved.state['select']!r}, as state.json selects; got {', '.join(saved.tensors)}"
    unknown = saved.state.keys() - {"select", *(field.name for field in fields(State))}
    if unknown:
        yield f"state.json: expected what a fit keeps; got also {', '.join(sorted(unknown))}"


def _bad(group: str, tensors: Mapping[str, Tensor], pair: Pair | None) -> list[str]:
    """Names of tensors that are not finite; where there is a pair, of its parameters alone, once it has taken them."""
    if pair is None:
        floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
        return [name for name, value in floating.items() if not bool(value.double().isfinite().all())]
    load_weights(pair, tensors, group)
    return bad_weights(pair)


def _foreign(saved: checkpoint.Checkpoint) -> list[str]:
    """What lies in a checkpoint's folder and is not of it."""
    own = {"manifest.json", "state.json", *(f"{group}.safetensors" for group in saved.tensors)}
    return sorted(set(os.listdir(saved.path)) - own)


def _recorded(rows: Iterable[Mapping[str, Any]], saved: checkpoint.Checkpoint) -> Mapping[str, Any] | None:
    """The validation row of the weights that a run stands for: of the best epoch, or of the checkpoint's step."""
    best = saved.state.get("select") == "best"
    key, value = ("epoch", saved.state.get("best_epoch")) if best else ("step", saved.step)
    found = [row for row in rows if row.get("split") == "validation" and row.get(key) == value]
    return found[-1] if found else None


def _digest(folder: Path, name: str) -> Iterator[Check]:
    """A file is what its checksum says: nothing; else a failed check."""
    found = _DIGEST.match(read_inside(folder, name, 1 << 16).decode(errors="replace"))
    if found is None:
        raise DataError(f"{folder / name}: expected a line of sha256sum; got another. Export the file again.")
    digest = hashlib.sha256(read_inside(folder, found[2], 1 << 40)).hexdigest()
    if digest != found[1]:
        raise DataError(f"{folder / found[2]}: expected SHA-256 {found[1]}; got {digest}. Export it again.")
    yield from ()


def _json(folder: Path, name: str) -> Iterator[Check]:
    """A file is JSON: nothing; else a failed check."""
    try:
        json.loads(read_inside(folder, name, 64 * MIB))
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{folder / name}: expected JSON; got {problem}. Run the analysis again.") from problem
    yield from ()
