"""Can pvae work here: Python, packages, devices, threads, compiler, folders, data; one line of advice for each.

Imports only the standard library; what a check needs is imported inside it, where a failure is its finding.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import DataError, PvaeError, near
from pvae.util.checks import Check, Checks, Level, attempt
from pvae.util.files import MIB, read_inside, write_atomic, write_new

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data.sources.collections import Collection

EXTRAS = {
    "parquet": "pyarrow",
    "tensorboard": "tensorboardX",
    "mlflow": "mlflow",
}
"""The module behind each optional extra."""
VARIABLES = ("PVAE_RUN_DIR", "PVAE_DATA_DIR", "PVAE_OFFLINE")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LITTLE, TOO_LITTLE = 1024 * MIB, 64 * MIB
"""Bytes of free space below which there is a warning, a failure."""
SECONDS = 60.0
"""That a child process may take."""
ROUNDING = 1e-9
"""Nats that the smoke ELBO may be off, in float64."""
CGROUP_V2, CGROUP_V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu")

PLOTTING = """
import json
found = {}
for name in ("matplotlib.pyplot", "arviz"):
    try:
        found[name] = getattr(__import__(name), "__version__", "unknown")
    except BaseException as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""
"""In a process of its own: a failed import may leave half a package behind, and -W error hits it at once."""

COMPILED = '#include <omp.h>\nextern "C" int pvae_threads() { return omp_get_max_threads(); }\n'


def doctor(run_dir: str | Path = "runs", data_dir: str | Path | None = None) -> Checks:
    """Look at everything that pvae needs of a machine; leaves nothing behind and downloads nothing.

    A check that raises, whatever it raises, is a failed check. Seconds, not minutes.

    Arguments:
        run_dir: where runs are to be kept.
        data_dir: where to look for data first.

    Returns:
        Checks under stable names: `python`, `packages`, `torch`, `devices`, `threads`, `pyro`, `compiler`, `run_dir`,
        `lock`, `space`, `cache`, `home`, `temporary`, `data.<source>`, `extras`, `variables`, `elbo`, `determinism`,
        `plots`, `arviz`.
    """
    runs, data = Path(run_dir), Path(data_dir) if data_dir else None
    with ThreadPoolExecutor(1) as pool:
        plotting = pool.submit(_plotting)  # takes longest, so it goes first and its answer is read last
        asked: dict[str, Callable[[], Iterable[Check]]] = {
            "python": _python,
            "packages": _packages,
            "torch": _torch,
            "devices": _devices,
            "threads": _threads,
            "pyro": _pyro,
            "compiler": _compiler,
            "run_dir": partial(_run_dir, runs),
            "lock": partial(_lock, runs),
            "space": partial(_space, runs),
            "cache": _cache,
            "home": _home,
            "temporary": _temporary,
            "data": partial(_data, data),
            "extras": _extras,
            "variables": _variables,
            "elbo": _elbo,
            "determinism": _determinism,
            "plots": partial(_plots, plotting),
            "arviz": partial(_arviz, plotting),
        }
        found = [check for name, ask in asked.items() for check in attempt(name, ask)]
    return Checks("doctor", tuple(found), {"python": platform.python_version(), "platform": platform.platform()})


# ---------------------------------------------------------------------- interpreter and packages


def _python() -> Iterator[Check]:
    text, encoding = f"{platform.python_version()} on {platform.platform()}", sys.stdout.encoding
    if "error" in sys.warnoptions:
        yield Check("python", "warning", f"{text}, warnings are errors", "Leave out -W error and PYTHONWARNINGS.")
    elif encoding and encoding.lower().replace("-", "") not in ("utf8", "utf8sig"):
        advice = "Set PYTHONUTF8=1 or LANG=C.UTF-8 to see names as they are."
        yield Check("python", "warning", f"{text}, output in {encoding}", advice)
    else:
        yield Check("python", "ok", text)


def _torch() -> Iterator[Check]:
    import torch

    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10)
    advice = "Install torch 2.10 or newer." if old else ""
    yield Check("torch", "failed" if old else "ok", f"{torch.__version__}, built for {built}", advice, facts)


