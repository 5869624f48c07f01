"""Export of a run to a tracker, after the fit or while it is fitted."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from pvae.errors import PvaeError, StorageError, misdeclared, near, printable, refuse, require_extra, text
from pvae.runs.export import base, trackers
from pvae.runs.rundir import RunDirectory
from pvae.util import follows

SECONDS_BETWEEN_EXPORTS = 5.0
"""Shortest time (s) between two exports during a fit; a slow export is followed by a pause ten times as long."""

WATCH: ContextVar[Callable[[Mapping[str, Any]], None]] = ContextVar("watch", default=lambda _row: None)
"""Function that is called with each row of metrics of a fit."""
KINDS: Mapping[str, type[base.Exporter]] = {cls.kind: cls for cls in (trackers.TensorBoard, trackers.MLflow)}


def require(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return names of exporters (`tensorboard`, `mlflow`) without duplicates, after checking that each is available.

    Raises:
        DeclarationError: an exporter is unknown.
        MissingExtraError: the package of an exporter is not installed.
    """
    asked = tuple(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    for kind in asked:
        misdeclared(kind not in KINDS, "runs.export.kind", kinds=KINDS, kind=kind, hint=near(str(kind), KINDS))
        require_extra(package := KINDS[kind].package, kind, f"export: expected {package}, which exports to {kind}")
    return asked


def remembered(files: RunDirectory, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the exporters used for a run before and those requested now, and record them in the run's manifest."""
    manifest = files.manifest
    before = [str(kind) for kind in manifest.get("exports", [])]
    if list(kinds := tuple(dict.fromkeys([*before, *asked]))) != before:
        files.write_manifest({**manifest, "exports": list(kinds)})
    return kinds


def export(files: RunDirectory, kind: str) -> str:
    """Export a run that no process is fitting; values that were exported before are kept.

    Arguments:
        files: directory of the run, finished or not.
        kind: name of the exporter, `tensorboard` or `mlflow`.

    Returns:
        Description of the export's place.

    Raises:
        DeclarationError: the exporter is unknown.
        MissingExtraError: the exporter's package is not installed.
        BusyError: a process is fitting the run.
        DataError: the run's files are damaged.
        StorageError: the export cannot be written.
    """
    require([kind])
    with files.held():
        try:
            return KINDS[kind](files).close()
        except PvaeError:
            raise
        except Exception as error:
            raise StorageError(f"Expected to export {files.path} to {kind}; got {brief(error)}. Try again.") from error


@contextmanager
def exporting(files: RunDirectory, kinds: Sequence[str], *, show: bool) -> Iterator[None]:
    """Export a run every few seconds while the code of the `with` block fits it, and once more at the end.

    An exporter that fails causes one alert and is not used again; its errors never stop the fit.

    Arguments:
        files: directory of the run, locked by this process.
        kinds: names of the exporters to use; an unknown one causes an alert.
        show: True to print alerts on standard error, too.
    """
    exporters: dict[str, base.Exporter] = {}

    def attempt(kind: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            exporters.pop(kind, None)
            message = text("runs.export.failed", kind=kind, error=brief(error))
            files.log_event("alert", message)
            if show:
                print(printable(f"pvae: {message}"), file=sys.stderr, flush=True)

    def make(kind: str) -> None:
        refuse(kind not in KINDS, f"no exporter of that name, only {', '.join(KINDS)}")
        exporters[kind] = KINDS[kind](files)

    due = time.monotonic() + SECONDS_BETWEEN_EXPORTS

    def catch_up(row: Mapping[str, Any]) -> None:
        nonlocal due
        WATCH.get()(row)
        if (begun := time.monotonic()) < due:
            return
        for kind, exporter in list(exporters.items()):
            attempt(kind, exporter.catch_up)
        now = time.monotonic()
        due = now + max(SECONDS_BETWEEN_EXPORTS, 10 * (now - begun))

    for kind in kinds if not follows() else ():
        attempt(kind, partial(make, kind))
    files.on_metrics = catch_up
    try:
        yield
    finally:
        files.on_metrics = lambda _row: None
        for kind, exporter in list(exporters.items()):
            attempt(kind, exporter.close)


def brief(error: Exception) -> str:
    """Return the class of an error and the first line of its message, without passwords in addresses."""
    first = (str(error).splitlines() or [""])[0]
    return trackers.without_secrets(f"{type(error).__name__}: {first}"[:300].rstrip(". "))
