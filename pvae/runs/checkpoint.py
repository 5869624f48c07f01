"""Checkpoints: folders of safetensors and JSON files, written atomically and verified by SHA-256 when read.

A checkpoint ``step-00001234/`` contains ``<group>.safetensors``, ``state.json``, and ``manifest.json`` with the size
and SHA-256 of each file, because neither safetensors nor JSON detects a flipped byte. Nothing is unpickled.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pvae.errors import CheckpointError, DataError, StorageError, instead, misdeclared, refuse
from pvae.runs import find, rundir
from pvae.util import Record, field, files

SCHEMA_VERSION = 1
"""Version of the checkpoint format written; newer versions are refused, older ones converted by ``MIGRATIONS``."""
KEPT_CHECKPOINTS = 2
"""Number of newest checkpoints that are kept by default."""

LARGEST_STATE = 16 * files.MIB
"""Largest size (bytes) of a training state or a manifest."""

_ESCAPE = "json:"
_NAMED = "float64 float32 float16 bfloat16 complex64 bool int64 int32 int16 int8 uint64 uint32 uint16 uint8"
_SHORT = "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
DTYPES = frozenset(getattr(torch, name) for name in (*_NAMED.split(), *_SHORT.split()))

_LOG = logging.getLogger("pvae")
_NAME = re.compile(r"(\.old-)?step-(\d{8}|[1-9]\d{8,})(?(1)-[0-9a-f]+)\Z")
"""Names of checkpoints; one that is being replaced is first renamed to `.old-step-00001234-<random>`."""


class Checkpoint(Record):
    """Verified content of a checkpoint: folder, training step, ``tensors[group][name]`` on the CPU, and JSON state.

    ``run`` is the seal of its run when it was written, see `pvae.runs.seal`; {} in runs of earlier versions.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)


MIGRATIONS: dict[int, Callable[[Checkpoint], Checkpoint]] = {}
"""Converters of old checkpoints: ``MIGRATIONS[n]`` converts content of format version n to version n + 1."""


def write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *,
    run: Mapping[str, Any] | None = None, keep: int = KEPT_CHECKPOINTS, spared: int = -1,
) -> Path:  # fmt: skip
    """Write the checkpoint of ``step`` into ``folder`` atomically, then remove all but the ``keep`` newest checkpoints.

    The checkpoint of the step ``spared`` stays too. A checkpoint of the same step is replaced. ``run`` is the seal of
    its run. Raises StorageError if writing fails (existing checkpoints stay, no
    temporary files remain), CheckpointError if tensors or state could not be read back unchanged, and DeclarationError
    for an invalid group name. Returns the checkpoint's folder.
    """
    misdeclared(unsafe := [name for name in tensors if find.slug(name) != name], "runs.checkpoint.group", unsafe=unsafe)
    path = folder / f"step-{step:08d}"
    temporary = files.temporary_for(path)
    if files.follows():
        return path
    packed = {f"{group}.safetensors": partial(pack_tensors, group, entries) for group, entries in tensors.items()}
    packed["state.json"] = partial(pack_state, state)
    advice = "Earlier checkpoints are untouched; make room and try again."
    with files.raising(StorageError, f"{path}: expected to be written", advice):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _stage(temporary, {"step": step, "run": dict(run or {})}, packed)
            _place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in [found for found in newest_first(folder) if found.name.startswith("step-")][keep:]:
            if old not in (path, folder / f"step-{spared:08d}"):
                files.remove(old, ignore_errors=True)
    return path


def _stage(temporary: Path, told: dict[str, Any], packed: Mapping[str, Callable[[], bytes]]) -> None:
    """Write every file of a checkpoint into a new folder, one at a time to save memory."""
    temporary.mkdir()
    table = {}
    for name, pack in packed.items():
        files.write_new(temporary / name, content := pack())
        table[name] = {"sha256": files.digest(content), "size": len(content)}
    manifest = files.sealed({"schema": SCHEMA_VERSION, **told, "files": table})
    files.write_new(temporary / "manifest.json", files.pretty(manifest).encode())
    files.sync_folder(temporary)