def _devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        blind = torch.version.cuda is not None
        advice = "See nvidia-smi: is there a GPU, and a driver for this CUDA?" if blind else ""
        yield Check("devices", "warning" if blind else "ok", "the CPU alone", advice, {"gpus": []})
        return
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        total = float(torch.ones(2, device=f"cuda:{index}").sum())
        if total != 2:
            raise DataError(f"cuda:{index}: expected 1 + 1 = 2; got {total}. Do not use this GPU.")
        gpus.append((properties.name, properties.total_memory))
    told = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in gpus)
    yield Check("devices", "ok", told, facts={"gpus": [{"name": name, "bytes": size} for name, size in gpus]})


def _threads() -> Iterator[Check]:
    import torch

    cores, limit = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _quota()
    used = torch.get_num_threads()
    named = {name: os.environ[name] for name in THREADS if name in os.environ}
    facts = {"cores": cores, "cgroup": limit, "torch": used, "environment": named}
    parts = [f"torch uses {used}", f"{cores} cores", *([f"a cgroup limit of {limit:g}"] if limit else [])]
    text = ", ".join([*parts, *(f"{name}={value}" for name, value in named.items())])
    room = min(cores, math.ceil(limit)) if limit else cores
    if used > room:
        yield Check(
            "threads", "warning", text, f"Set OMP_NUM_THREADS={room}: more threads than cores are slower.", facts
        )
    else:
        yield Check("threads", "ok", text, facts=facts)


