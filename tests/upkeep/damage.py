"""Damage to the files of a run, and what `verify` and `clean` say of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pvae.runs import checkpoint
from pvae.runs.rundir import RunDirectory
from pvae.runs.seal import recorded
from pvae.util.checks import Check, Checks


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def oldest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[0]


def only(found: Checks, level: Any) -> Check:
    """The one check of a level."""
    (check,) = found.of(level)
    return check


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewritten(run: Path, change: Callable[[dict[str, dict[str, Tensor]]], Any], **state: Any) -> None:
    """Write the newest checkpoint anew, with other tensors or state, the right checksums and the metrics of now."""
    saved = checkpoint.read(newest(run))
    change(saved.tensors)
    sealed = recorded(RunDirectory(run), saved.run, saved.run.get("ended", True))
    checkpoint.write(run / "checkpoints", saved.step, saved.tensors, {**saved.state, **state}, run=sealed)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def update(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def status(run: Path, **changes: Any) -> None:
    update(run / "status.json", **changes)


def names(found: Checks, level: Any) -> set[str]:
    """The names of the checks of a level."""
    return {check.name for check in found.of(level)}
