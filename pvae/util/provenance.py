"""What a run was made with. Standard library only; never fails."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from typing import Any

GIT_SECONDS = 5.0
PACKAGES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz", "pandas", "pydantic", "safetensors", "scikit-learn")


def provenance() -> dict[str, Any]:
    """What a run was made with: versions, git commit, command, host, platform; no user's name; never fails."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git_state(),
        "argv": [_without_home(argument) for argument in sys.argv],
        "host": platform.node(),
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str]:
    """The installed versions, from their metadata: importing the packages takes seconds."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_state() -> dict[str, Any] | None:
    """The commit of the working folder and whether it differs from it, or None outside of git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)} if commit else None


def _git(*arguments: str) -> str | None:
    import subprocess

    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _without_home(argument: str) -> str:
    home = os.path.expanduser("~")
    return argument if len(home) < 2 else argument.replace(home, "~")
