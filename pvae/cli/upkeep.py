"""Commands that look after runs and the machine: verify, doctor, clean."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pvae.cli.app import DATA_DIR, JSON, RUN, RUN_DIR, RUNS, app, emit, say, tell


@app.command()
def verify(
    run: RUN,
    data: Annotated[
        bool, typer.Option("--data", help="Read the data too, and compute the recorded ELBO again.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when there are warnings.")] = False,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Look at every file of a run: is it whole, which checkpoint would be loaded, which are damaged and why."""
    from pvae.component import load_plugins
    from pvae.upkeep.verify import verify as look

    load_plugins(report=lambda line: tell(line, err=True))
    found = look(run, root=run_dir, data=data, data_dir=data_dir)
    _show(found, as_json=as_json)
    if not found.ok:
        raise typer.Exit(65)
    if strict and found.of("warning"):
        raise typer.Exit(3)


@app.command()
def doctor(run_dir: RUN_DIR = RUNS, data_dir: DATA_DIR = None, as_json: JSON = False) -> None:
    """Look at the machine: packages, devices, threads, compiler, folders, data, arithmetic; and what to do."""
    from pvae.upkeep.doctor import doctor as look

    found = look(run_dir, data_dir)
    _show(found, as_json=as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def clean(
    apply: Annotated[bool, typer.Option("--apply", help="Remove; else only say what would go.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Also runs that ended before a first checkpoint.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Also downloaded and decoded data.")] = False,
    run_dir: RUN_DIR = RUNS,
    as_json: JSON = False,
) -> None:
    """Show what interrupted writes and old checkpoints take, or remove it; a run at work is left alone."""
    from pvae.upkeep.clean import clean as sweep

    found = sweep(run_dir, apply=apply, failed=failed, cache=cache)
    _show(found, as_json=as_json)
    if found.failed:
        raise typer.Exit(74)


def _show(found: Any, *, as_json: bool) -> None:
    """JSON for programs, a table on a terminal, plain lines elsewhere."""
    if as_json:
        emit(found.to_dict())
    elif sys.stdout.isatty():
        say(found)
    else:
        tell(str(found))
