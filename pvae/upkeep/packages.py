"""Doctor's checks of the Python interpreter and of the installed packages.

Imports only the standard library; each check imports the packages it needs, so that a failing import fails the check.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pvae.errors import DataError, near
from pvae.util.checks import Check, Level
from pvae.util.provenance import installed_version

EXTRA_MODULES = {
    "parquet": "pyarrow",
    "tensorboard": "tensorboardX",
    "mlflow": "mlflow",
}
"""Importable module of each optional extra of pvae."""
KNOWN_VARIABLES = ("PVAE_RUN_DIR", "PVAE_DATA_DIR", "PVAE_OFFLINE")
CHILD_SECONDS = 60.0
"""Time limit (s) of a child process."""
ARVIZ_REQUIREMENT = "arviz>=0.23.4,!=1.0.*,!=1.1.*,<2"

IMPORT_TRIAL = """
import json
found = {}
for name in ("matplotlib.pyplot", "arviz"):
    try:
        found[name] = getattr(__import__(name), "__version__", "unknown")
    except BaseException as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""
"""Python code that tries imports in a child process, because a failed import may leave a half-imported package."""


@dataclass(frozen=True)
class CheckArguments:
    """Arguments of all checks: folder of runs, folder of data, and the pending result of `IMPORT_TRIAL`."""

    runs: Path
    data: Path | None
    imports: Future[dict[str, Any]]


def python(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if Python turns warnings into errors, or if its output encoding is not UTF-8."""
    text, encoding = f"{platform.python_version()} on {platform.platform()}", sys.stdout.encoding
    if "error" in sys.warnoptions:
        yield Check("python", "warning", f"{text}, warnings are errors", "Leave out -W error and PYTHONWARNINGS.")
    elif encoding and encoding.lower().replace("-", "") not in ("utf8", "utf8sig"):
        advice = "Set PYTHONUTF8=1 or LANG=C.UTF-8 to see names as they are."
        yield Check("python", "warning", f"{text}, output in {encoding}", advice)
    else:
        yield Check("python", "ok", text)


def packages(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if a package that pvae requires is not installed."""
    needed = [line for line in requires("pvae-pyro") or [] if "extra ==" not in line]
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in needed]
    found = {name: installed_version(name) for name in names}
    missing = [name for name, there in found.items() if there is None]
    if missing:
        yield Check("packages", "failed", f"{', '.join(missing)} missing", "pip install -U pvae-pyro", found)
    else:
        yield Check("packages", "ok", f"all {len(found)} that pvae requires", facts=found)


def torch(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if torch is too old; an import error is raised."""
    import torch

    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10)
    advice = "Install torch 2.10 or newer." if old else ""
    yield Check("torch", "failed" if old else "ok", f"{torch.__version__}, built for {built}", advice, facts)


def pyro(_: CheckArguments) -> Iterator[Check]:
    """Yield a check with Pyro's version; an import error is raised."""
    import pyro

    yield Check("pyro", "ok", pyro.__version__, facts={"version": pyro.__version__})


def extras(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that lists the optional extras that are installed."""
    there = {extra: find_spec(module) is not None for extra, module in EXTRA_MODULES.items()}
    names = [name for name, found in there.items() if found]
    yield Check("extras", "ok", f"{', '.join(names) or 'none'} of {', '.join(there)}", facts=there)


def variables(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns about environment variables that begin with PVAE_ and are unknown."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("PVAE_")}
    text = ", ".join(f"{name}={value}" for name, value in found.items()) or "none is set"
    unknown = ", ".join(f"{name}{near(name, KNOWN_VARIABLES)}" for name in found if name not in KNOWN_VARIABLES)
    advice = f"pvae does not know {unknown}." if unknown else ""
    yield Check("variables", "warning" if unknown else "ok", text, advice, found)


def import_in_child() -> dict[str, Any]:
    """Return the version of matplotlib and of ArviZ, or class and text of the import error, from a child process."""
    done = subprocess.run(
        [sys.executable, "-P", *(f"-W{option}" for option in sys.warnoptions), "-c", IMPORT_TRIAL],
        capture_output=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=CHILD_SECONDS,
    )
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        raise DataError(f"Expected versions of a child process; got exit code {done.returncode} and: {last}") from None


def plots(given: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if matplotlib cannot be imported."""
    found = given.imports.result()["matplotlib.pyplot"]
    yield _imported("plots", "failed", "matplotlib", found, "no report can be drawn")


def arviz(given: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if ArviZ cannot be imported or has an unsupported version."""
    found = given.imports.result()["arviz"]
    check = _imported("arviz", "warning", "arviz", found, "Posterior.to_arviz will not work; nothing else needs it")
    if check.level != "ok":
        yield check
        return
    generation = "xarray.DataTree" if int(found.partition(".")[0]) >= 1 else "arviz.InferenceData"
    facts = {"version": found, "generation": generation}
    if found.startswith(("1.0", "1.1")):
        yield Check("arviz", "warning", f"{found}, which pvae does not work with", pip(ARVIZ_REQUIREMENT), facts)
    else:
        yield Check("arviz", "ok", f"{found} ({generation})", facts=facts)


def _imported(name: str, level: Level, package: str, found: Any, without: str) -> Check:
    """Return the check of a package, from its version or from the class and text of its import error."""
    if isinstance(found, str):
        return Check(name, "ok", found, facts={"version": found})
    kind, text = found
    return Check(name, level, f"import {package}: {kind}: {text}; {without}", _advice(package, kind))


def _advice(package: str, kind: str) -> str:
    """Return advice for a package whose import failed with an error of class `kind`."""
    if kind.endswith("Warning"):
        return "Leave out -W error and PYTHONWARNINGS: here a warning stops the import."
    if kind in ("PermissionError", "FileNotFoundError", "OSError", "FileExistsError", "NotADirectoryError"):
        return "Set MPLCONFIGDIR and XDG_CACHE_HOME to folders that can be written."
    both = pip(ARVIZ_REQUIREMENT, "matplotlib>=3.9")
    return f"{both}: versions of {package} and matplotlib that do not fit each other clash on import."


def pip(*requirements: str) -> str:
    """Return the pip command that installs the requirements."""
    return f"pip install -U {shlex.join(requirements)}"
