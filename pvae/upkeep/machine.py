"""Doctor's checks of the machine: GPUs, threads, compiler, writable folders, disk space, data files."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import DataError, PvaeError, text
from pvae.util import Record
from pvae.util.checks import Check, Level
from pvae.util.files import MIB, write_atomic

if TYPE_CHECKING:
    from pvae.data.sources.collections import Collection

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CHILD_SECONDS = 60.0
"""Time limit (s) of a child process."""
WARN_BELOW_BYTES, FAIL_BELOW_BYTES = 1024 * MIB, 64 * MIB
"""Free disk space (bytes) below which the check of the disk warns, and fails."""
CGROUP = Path("/sys/fs/cgroup/cpu.max")
COMPILED = '#include <omp.h>\nextern "C" int pvae_threads() { return omp_get_max_threads(); }\n'


class CheckArguments(Record):
    """Arguments of all checks: folder of runs and folder of data."""

    runs: Path
    data: Path | None


def pip(*requirements: str) -> str:
    """Return the pip command that installs the requirements."""
    return f"pip install -U {shlex.join(requirements)}"


def devices(_: CheckArguments) -> Iterator[Check]:
    """Yield a check of the GPUs: it fails if one adds wrongly, and warns if a CUDA build of torch finds none."""
    import torch

    if not torch.cuda.is_available():
        advice = "See nvidia-smi: is there a GPU, and a driver for this CUDA?" if torch.version.cuda else ""
        yield Check.judged("devices", "warning", "the CPU alone", advice, {"gpus": []})
        return
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        if (total := float(torch.ones(2, device=f"cuda:{index}").sum())) != 2:
            raise DataError(f"cuda:{index}: expected 1 + 1 = 2; got {total}. Do not use this GPU.")
        gpus.append((properties.name, properties.total_memory))
    text = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in gpus)
    yield Check("devices", "ok", text, facts={"gpus": [{"name": name, "bytes": size} for name, size in gpus]})


def threads(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if torch uses more threads than there are cores."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, used = cgroup_cores(), torch.get_num_threads()
    named = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    facts = {"cores": cores, "cgroup": limit, "torch": used, "environment": named}
    parts = [f"torch uses {used}", f"{cores} cores", *([f"a cgroup limit of {limit:g}"] if limit else [])]
    text = ", ".join([*parts, *(f"{name}={value}" for name, value in named.items())])
    room = min(cores, math.ceil(limit)) if limit else cores
    advice = f"Set OMP_NUM_THREADS={room}: more threads than cores are slower." if used > room else ""
    yield Check.judged("threads", "warning", text, advice, facts)


def precision(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that says what `train.precision = "auto"` is on the CPU and, if there is one, on the GPU."""
    import torch

    from pvae.nn.precision import resolved

    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {name: resolved("auto", torch.device(name)) for name in names}
    said = ", ".join(f"{value} on the {'CPU' if name == 'cpu' else 'GPU'}" for name, value in found.items())
    yield Check("precision", "ok", f'train.precision = "auto" is {said}', facts=found)


def cgroup_cores() -> float | None:
    """Return the number of cores that the cgroup allows this process; None if there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = CGROUP.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def compiler(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if there is no C++ compiler with OpenMP, which torch.compile needs."""
    named = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "clang++")), "")]
    text, failed = f"{shutil.which(named[0])}, with OpenMP", True
    if not shutil.which(named[0]):
        text = f"none: {named[0] or 'neither g++ nor clang++'} is not found"
    else:
        with tempfile.TemporaryDirectory(prefix="pvae-") as folder:
            options = ["-x", "c++", "-fopenmp", "-shared", "-fPIC", "-o", f"{folder}/trial.so", "-"]
            asked: Any = {"input": COMPILED, "capture_output": True, "text": True, "timeout": CHILD_SECONDS}
            done = subprocess.run([*named, *options], check=False, **asked)
        if failed := bool(done.returncode):
            last = (done.stderr.strip().splitlines() or ["no words"])[0]
            text = f"{named[0]} with OpenMP: exit code {done.returncode}: {last}"
    advice = "Install g++, or set CXX: without it fits go on eagerly, at about 1.2 times the cost of a step."
    yield Check.judged("compiler", "warning", text, advice if failed else "")


