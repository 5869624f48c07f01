"""Checkpoints: folders of safetensors and JSON files, written atomically and verified by SHA-256 when read.

A checkpoint ``step-00001234/`` contains ``<group>.safetensors``, ``state.json``, and ``manifest.json`` with the size
and SHA-256 of each file, because neither safetensors nor JSON detects a flipped byte. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pvae.errors import CheckpointError, DataError, DeclarationError, StorageError
from pvae.runs.names import slug
from pvae.runs.packing import LARGEST_STATE, pack_state, pack_tensors, unpack_object, unpack_tensors, wrong
from pvae.util.files import read_inside, sync_folder, write_new

SCHEMA_VERSION = 1
"""Version of the checkpoint format written; newer versions are refused, older ones converted by ``MIGRATIONS``."""
KEPT_CHECKPOINTS = 2
"""Number of newest checkpoints that are kept by default."""

_LOG = logging.getLogger("pvae")
_STEP = re.compile(r"step-(\d{8,})\Z")
_REPLACED = re.compile(r"\.old-(step-\d{8,})-[0-9a-f]+\Z")


@dataclass(frozen=True)
class Checkpoint:
    """Verified content of a checkpoint: folder, training step, ``tensors[group][name]`` on the CPU, and JSON state."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


MIGRATIONS: dict[int, Callable[[Checkpoint], Checkpoint]] = {}
"""Converters of old checkpoints: ``MIGRATIONS[n]`` converts content of format version n to version n + 1."""


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = KEPT_CHECKPOINTS,
    durable: bool = True,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` atomically, then remove all but the ``keep`` newest checkpoints.

    A checkpoint of the same step is replaced. Raises StorageError if writing fails (existing checkpoints stay, no
    temporary files remain), CheckpointError if tensors or state could not be read back unchanged, and DeclarationError
    for an invalid step, ``keep`` or group name. ``durable=False`` omits the fsyncs. Returns the checkpoint's folder.
    """
    _check_arguments(step, tensors, keep)
    temporary = folder / f".tmp-{os.urandom(8).hex()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _stage(temporary, step, _contents(tensors, state), durable)
            path = _place(temporary, folder / _name(step), durable)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _prune(folder, path, keep)
    except OSError as problem:
        raise StorageError(
            f"{folder / _name(step)}: expected to be written; got {problem.strerror or problem}. "
            "Earlier checkpoints are untouched; make room and try again."
        ) from problem
    return path


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _check_arguments(step: int, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    if step < 0:
        raise DeclarationError(f"Expected a step of at least 0; got {step}.")
    if keep < 1:
        raise DeclarationError(f"Expected to keep at least 1 checkpoint; got {keep}.")
    for group in tensors:
        if slug(group) != group:
            raise DeclarationError(f"Expected a safe file name for a group of tensors; got {group!r}.")


def _contents(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file of a checkpoint, one at a time to save memory."""
    for group, entries in tensors.items():
        yield f"{group}.safetensors", pack_tensors(group, entries)
    yield "state.json", pack_state(state)


def _stage(temporary: Path, step: int, contents: Iterable[tuple[str, bytes]], durable: bool) -> None:
    temporary.mkdir()
    files = {}
    for name, content in contents:
        write_new(temporary / name, content, durable=durable)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest = {"schema": SCHEMA_VERSION, "step": step, "files": files}
    write_new(temporary / "manifest.json", json.dumps(manifest, indent=1).encode(), durable=durable)
    if durable:
        sync_folder(temporary)


def _place(temporary: Path, path: Path, durable: bool) -> Path:
    """Rename the finished temporary folder to the checkpoint's name; an old checkpoint of the step is replaced.

    The old checkpoint is first renamed to a name that ``latest`` still reads, so that a crash loses nothing.
    """
    replaced = path.with_name(f".old-{path.name}-{os.urandom(4).hex()}")
    if os.path.lexists(path):
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(replaced):
            os.rename(replaced, path)
        raise
    if durable:
        sync_folder(path.parent)
    _discard(replaced)
    return path


def _prune(folder: Path, written: Path, keep: int) -> None:
    """Remove all checkpoints but the ``keep`` of the highest steps and the one just written."""
    paths = [folder / _name(step) for step in sorted(_steps(folder), reverse=True)]
    for path in paths[keep:]:
        if path != written:
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint, renamed first so that an interrupted removal leaves no partial checkpoint under its name."""
    doomed = path.with_name(f".tmp-{os.urandom(8).hex()}")
    with suppress(FileNotFoundError):
        os.rename(path, doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder ``path``, with every file verified by SHA-256 before it is parsed.

    Older format versions are converted. Raises CheckpointError, which names the file and the fault. Only regular files
    that the manifest lists are opened, and nothing is unpickled.
    """
    schema, step, files = _manifest(Path(path))
    state = unpack_object(path / "state.json", _verified(path, "state.json", files.pop("state.json")))
    tensors = {
        name.removesuffix(".safetensors"): unpack_tensors(path / name, _verified(path, name, entry))
        for name, entry in files.items()
    }
    return _migrated(Checkpoint(Path(path), step, tensors, state), schema)


def _manifest(path: Path) -> tuple[int, int, dict[str, dict[str, Any]]]:
    """Return format version, step and file table (size, SHA-256 by name) of a checkpoint's manifest, all validated."""
    where = path / "manifest.json"
    if path.is_symlink() or not path.is_dir():
        raise wrong(path, "a checkpoint folder", "a link" if path.is_symlink() else "none")
    found = unpack_object(where, _bytes(path, "manifest.json", LARGEST_STATE))
    schema = _whole(where, found, "schema")
    if schema > SCHEMA_VERSION:
        raise wrong(
            where, f"schema {SCHEMA_VERSION} or older", f"schema {schema}; upgrade pvae (pip install -U pvae-pyro)"
        )
    step = _whole(where, found, "step")
    _check_step(path, step)
    return schema, step, _file_table(where, found.get("files"))


def _check_step(path: Path, step: int) -> None:
    match = _STEP.match(path.name)
    if match and int(match[1]) != step:
        raise wrong(path / "manifest.json", f"step {int(match[1])}, as the folder says", f"step {step}")


def _whole(where: Path, fields: Mapping[str, Any], key: str) -> int:
    found = fields.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise wrong(where, f"a whole number for {key!r}", repr(found))
    return found


def _file_table(where: Path, files: object) -> dict[str, dict[str, Any]]:
    if not isinstance(files, dict) or "state.json" not in files:
        raise wrong(where, "a table of files with state.json", repr(files)[:80])
    for name, entry in files.items():
        _check_file_name(where, name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise wrong(where, f"size and sha256 of {name!r}", repr(entry)[:80])
        _whole(where, entry, "size")
    return files


def _check_file_name(where: Path, name: str) -> None:
    """Refuse a file name in a manifest that is neither `state.json` nor a plain `<group>.safetensors`."""
    group = name.removesuffix(".safetensors")
    if name != "state.json" and (group == name or slug(group) != group):
        raise wrong(where, "plain names like weights.safetensors", repr(name)[:80])


def _bytes(path: Path, name: str, limit: int) -> bytes:
    try:
        return read_inside(path, name, limit)
    except DataError as problem:
        raise CheckpointError(str(problem)) from problem


def _verified(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    where = path / name
    with suppress(OSError):
        if (size := where.lstat().st_size) != entry["size"]:
            raise wrong(where, f"{entry['size']} bytes", f"{size} (truncated or replaced)")
    content = _bytes(path, name, LARGEST_STATE if name == "state.json" else entry["size"])
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise wrong(where, f"SHA-256 {entry['sha256']}", f"{digest} (its bytes changed)")
    return content


def _migrated(checkpoint: Checkpoint, schema: int) -> Checkpoint:
    for old in range(schema, SCHEMA_VERSION):
        if old not in MIGRATIONS:
            raise wrong(
                checkpoint.path / "manifest.json", f"schema {SCHEMA_VERSION}", f"schema {old}, which nothing migrates"
            )
        checkpoint = MIGRATIONS[old](checkpoint)
    return checkpoint


def latest(folder: Path, *, report: Callable[[str], None] = _LOG.warning) -> Checkpoint | None:
    """Return the checkpoint of the highest step that can be read, or None if the folder contains no checkpoint.

    Each unreadable checkpoint is passed to `report` with the reason. If all are unreadable, a CheckpointError lists
    them, because silently starting anew would lose the run.
    """
    refused = []
    for path in newest_first(folder):
        try:
            return read(path)
        except CheckpointError as problem:
            refused.append(str(problem))
            report(f"checkpoint {path.name} refused: {problem}; falling back to the one before")
    if refused:
        raise CheckpointError("\n".join([f"{folder}: expected a checkpoint that reads; got none:", *refused]))
    return None


def newest_first(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints, highest step first, including one left renamed by an interrupted `write`."""
    paths = {step: folder / _name(step) for step in _steps(folder)}
    for name in _names(folder):
        if match := _REPLACED.match(name):
            paths.setdefault(int(match[1].removeprefix("step-")), folder / name)
    return [paths[step] for step in sorted(paths, reverse=True)]


def _steps(folder: Path) -> list[int]:
    matches = [_STEP.match(name) for name in _names(folder)]
    steps = [int(match[1]) for match in matches if match]
    return [step for step in steps if os.path.lexists(folder / _name(step))]


def _names(folder: Path) -> list[str]:
    """Return the sorted file names in ``folder``, [] if it does not exist; raises CheckpointError if unreadable."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise wrong(folder, "a folder of checkpoints", problem.strerror) from problem


def sweep(folder: Path) -> list[str]:
    """Remove temporary files of interrupted writes and return their names; only the lock's holder may call this.

    An old checkpoint that was renamed and never replaced gets its name back. Raises StorageError.
    """
    names = [name for name in _names(folder) if name.startswith(".tmp-") or _REPLACED.match(name)]
    try:
        for name in names:
            _sweep_one(folder, name)
    except OSError as problem:
        raise StorageError(f"{folder}: expected to sweep temporaries; got {problem.strerror or problem}.") from problem
    return names


def _sweep_one(folder: Path, name: str) -> None:
    match = _REPLACED.match(name)
    if match and not os.path.lexists(folder / match[1]):
        os.rename(folder / name, folder / match[1])
    else:
        _remove(folder / name)
