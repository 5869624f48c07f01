"""Commands on declarations: list, new, columns, schema, check, show."""

import json
from pathlib import Path
from typing import Any

import typer

import pvae
from pvae.cli.app import Shared, command, load_declaration
from pvae.errors import misdeclared, text
from pvae.experiment import zoo
from pvae.util import write_atomic


@command("as_json", name="list")
def list_zoo(shared: Shared) -> None:
    """List the zoo: the model declarations that come with pvae."""
    from rich.table import Table
    from rich.text import Text

    entries = zoo.entries()
    table = Table.grid(padding=(0, 2))
    for entry in entries:
        table.add_row(*map(Text, entry))
    shared.answer([{"name": name, "description": text} for name, text in entries], table)


@command()
def new(_: Shared, name: str, like: str | None = None) -> None:
    """Write a TOML file with a declaration to start from."""
    from pvae.runs.find import slug

    misdeclared("/" in name or "\\" in name, f"{name}: expected a name, not a path; the file is written here.")
    misdeclared((path := Path(f"{slug(name)}.toml")).exists(), "cli.declarations.exists", path=path)
    lines = zoo.find(like or (name if name in zoo.names() else "vae")).read_text().splitlines()
    body = [line for line in lines if not line.startswith("name =")]
    head = ["#:schema pvae.schema.json", f"name = {json.dumps(name, ensure_ascii=False)}"]
    write_atomic(path, "\n".join([*head, *body, ""]))
    typer.echo(f"wrote {path}; check it with: pvae check {path}")
    typer.echo("for completion in an editor: pvae schema > pvae.schema.json")


@command("data_dir", "as_json")
def columns(shared: Shared, file: str, label: str | None = None) -> None:
    """Guess the type of every column of a table, and print a declaration to start from."""
    import tomli_w

    from pvae.data.tables.guess import guess

    found = guess(file, shared.data_dir, label)
    lines = [f"# guessed from the first {found.rows:,} rows: look at every column"]
    lines += [f"# left out: {json.dumps(n, ensure_ascii=False)}, {why}" for n, why in found.left_out.items()]
    data = {"declaration": found.declaration, "left_out": dict(found.left_out), "rows": found.rows}
    shared.answer(data, "\n".join([*lines, tomli_w.dumps(found.declaration).rstrip()]))


@command()
def schema(_: Shared) -> None:
    """Print the JSON Schema of a declaration, for editors."""
    typer.echo(pvae.Experiment.schema_json())


@command("data_dir", "as_json")
def check(shared: Shared, name: str, overrides: list[str] | None = None, build: bool = False) -> None:
    """Check a declaration; with --build also its data, shapes and one ELBO on a tiny batch."""
    experiment = load_declaration(name, overrides)
    found: dict[str, Any] = {"file": name, "ok": True, "name": experiment.name}
    if not build:
        shared.answer(found, f"{name}: ok")
        return
    from pvae.runs.weights import attended
    from pvae.training.evaluation import evaluate

    data = experiment.conditioned(experiment.load_data(shared.data_dir))
    data.require_support(experiment.observed().support, experiment.decoder.likelihood.hint)
    pair, rows = attended(experiment.build(data.shape), lambda: data.train), data.train.rows[:4]
    misdeclared(problems := pair.check(rows), [f"{name}: {problem}" for problem in problems])
    total = ""
    if (figures := experiment.objective.measure(pair, rows, experiment.seed)) is None:
        figures, total = evaluate(pair, rows, experiment.seed), pair.structure.total
    count = sum(p.numel() for p in pair.parameters())
    found |= {"shape": list(data.shape), "rows": len(data.train), "parameters": count, "before_training": figures}
    found["notes"] = list(data.notes)
    shared.answer(found, text("cli.declarations.checked", total=total, batch=len(rows), found=found), *data.notes)


@command("data_dir", "as_json")
def show(shared: Shared, name: str, overrides: list[str] | None = None, pyro: bool = False) -> None:
    """Print a declaration with its graph, formulas, shapes and parameter counts, or as a Pyro script."""
    from pvae.experiment.readback import described, render

    experiment = load_declaration(name, overrides)
    shape = experiment.load_data(shared.data_dir).shape
    if pyro:
        script = experiment.to_pyro(shape)
        shared.answer({"script": script}, script.rstrip())
        return
    pair = experiment.build(shape)
    shared.answer(described(experiment, shape, pair), render(experiment, shape, pair))