def _place(temporary: Path, path: Path) -> None:
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
    files.sync_folder(path.parent)
    files.remove(replaced, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder ``path``, with every file verified by SHA-256 before it is parsed.

    Older format versions are converted. Raises CheckpointError, which names the file and the fault. Only regular files
    that the manifest lists are opened, and nothing is unpickled.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    with instead(DataError, "{problem}", CheckpointError):
        schema, step, table, run = manifest_of(path)
        state = files.parse_object(path / "state.json", _verified(path, "state.json", table.pop("state.json")))
        for name, entry in table.items():
            tensors[name.removesuffix(".safetensors")] = unpack_tensors(path / name, _verified(path, name, entry))
    saved = Checkpoint(path, step, tensors, state, run)
    for old in range(schema, SCHEMA_VERSION):
        if old not in MIGRATIONS:
            raise wrong(path / "manifest.json", f"schema {SCHEMA_VERSION}", f"schema {old}, which nothing migrates")
        saved = MIGRATIONS[old](saved)
    return saved


def manifest_of(path: Path) -> tuple[int, int, dict[str, dict[str, Any]], dict[str, Any]]:
    """Return format version, step, file table (size, SHA-256 by name) and seal in a checkpoint's manifest."""
    where = path / "manifest.json"
    if path.is_symlink() or not path.is_dir():
        raise wrong(path, "a checkpoint folder", "a link" if path.is_symlink() else "none")
    found = files.read_object(path, "manifest.json", LARGEST_STATE)
    rundir.require_sound(where, found)
    schema, step, match = found.get("schema", -1), found.get("step", -1), _NAME.match(path.name)
    if schema > SCHEMA_VERSION:
        newer = f"schema {schema}; upgrade pvae (pip install -U pvae-pyro)"
        raise wrong(where, f"schema {SCHEMA_VERSION} or older", newer)
    if match and int(match[2]) != step:
        raise wrong(where, f"step {int(match[2])}, as the folder says", f"step {step}")
    table, run = _file_table(where, found.get("files")), found.get("run", {})
    if not isinstance(run, dict):
        raise wrong(where, "a table for 'run'", repr(run)[:80])
    rundir.require_sound(where, run)
    if not files.is_sealed(found) and ("sha256" in found or run):
        raise wrong(where, "the manifest that was written", "an edited one (its digest differs)")
    return schema, step, table, run


def _file_table(where: Path, table: object) -> dict[str, dict[str, Any]]:
    """Return the table of files of a manifest, in which only `state.json` and plain `<group>.safetensors` are named."""
    if not isinstance(table, dict) or "state.json" not in table:
        raise wrong(where, "a table of files with state.json", repr(table)[:80])
    for name, entry in table.items():
        group = name.removesuffix(".safetensors")
        if name != "state.json" and (group == name or find.slug(group) != group):
            raise wrong(where, "plain names like weights.safetensors", repr(name)[:80])
        if not re.fullmatch(r'\{"sha256": "[0-9a-f]{64}", "size": \d{1,18}\}', json.dumps(entry)):
            raise wrong(where, f"size and sha256 of {name!r}", repr(entry)[:80])
    return table


def _verified(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    where = path / name
    with suppress(OSError):
        if (size := where.lstat().st_size) != entry["size"]:
            raise wrong(where, f"{entry['size']} bytes", f"{size} (truncated or replaced)")
    content = files.read_inside(path, name, LARGEST_STATE if name == "state.json" else entry["size"])
    if (digest := files.digest(content)) != entry["sha256"]:
        raise wrong(where, f"SHA-256 {entry['sha256']}", f"{digest} (its bytes changed)")
    return content


def latest(folder: Path, *, report: Callable[[str], None] = _LOG.warning, every: int = 1) -> Checkpoint | None:
    """Return the checkpoint of the highest step that can be read, or None if the folder contains no checkpoint.

    Only steps that are multiples of `every` count. Each unreadable checkpoint is passed to `report` with the reason. If
    all are unreadable, a CheckpointError lists them, because silently starting anew would lose the run. A folder that a
    fit changes meanwhile is listed again.
    """
    for _ in range(100):
        before, found = _entries(folder), None
        refused: dict[str, CheckpointError] = {}
        for path in newest_first(folder, every):
            try:
                found = read(path)
                break
            except CheckpointError as problem:
                refused[path.name] = problem
        if not refused or before == _entries(folder):
            break
    for name, why in refused.items():
        report(f"checkpoint {name} refused: {why}; falling back to the one before")
    refuse(refused and found is None, "runs.checkpoint.none", CheckpointError, folder=folder, refused=refused)
    return found


def _entries(folder: Path) -> set[tuple[str, int]]:
    """Return name and inode of all that a folder holds."""
    with suppress(OSError), os.scandir(folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries}
    return set()


def newest_first(folder: Path, every: int = 1) -> list[Path]:
    """Return the paths of all checkpoints, highest step first, including one left renamed by an interrupted `write`.

    Only steps that are multiples of `every` count.
    """
    paths = {int(match[2]): folder / match.string for match in map(_NAME.match, _names(folder)) if match}
    return [paths[step] for step in sorted(paths, reverse=True) if step % every == 0]


def _names(folder: Path) -> list[str]:
    """Return the sorted file names in ``folder``, [] if it does not exist; raises CheckpointError if unreadable.

    In this order a checkpoint comes after one that was renamed to be replaced by it.
    """
    with files.raising(CheckpointError, f"{folder}: expected a folder of checkpoints"), suppress(FileNotFoundError):
        return sorted(os.listdir(folder))
    return []


def sweep(folder: Path) -> list[str]:
    """Remove temporary files of interrupted writes and return their names; only the lock's holder may call this.

    An old checkpoint that was renamed and never replaced gets its name back. Raises StorageError.
    """
    names = [name for name in _names(folder) if name.startswith((".tmp-", ".old-step-")) and not files.follows()]
    with files.raising(StorageError, f"{folder}: expected to sweep temporaries"):
        for name in names:
            place = folder / name.removeprefix(".old-").rpartition("-")[0]
            if name.startswith(".old-") and not os.path.lexists(place):
                os.rename(folder / name, place)
            else:
                files.remove(folder / name, ignore_errors=True)
    return names


def wrong(where: Path, expected: str, found: object) -> CheckpointError:
    """Return a CheckpointError for a file: `where`: expected `expected`; got `found`."""
    return CheckpointError(f"{where}: expected {expected}; got {found}.")


def pack_tensors(group: str, entries: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    """Return named tensors, and facts as metadata, as a safetensors file; raises CheckpointError, with the group."""
    seen: set[int] = set()
    said = f"{group}: expected dense tensors that safetensors can hold; got: {{problem}}"
    with instead((SafetensorError, ValueError, RuntimeError, NotImplementedError), said, CheckpointError):
        found = {_escaped(key): _detached(value, seen) for key, value in entries.items()}
        return safetensors.torch.save(found, facts)


def _detached(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return a detached contiguous tensor on the CPU with its own storage, since safetensors refuses shared storage."""
    refuse(tensor.dtype not in DTYPES, f"dtype {tensor.dtype}, which could not be read back", ValueError)
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    if (address := dense.untyped_storage().data_ptr()) in seen:
        return dense.clone()
    seen.add(address)
    return dense


def _escaped(key: str) -> str:
    """Return a tensor's name, escaped if safetensors would not preserve it (lone surrogates, ``__metadata__``)."""
    plain = key.encode(errors="ignore").decode() == key
    return key if plain and key != "__metadata__" and not key.startswith(_ESCAPE) else _ESCAPE + json.dumps(key)


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return a training state as JSON bytes; raises CheckpointError if reading them would not give an equal state."""
    said = "Expected a state of finite JSON; got: {problem}"
    with instead((TypeError, ValueError, RecursionError), said, CheckpointError):
        content = json.dumps(state, allow_nan=False).encode()
    refuse(json.loads(content) != state, "runs.checkpoint.keys", CheckpointError)
    refuse(len(content) > LARGEST_STATE, "runs.checkpoint.state", CheckpointError, most=LARGEST_STATE, content=content)
    return content


def unpack_tensors(where: Path, content: bytes) -> dict[str, Tensor]:
    """Return the named tensors in the bytes of a safetensors file; raises CheckpointError."""
    said = f"{where}: expected safetensors; got {len(content)} bytes that start {content[:16]!r} ({{problem}})."
    with instead((SafetensorError, KeyError, ValueError, TypeError, RuntimeError), said, CheckpointError):
        tensors = safetensors.torch.load(content).items()
        return {json.loads(k.removeprefix(_ESCAPE)) if k.startswith(_ESCAPE) else k: value for k, value in tensors}
