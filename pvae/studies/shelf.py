"""Search for the runs of a study by the digest of their declaration, whatever their names."""

from contextlib import suppress
from pathlib import Path

from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.runs import checkpoint
from pvae.runs.find import begun, folders, is_stale
from pvae.runs.rundir import RunDirectory
from pvae.studies.cases import Case

RANKS = ("finished", "held", "stopped")
"""States of a run that can serve a case, in order of preference; see `standing`."""


def standing(run: RunDirectory) -> str:
    """Return the state of a run: finished, held (a process works on it), stopped (resumable), or void (not usable).

    Raises:
        DataError: its files are damaged.
    """
    manifest, status = run.manifest, run.status()
    if status.get("state") == "finished":
        return "finished"
    if status.get("state") == "running" and not is_stale(status):
        return "held"
    begun = manifest.get("parent") is None or checkpoint.newest_first(run.path / "checkpoints")
    return "stopped" if "engine" in manifest and begun else "void"


class Shelf:
    """Index of the runs below a folder by their declarations; a run whose files are damaged is ignored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[tuple[Path, int], tuple[str, tuple[str, object] | None]] = {}

    def best(self, case: Case) -> RunDirectory | None:
        """Return the run of a case: the newest finished one, else the newest held or stopped one, else None.

        The run of a second stage must name, as its parent, the run of the first stage and the epoch at which it ended.
        """
        parent: tuple[str, object] | None = None
        if case.parent is not None:
            first = self.best(case.parent)
            if first is None or standing(first) != "finished":
                return None
            parent = first.id, first.status().get("epoch")
        found: dict[str, RunDirectory] = {}
        matching = []
        for run in (RunDirectory(path) for name in folders(self.root) for path in folders(name)):
            with suppress(DataError, DeclarationError):
                if self._declared(run) == (case.digest, parent):
                    matching.append(run)
        for run in sorted(matching, key=lambda run: begun(run.path), reverse=True):
            with suppress(DataError):
                found.setdefault(standing(run), run)
        return next((found[state] for state in RANKS if state in found), None)

    def _declared(self, run: RunDirectory) -> tuple[str, tuple[str, object] | None]:
        """Return the digest of a run's declaration and the parent in its manifest.

        Cached until the declaration file changes.
        """
        try:
            age = (run.path / "spec.toml").lstat().st_mtime_ns
        except OSError:
            return "", None
        if (run.path, age) not in self.known:
            manifest = run.manifest
            if manifest.get("declared") is not True:  # a pair written by hand, or a run that has not begun
                return "", None
            digest = Experiment.from_toml(run.spec_text).digest()
            self.known[run.path, age] = digest, run.parent
        return self.known[run.path, age]
