"""Checkpoints: folders of safetensors and JSON that are whole or not there, verified byte for byte when read.

A checkpoint ``step-00001234/`` holds ``<group>.safetensors``, ``state.json``, and ``manifest.json`` with the size
and SHA-256 of each. Neither safetensors nor JSON notices a flipped byte; the manifest does. Nothing is unpickled.
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

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pvae.errors import CheckpointError, DataError, DeclarationError, StorageError
from pvae.runs.rundir import slug
from pvae.util.files import read_inside, sync_folder, write_new

SCHEMA = 1
"""The layout written here. A newer one is refused, an older one goes through ``MIGRATIONS``."""
KEEP = 2
"""Checkpoints that are kept, the newest."""

_LOG = logging.getLogger("pvae")
_LIMIT = 16 << 20
_STEP = re.compile(r"step-(\d{8,})\Z")
_REPLACED = re.compile(r"\.old-(step-\d{8,})-[0-9a-f]+\Z")
_ESCAPE = "json:"
_DTYPES = frozenset(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
    + [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
)


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint: where it lies, its step, ``tensors[group][key]`` on the CPU, and its JSON state."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


MIGRATIONS: dict[int, Callable[[Checkpoint], Checkpoint]] = {}
"""``MIGRATIONS[n]`` turns the content of schema n into that of n + 1."""


# ---------------------------------------------------------------------------------------------- writing


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = KEEP,
    durable: bool = True,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` whole or not at all, then remove the oldest beyond ``keep``.

    A checkpoint of the same step is replaced. Raises StorageError when writing fails (nothing that stood there is
    lost, no temporary stays), CheckpointError for tensors or state that could not be read back as they are, and
    DeclarationError for a wrong step, ``keep`` or group name. ``durable=False`` leaves out the fsyncs.
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
    """Name and bytes of every file, one at a time: the checkpoint need not fit into memory twice."""
    for group, entries in tensors.items():
        yield f"{group}.safetensors", _pack(group, entries)
    yield "state.json", _pack_state(state)


def _pack(group: str, entries: Mapping[str, Tensor]) -> bytes:
    seen: set[int] = set()
    try:
        return safetensors.torch.save({_escaped(key): _detached(value, seen) for key, value in entries.items()})
    except (SafetensorError, ValueError, RuntimeError, NotImplementedError) as problem:
        raise CheckpointError(f"{group}: expected dense tensors that safetensors can hold; got: {problem}") from problem


def _detached(tensor: Tensor, seen: set[int]) -> Tensor:
    """A contiguous tensor on the CPU with storage of its own: safetensors refuses tensors that share theirs."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"dtype {tensor.dtype}, which could not be read back")
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    address = dense.untyped_storage().data_ptr()
    if address in seen:
        return dense.clone()
    seen.add(address)
    return dense


def _escaped(key: str) -> str:
    """The key as safetensors can hold it: lone surrogates and its own ``__metadata__`` would not come back."""
    plain = key.encode(errors="ignore").decode() == key
    return key if plain and key != "__metadata__" and not key.startswith(_ESCAPE) else _ESCAPE + json.dumps(key)


def _unescaped(key: str) -> str:
    return str(json.loads(key.removeprefix(_ESCAPE))) if key.startswith(_ESCAPE) else key


def _pack_state(state: Mapping[str, Any]) -> bytes:
    _require_text_keys(state)
    try:
        content = json.dumps(state, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"Expected a state of finite JSON; got: {problem}") from problem
    if len(content) > _LIMIT:
        raise CheckpointError(
            f"Expected a state of at most {_LIMIT} bytes; got {len(content)}. Keep arrays as tensors."
        )
    return content