def run_dir(given: CheckArguments) -> Iterator[Check]:
    """Yield the check that files can be created and replaced in the folder of runs; it fails if not."""
    return _writable("run_dir", given.runs.absolute, "failed", "Choose another: --run-dir or PVAE_RUN_DIR.")


def space(given: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns or fails if the disk of the runs is almost full."""
    folder = given.runs.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    bad: Level = "failed" if free < FAIL_BELOW_BYTES else "warning"
    advice = "Make room (pvae clean shows what may go), or choose another --run-dir." if free < WARN_BELOW_BYTES else ""
    yield Check.judged("space", bad, f"{free / 2**30:.1f} GiB free in {there}", advice, {"free_bytes": free})


def user_cache() -> Path:
    """Return the folder of cached data."""
    from pvae.data.rows.cache import cache_folder

    return cache_folder()


def _writable(name: str, folder: Callable[[], str | Path], bad: Level, advice: str) -> Iterator[Check]:
    """Yield the check that a file of 1 MiB can be written in a folder, and replaced; its level is `bad` if not.

    Folders that are created for it are removed.
    """
    where, missing = Path("no folder"), list[Path]()
    try:
        where = Path(folder())
        missing = [path for path in (where, *where.parents) if not path.exists()]
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=where) as trial:
            for _ in range(2):
                write_atomic(Path(trial, "file"), bytes(MIB))
        yield Check(name, "ok", str(where))
    except (OSError, PvaeError) as problem:
        yield Check(name, bad, f"{where}: {problem}", advice)
    for path in missing:
        with suppress(OSError):
            path.rmdir()


def cache(_: CheckArguments) -> Iterator[Check]:
    """Yield the check that the folder of cached data can be written to."""
    return _writable("cache", user_cache, "warning", "Set XDG_CACHE_HOME to a folder that can be written.")


def temporary(_: CheckArguments) -> Iterator[Check]:
    """Yield the check that the folder of temporary files can be written to; unlike the others it fails if not."""
    advice = "Make room there, or set TMPDIR to a folder that has some."
    return _writable("temporary", tempfile.gettempdir, "failed", advice)


def data(given: CheckArguments) -> Iterator[Check]:
    """Yield checks that the files of the data sources digits, Fashion-MNIST and MNIST are present or downloadable."""
    from pvae.data.rows.files import user_folder
    from pvae.data.sources.collections import FASHION_MNIST, MNIST_FILES

    named, without = user_folder(given.data), find_spec("sklearn") is None
    text = "scikit-learn is missing" if without else "with scikit-learn"
    yield Check.judged("data.digits", "failed", text, pip("scikit-learn>=1.5") if without else "")
    yield collection("data.fashion_mnist", FASHION_MNIST, named)
    yield collection("data.mnist", MNIST_FILES, named)


def collection(name: str, wanted: Collection, named: Path | None) -> Check:
    """Return the check that the files of an image collection exist, which names their folders; files are not read."""
    archive = wanted.find_archive(named)
    found = [archive or wanted.find(file, named, user_cache() / wanted.slug) for file in wanted.files.values()]
    if all(found):
        return Check(name, "ok", ", ".join(sorted({str(path.parent) for path in found if path})))
    missing = f"{found.count(None)} of {len(found)} files are not here"
    if os.environ.get("PVAE_OFFLINE", "0") in ("", "0"):
        there = f"{missing}; downloaded when they are first used"
        return Check(name, "ok", there, facts={"missing": found.count(None)})
    return Check(name, "warning", f"{missing}, and PVAE_OFFLINE is set", text("upkeep.machine.by_hand", wanted=wanted))
