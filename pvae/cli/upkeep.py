"""Commands that maintain runs and check the machine: verify, doctor, clean."""

import sys
from typing import Any

import typer

import pvae
from pvae.cli.app import Shared, command, load_installed_plugins


@command("on_run")
def verify(shared: Shared, run: str, data: bool = False, strict: bool = False) -> None:
    """Check every file of a run: is it whole, which checkpoint would be loaded, which are damaged and why."""
    load_installed_plugins()
    found = pvae.verify(run, root=shared.run_dir, data=data, data_dir=shared.data_dir)
    _answer(shared, found, 65 if not found.ok else 3 if strict and found.of("warning") else 0)


@command("on_run")
def doctor(shared: Shared) -> None:
    """Check the machine: packages, devices, threads, compiler, folders, data, arithmetic; and say what to do."""
    from pvae.upkeep.doctor import doctor as check

    found = check(shared.run_dir, shared.data_dir)
    _answer(shared, found, 0 if found.ok else 1)


@command("run_dir", "as_json")
def clean(shared: Shared, apply: bool = False, failed: bool = False, cache: bool = False) -> None:
    """Show the disk space of interrupted writes and old checkpoints, or free it; a run in progress is left alone."""
    found = pvae.clean(shared.run_dir, apply=apply, failed=failed, cache=cache)
    _answer(shared, found, 74 if found.failed else 0)


def _answer(shared: Shared, found: Any, code: int) -> None:
    """Print a result, as JSON, a table on a terminal or plain lines elsewhere, and end with an exit code."""
    shared.answer(found.to_dict(), found if sys.stdout.isatty() else str(found))
    raise typer.Exit(code)
