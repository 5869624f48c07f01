"""Provenance of a run: package versions, git commit, command line and machine. Standard library only; never fails."""

import os
import platform
import sys
from contextlib import suppress
from typing import Any

GIT_SECONDS = 5.0
PACKAGES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz", "pandas", "pydantic", "safetensors", "scikit-learn")
UNCOUNTED = frozenset(f"versions.{name}" for name in PACKAGES[4:])
"""Versions that change no bit of a fit."""


def provenance() -> dict[str, Any]:
    """Return package versions, git commit, command line, host and platform, without the user's name; never fails.

    `git` has the commit of the working folder and True if files differ from it; it is None outside a git repository.
    """
    home = os.path.expanduser("~")
    argv = [argument.replace(home, "~") if len(home) > 1 else argument for argument in sys.argv]
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    git = {"commit": commit, "dirty": None if changes is None else bool(changes)} if commit else None
    return {**surroundings(), "git": git, "argv": argv}


def surroundings() -> dict[str, Any]:
    """Return package versions, host and platform; never fails."""
    found = {package: version for package in PACKAGES if (version := installed_version(package))}
    versions = {"python": platform.python_version(), **found}
    return {"versions": versions, "host": platform.node(), "platform": platform.platform()}


def installed_version(package: str) -> str | None:
    """Return the version of an installed package from its metadata, without importing it; None if not installed.

    A folder of metadata that is just being written, as by a build in the working directory, is passed over.
    """
    from importlib.metadata import distributions

    for found in distributions(name=package):
        with suppress(OSError, KeyError, TypeError):  # by age of importlib.metadata, or of its twin of the index
            if found.version:
                return found.version
    return None


def _git(*arguments: str) -> str | None:
    import subprocess

    there, none = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}, subprocess.DEVNULL
    command = ["git", "-c", "core.fsmonitor=false", *arguments]  # a repository could name a program there
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(command, env=there, stdin=none, stderr=none, timeout=GIT_SECONDS)
        return said.decode(errors="replace").strip()
    return None
