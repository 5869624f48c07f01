"""Commands on declarations: list, new, schema, check, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvae.cli.app import (
    DATA_DIR,
    JSON,
    NAME,
    OVERRIDES,
    app,
    emit,
    load_declaration,
    say,
)
from pvae.errors import DeclarationError

if TYPE_CHECKING:
    pass


@app.command("list")
def list_zoo(as_json: JSON = False) -> None:
    """Show the zoo: one declared file for every system."""
    from pvae import zoo

    entries = zoo.entries()
    if as_json:
        emit([{"name": name, "description": text} for name, text in entries])
        return
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        typer.echo(f"{name:{width}}  {text}")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the experiment; writes NAME.toml.")],
    like: Annotated[str | None, typer.Option("--like", help="Zoo entry to start from (vae unless said).")] = None,
) -> None:
    """Write a starter file."""
    from pvae import zoo
    from pvae.rundir import slug

    if "/" in name or "\\" in name:
        raise DeclarationError(f"{name}: expected a name, not a path; the file is written here.")
    path = Path(f"{slug(name)}.toml")
    if path.exists():
        raise DeclarationError(f"{path}: expected a new name; a file of this name is there already.")
    lines = zoo.find(like or (name if name in zoo.names() else "vae")).read_text().splitlines()
    body = [line for line in lines if not line.startswith("name =")]
    head = ["#:schema pvae.schema.json", f"name = {json.dumps(name, ensure_ascii=False)}"]
    path.write_text("\n".join([*head, *body, ""]))
    typer.echo(f"wrote {path}; check it with: pvae check {path}")
    typer.echo("for completion in an editor: pvae schema > pvae.schema.json")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a declaration, for editors."""
    from pvae.spec import Experiment

    typer.echo(Experiment.schema_json())


@app.command()
def check(
    file: NAME,
    overrides: OVERRIDES = None,
    build: Annotated[bool, typer.Option("--build", help="Also load data, build, and take one loss.")] = False,
    data_dir: DATA_DIR = None,
) -> None:
    """Check a declaration; with --build also its data, shapes and one ELBO on a tiny batch."""
    experiment = load_declaration(file, overrides)
    if not build:
        typer.echo(f"{file}: ok")
        return
    from pvae.data import load
    from pvae.trainer import evaluate

    data = experiment.conditioned(load(experiment.data, data_dir=data_dir, seed=experiment.seed))
    data.require_support(experiment.decoder.support, experiment.decoder.likelihood.hint)
    pair = experiment.build(data.shape)
    rows = data.train.x[:4]
    problems = pair.check(rows)
    if problems:
        raise DeclarationError([f"{file}: {problem}" for problem in problems])
    measured = experiment.objective.measure(pair, rows, experiment.seed)
    if measured is None:
        elbo = evaluate(pair, rows, experiment.seed)["elbo"]
        said = f"ELBO of {len(rows)} rows before training {elbo:.2f} nats per datum"
    else:
        said = f"critic's loss of {len(rows)} rows before training {measured['critic_loss']:.2f} nats; no likelihood"
    count = sum(p.numel() for p in pair.parameters())
    typer.echo(f"{file}: ok; x {list(data.shape)}, {len(data.train)} training rows, {count:,} parameters, {said}")


@app.command()
def show(file: NAME, overrides: OVERRIDES = None, data_dir: DATA_DIR = None) -> None:
    """Read a declaration back: graph, formulas, shapes, parameter counts."""
    from pvae.data import load
    from pvae.show import render

    experiment = load_declaration(file, overrides)
    data = load(experiment.data, data_dir=data_dir, seed=experiment.seed)
    say(render(experiment, data.shape, experiment.build(data.shape)))