def _require_text_keys(value: object) -> None:
    """JSON turns other keys into text without a word, and the state read would not be the one written."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"Expected text as keys of the state; got {key!r}.")
            _require_text_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_text_keys(item)


def _stage(temporary: Path, step: int, contents: Iterable[tuple[str, bytes]], durable: bool) -> None:
    temporary.mkdir()
    files = {}
    for name, content in contents:
        write_new(temporary / name, content, durable=durable)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest = {"schema": SCHEMA, "step": step, "files": files}
    write_new(temporary / "manifest.json", json.dumps(manifest, indent=1).encode(), durable=durable)
    if durable:
        sync_folder(temporary)


def _place(temporary: Path, path: Path, durable: bool) -> Path:
    """Give the staged folder its name. One of the same step steps aside under a name that ``latest`` still reads."""
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
    """Remove the oldest beyond ``keep``, by step and never by time, and never the one just written."""
    paths = [folder / _name(step) for step in sorted(_steps(folder), reverse=True)]
    for path in paths[keep:]:
        if path != written:
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a kill half way leaves no half checkpoint under a step's name."""
    doomed = path.with_name(f".tmp-{os.urandom(8).hex()}")
    with suppress(FileNotFoundError):
        os.rename(path, doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, every file verified before it is parsed, older schemas migrated.

    Raises CheckpointError that names the file, what was expected and what was found. Only files that the manifest
    names are opened, only plain ones, and nothing is ever unpickled.
    """
    schema, step, files = _manifest(Path(path))
    state = _object(path / "state.json", _verified(path, "state.json", files.pop("state.json")))
    tensors = {
        name.removesuffix(".safetensors"): _unpack(path / name, _verified(path, name, entry))
        for name, entry in files.items()
    }
    return _migrated(Checkpoint(Path(path), step, tensors, state), schema)


def _wrong(where: Path, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}; got {found}.")


def _manifest(path: Path) -> tuple[int, int, dict[str, dict[str, Any]]]:
    """Schema, step and file table of the manifest, every entry checked."""
    where = path / "manifest.json"
    if path.is_symlink() or not path.is_dir():
        raise _wrong(path, "a checkpoint folder", "a link" if path.is_symlink() else "none")
    found = _object(where, _bytes(path, "manifest.json", _LIMIT))
    schema = _whole(where, found, "schema")
    if schema > SCHEMA:
        raise _wrong(where, f"schema {SCHEMA} or older", f"schema {schema}; upgrade pvae (pip install -U pvae-pyro)")
    step = _whole(where, found, "step")
    _check_step(path, step)
    return schema, step, _file_table(where, found.get("files"))


def _check_step(path: Path, step: int) -> None:
    match = _STEP.match(path.name)
    if match and int(match[1]) != step:
        raise _wrong(path / "manifest.json", f"step {int(match[1])}, as the folder says", f"step {step}")


def _whole(where: Path, fields: Mapping[str, Any], key: str) -> int:
    found = fields.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise _wrong(where, f"a whole number for {key!r}", repr(found))
    return found


def _file_table(where: Path, files: object) -> dict[str, dict[str, Any]]:
    if not isinstance(files, dict) or "state.json" not in files:
        raise _wrong(where, "a table of files with state.json", repr(files)[:80])
    for name, entry in files.items():
        _check_file_name(where, name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise _wrong(where, f"size and sha256 of {name!r}", repr(entry)[:80])
        _whole(where, entry, "size")
    return files


def _check_file_name(where: Path, name: str) -> None:
    """A manifest may come from anywhere: it names files of this folder, and of the two kinds that are written."""
    group = name.removesuffix(".safetensors")
    if name != "state.json" and (group == name or slug(group) != group):
        raise _wrong(where, "plain names like weights.safetensors", repr(name)[:80])


def _bytes(path: Path, name: str, limit: int) -> bytes:
    try:
        return read_inside(path, name, limit)
    except DataError as problem:
        raise CheckpointError(str(problem)) from problem


def _verified(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    where = path / name
    with suppress(OSError):
        if (size := where.lstat().st_size) != entry["size"]:
            raise _wrong(where, f"{entry['size']} bytes", f"{size} (truncated or replaced)")
    content = _bytes(path, name, _LIMIT if name == "state.json" else entry["size"])
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise _wrong(where, f"SHA-256 {entry['sha256']}", f"{digest} (its bytes changed)")
    return content


def _unpack(where: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return {_unescaped(key): value for key, value in safetensors.torch.load(content).items()}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise _wrong(where, "safetensors", f"{len(content)} bytes that start {content[:16]!r} ({problem})") from problem


def _object(where: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as problem:
        raise _wrong(where, "JSON", f"{len(content)} bytes that start {content[:16]!r} ({problem})") from problem
    if not isinstance(found, dict):
        raise _wrong(where, "a JSON object", type(found).__name__)
    return found


def _migrated(checkpoint: Checkpoint, schema: int) -> Checkpoint:
    for old in range(schema, SCHEMA):
        if old not in MIGRATIONS:
            raise _wrong(checkpoint.path / "manifest.json", f"schema {SCHEMA}", f"schema {old}, which nothing migrates")
        checkpoint = MIGRATIONS[old](checkpoint)
    return checkpoint


# ---------------------------------------------------------------------------------------------- the newest, the strays


def latest(folder: Path, *, report: Callable[[str], None] = _LOG.warning) -> Checkpoint | None:
    """The checkpoint of the highest step that reads; None where there is none at all.

    Each one refused is reported with the reason; raises CheckpointError that lists them if nothing else is left,
    because starting anew in silence would cost a run.
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
    """The checkpoints by falling step; one that a killed ``write`` set aside stands in where its step is missing."""
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
    """What lies in ``folder``, [] where there is no such folder; raises CheckpointError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise _wrong(folder, "a folder of checkpoints", problem.strerror) from problem


def sweep(folder: Path) -> list[str]:
    """Remove what killed writes left behind and say what; for the owner of the run alone, at its start.

    A checkpoint that was set aside and never replaced gets its name back. Raises StorageError.
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