def _quota() -> float | None:
    """Cores that the cgroup allows; None where it does not say."""
    with suppress(OSError, ValueError):
        quota, period = (CGROUP_V2 / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        used, each = (int((CGROUP_V1 / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        return used / each if used > 0 else None
    return None


def _pyro() -> Iterator[Check]:
    import pyro

    yield Check("pyro", "ok", pyro.__version__, facts={"version": pyro.__version__})


def _packages() -> Iterator[Check]:
    """Whether everything that pvae requires is installed."""
    needed = [line for line in requires("pvae-pyro") or [] if "extra ==" not in line]
    found: dict[str, str | None] = {}
    for line in needed:
        name = re.split(r"[^A-Za-z0-9._-]", line)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    missing = [name for name, there in found.items() if there is None]
    text = f"{', '.join(missing)} missing" if missing else f"all {len(found)} that pvae requires"
    advice = "pip install -U pvae-pyro" if missing else ""
    yield Check("packages", "failed" if missing else "ok", text, advice, found)


def _plotting() -> dict[str, Any]:
    """Version, or error and its text, of matplotlib and ArviZ, as a fresh interpreter like this one imports them."""
    done = subprocess.run(
        [sys.executable, "-P", *(f"-W{option}" for option in sys.warnoptions), "-c", PLOTTING],
        capture_output=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=SECONDS,
    )
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        raise DataError(f"Expected versions of a child process; got exit code {done.returncode} and: {last}") from None


def _plots(plotting: Future[dict[str, Any]]) -> Iterator[Check]:
    yield _imported("plots", "failed", "matplotlib", plotting.result()["matplotlib.pyplot"], "no report can be drawn")


def _arviz(plotting: Future[dict[str, Any]]) -> Iterator[Check]:
    found = plotting.result()["arviz"]
    check = _imported("arviz", "warning", "arviz", found, "Posterior.to_arviz will not work; nothing else needs it")
    if check.level != "ok":
        yield check
        return
    generation = "xarray.DataTree" if int(found.partition(".")[0]) >= 1 else "arviz.InferenceData"
    facts = {"version": found, "generation": generation}
    if found.startswith(("1.0", "1.1")):
        yield Check(
            "arviz",
            "warning",
            f"{found}, which pvae does not work with",
            _pip("arviz>=0.23.4,!=1.0.*,!=1.1.*,<2"),
            facts,
        )
    else:
        yield Check("arviz", "ok", f"{found} ({generation})", facts=facts)


def _imported(name: str, level: Level, package: str, found: Any, without: str) -> Check:
    """What there is to say of a version, or of the error that stands in its place."""
    if isinstance(found, str):
        return Check(name, "ok", found, facts={"version": found})
    kind, text = found
    return Check(name, level, f"import {package}: {kind}: {text}; {without}", _advice(package, kind))


def _advice(package: str, kind: str) -> str:
    """What to do about an import that failed with an error called `kind`."""
    if kind.endswith("Warning"):
        return "Leave out -W error and PYTHONWARNINGS: here a warning stops the import."
    if kind in ("PermissionError", "FileNotFoundError", "OSError", "FileExistsError", "NotADirectoryError"):
        return "Set MPLCONFIGDIR and XDG_CACHE_HOME to folders that can be written."
    both = _pip("arviz>=0.23.4,!=1.0.*,!=1.1.*,<2", "matplotlib>=3.9")
    return f"{both}: versions of {package} and matplotlib that do not fit each other clash on import."


def _pip(*requirements: str) -> str:
    return f"pip install -U {shlex.join(requirements)}"


def _extras() -> Iterator[Check]:
    there = {extra: find_spec(module) is not None for extra, module in EXTRAS.items()}
    names = [name for name, found in there.items() if found]
    yield Check("extras", "ok", f"{', '.join(names) or 'none'} of {', '.join(there)}", facts=there)


def _variables() -> Iterator[Check]:
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("PVAE_")}
    told = ", ".join(f"{name}={value}" for name, value in found.items()) or "none is set"
    strange = [name for name in found if name not in VARIABLES]
    if strange:
        hints = ", ".join(f"{name}{near(name, VARIABLES)}" for name in strange)
        yield Check("variables", "warning", told, f"pvae does not know {hints}.", found)
    else:
        yield Check("variables", "ok", told, facts=found)


def _compiler() -> Iterator[Check]:
    named = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "clang++")), "")]
    without = "Install g++, or set CXX: without it fits go on eagerly, at about 1.2 times the cost of a step."
    if not shutil.which(named[0]):
        yield Check("compiler", "warning", f"none: {named[0] or 'neither g++ nor clang++'} is not found", without)
        return
    with tempfile.TemporaryDirectory(prefix="pvae-") as folder:
        command = [*named, "-x", "c++", "-fopenmp", "-shared", "-fPIC", "-o", f"{folder}/trial.so", "-"]
        done = subprocess.run(command, input=COMPILED, capture_output=True, check=False, text=True, timeout=SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[0]
        yield Check("compiler", "warning", f"{named[0]} with OpenMP: exit code {done.returncode}: {last}", without)
    else:
        yield Check("compiler", "ok", f"{shutil.which(named[0])}, with OpenMP")


# ---------------------------------------------------------------------- folders


@contextmanager
def _trial(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, which is made; nothing stays behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=folder) as name:
            yield Path(name)
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _run_dir(folder: Path) -> Iterator[Check]:
    try:
        with _trial(folder) as trial:
            for content in (b"one", b"another"):  # written, synced, renamed over what stood there
                write_atomic(trial / "file", content)
            if read_inside(trial, "file") != b"another":
                raise DataError(f"{trial}: expected to read what was written; got something else.")
    except (OSError, PvaeError) as problem:
        yield Check("run_dir", "failed", f"{folder}: {problem}", "Choose another: --run-dir or PVAE_RUN_DIR.")
    else:
        yield Check("run_dir", "ok", f"{folder.absolute()}: made, written, synced, renamed")


def _lock(folder: Path) -> Iterator[Check]:
    from filelock import FileLock, Timeout

    with _trial(folder) as trial, FileLock(trial / ".lock", timeout=0):
        try:
            with FileLock(trial / ".lock", timeout=0):
                advice = "Keep runs on another file system: here two processes could write one run."
                yield Check("lock", "failed", f"{folder}: a lock was given twice", advice)
        except Timeout:
            yield Check("lock", "ok", "held against a second owner")


def _space(folder: Path) -> Iterator[Check]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    level: Level = "failed" if free < TOO_LITTLE else "warning" if free < LITTLE else "ok"
    advice = "" if level == "ok" else "Make room (pvae clean shows what may go), or choose another --run-dir."
    yield Check("space", level, f"{free / 2**30:.1f} GiB free in {there}", advice, {"free_bytes": free})


def _writable(name: str, folder: Path, level: Level, advice: str) -> Check:
    """Whether a file of 1 MiB can be written in a folder."""
    try:
        with _trial(folder) as trial:
            write_new(trial / "file", bytes(MIB), durable=False)
    except OSError as problem:
        return Check(name, level, f"{folder}: {problem.strerror or problem}", advice)
    return Check(name, "ok", str(folder))


def _cache() -> Iterator[Check]:
    from pvae.data.rows.cache import cache_folder

    yield _writable("cache", cache_folder(), "warning", "Set XDG_CACHE_HOME to a folder that can be written.")


def _home() -> Iterator[Check]:
    yield _writable(
        "home", Path.home(), "warning", "Set HOME, or MPLCONFIGDIR and XDG_CACHE_HOME, to folders of yours."
    )


def _temporary() -> Iterator[Check]:
    advice = "Make room there, or set TMPDIR to a folder that has some."
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as problem:
        yield Check("temporary", "failed", str(problem), advice)
    else:
        yield _writable("temporary", folder, "failed", advice)


# ---------------------------------------------------------------------- data


def _data(data_dir: Path | None) -> Iterator[Check]:
    from pvae.data.rows.files import user_folder
    from pvae.data.sources.collections import FASHION_MNIST, MNIST_FILES

    named = user_folder(data_dir)
    if find_spec("sklearn") is None:
        yield Check("data.digits", "failed", "scikit-learn is missing", _pip("scikit-learn>=1.5"))
    else:
        yield Check("data.digits", "ok", "with scikit-learn")
    for name, collection in (("fashion_mnist", FASHION_MNIST), ("mnist", MNIST_FILES)):
        yield _collection(f"data.{name}", collection, named)


def _collection(name: str, collection: Collection, named: Path | None) -> Check:
    """Where the files of a collection are, without reading them."""
    from pvae.data.rows.cache import cache_folder

    own = [named / collection.slug, named] if named else []
    places = [*own, *([collection.system] if collection.system else []), cache_folder() / collection.slug]
    found = [_first(file.name, places) for file in collection.files.values()]
    archive = next((path for path in own if collection.archive and (path / collection.archive).is_file()), None)
    where = {str(path) for path in found if path}
    if archive or all(found):
        return Check(name, "ok", str(archive) if archive else ", ".join(sorted(where)))
    missing = f"{found.count(None)} of {len(found)} files are not here"
    if os.environ.get("PVAE_OFFLINE", "0") not in ("", "0"):
        package = f", or install {collection.package}" if collection.package else ""
        return Check(
            name,
            "warning",
            f"{missing}, and PVAE_OFFLINE is set",
            f"Put them in DIR/{collection.slug} and pass --data-dir DIR{package}.",
        )
    return Check(name, "ok", f"{missing}; downloaded when they are first used", facts={"missing": found.count(None)})


def _first(name: str, places: list[Path]) -> Path | None:
    return next((place for place in places if (place / name).is_file() or (place / f"{name}.gz").is_file()), None)


# ---------------------------------------------------------------------- arithmetic


def _elbo() -> Iterator[Check]:
    """p(z) = N(0, 1), p(x|z) = N(z, 1), and the true posterior as the guide: every draw of the ELBO is log p(x)."""
    import pyro
    import torch
    from pyro.distributions import Normal

    from pvae.pair.pair import Pair
    from pvae.training.evaluation import evaluate

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", Normal(z, pyro.param("noise", torch.ones((), dtype=x.dtype))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x / 2, math.sqrt(0.5)))

    x = torch.linspace(-3, 3, 64, dtype=torch.float64)
    exact = -0.5 * math.log(4 * math.pi) - float((x**2).mean()) / 4
    found = evaluate(Pair(model, guide).adopt(x), x, 0)["elbo"]
    text = f"{found:.9f} nats per datum; exactly {exact:.9f}"
    if abs(found - exact) <= ROUNDING:
        yield Check("elbo", "ok", text)
    else:
        advice = "Trust no figure of this installation: see pvae selfcheck, and install torch anew."
        yield Check("elbo", "failed", text, advice)


def _determinism() -> Iterator[Check]:
    first, second = _gradients(), _gradients()
    if first.equal(second):
        yield Check("determinism", "ok", "same seed, same bits of the loss and all gradients (eager, on the CPU)")
    else:
        off = float((first - second).abs().max())
        advice = "Runs are not resumed bit for bit here: set OMP_NUM_THREADS=1, and look again."
        yield Check("determinism", "failed", f"same seed, gradients that differ by up to {off:.1e}", advice)


def _gradients() -> Tensor:
    """Gradients of the ELBO of a small VAE, from fixed seeds; the random state stays as it was."""
    import torch

    from pvae.experiment.experiment import Experiment
    from pvae.objectives.base import Loss
    from pvae.util import seeds

    experiment = Experiment.from_dict({"latents": {"z": {"dim": 4}}})
    pair = experiment.build((16, 16))
    parameters = list(pair.parameters())
    with torch.random.fork_rng(devices=[]):
        seeds.set_noise(0, torch.device("cpu"))
        x = torch.rand(128, 16, 16).round()
        loss = Loss(experiment.objective, pair, len(x))(x)[0]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients if g is not None)])
