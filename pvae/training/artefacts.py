"""Compiled steps kept between fits, by torch's own caches: a folder of the user's alone for each kind of step."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pvae.data.rows.cache import cache_folder, locked
from pvae.errors import PvaeError
from pvae.objectives.base import Objective
from pvae.pair.pair import Pair
from pvae.util.files import digest, pretty, read_object, remove, write_atomic
from pvae.util.provenance import installed_version

INDEX = "step.json"
"""Name of the file with the SHA-256 of all files of a compiled step, written last."""
TORCHS_OWN = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable that names the folder of torch's caches."""


def shelf() -> Path:
    """Return the folder of all compiled steps."""
    return cache_folder() / "compiled"


def entry_of(pair: Pair, objective: Objective, precision: str, batch: Sequence[int]) -> Path:
    """Return the folder in which the compiled step of a pair is kept, which need not exist.

    Its name is a hash of what the code depends on: Modules, shapes and types of parameters and batch, objective,
    precision, versions, threads and processor. Equal names for different code are harmless: torch looks again.

    Arguments:
        pair: model and guide.
        objective: the objective; its `beta` may change between fits.
        precision: precision of the matrix products on this device, never "auto".
        batch: shape of a batch, `(batch, *row)`.
    """
    named = (*pair.named_parameters(), *pair.named_buffers())
    tensors = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in named]
    versions = torch.__version__, installed_version("pvae-pyro"), torch.get_num_threads(), _processor()
    told = (versions, precision, tuple(batch), objective.model_dump(exclude={"beta"}), tensors, repr(pair))
    return shelf() / digest(repr(told).encode())[:32]


def is_kept(entry: Path) -> bool:
    """Return whether a compiled step is kept, without checking its files."""
    return (entry / INDEX).is_file()


@contextmanager
def kept(entry: Path) -> Iterator[None]:
    """Context manager in which torch takes compiled code from a folder and leaves it there, locked meanwhile.

    Code that is damaged, or after which the context fails, is removed. Where others could write to the folder, or
    nobody can, a temporary one is used.
    """
    with ExitStack() as stack:
        if private := _is_private(entry.parent):
            stack.enter_context(locked(entry))
        place = entry if private else Path(stack.enter_context(TemporaryDirectory(prefix="pvae-"))) / entry.name
        if place.exists() and not _is_whole(place):
            remove(place)
        place.mkdir(mode=0o700, exist_ok=True)
        # the compiler's own processes import nothing from the working directory
        for name, value in ((TORCHS_OWN, str(place)), ("PYTHONSAFEPATH", "1")):
            stack.callback(os.environ.update, {name: os.environ[name]} if name in os.environ else {})
            stack.callback(os.environ.pop, name)
            os.environ[name] = value
        try:
            yield
            write_atomic(place / INDEX, pretty(_sums(place)))
        except BaseException:
            remove(place, ignore_errors=True)
            raise


def _is_private(folder: Path) -> bool:
    """Return whether a folder, created if needed, is this user's alone, to read and to write."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        ours = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
        return stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK)
    return False


def _is_whole(entry: Path) -> bool:
    """Return whether the files of a compiled step are those that its index lists."""
    with suppress(PvaeError, OSError):
        return read_object(entry, INDEX) == _sums(entry)
    return False


def _sums(entry: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a compiled step, by its path inside the folder; locks do not count."""
    files = sorted(p for p in entry.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != INDEX)
    return {str(p.relative_to(entry)): digest(p.read_bytes()) for p in files}


def _processor() -> str:
    """Return the instructions that this processor has: code compiled for others may not run on it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return torch.backends.cpu.get_cpu_capability()
