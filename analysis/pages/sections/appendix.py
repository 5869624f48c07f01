"""What was declared, what it was run with, and what could not be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pvae.analysis.pages.document.document import Block, Code, Column, Note, Section, Table
from pvae.analysis.pages.sections.examination import Case
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.runs.run import Run


def declaration(case: Case) -> Section:
    """Model and guide as formulas, and the whole declaration."""
    blocks: list[Block] = []
    if isinstance(case.run.plan, Experiment):
        found = formulas(case.run.plan)
        blocks.append(Code("\n".join((found["model"], found["guide"])), "Formulas"))
        latex = "\n".join((found["model_latex"], found["guide_latex"]))
        blocks.append(Code(latex, "In LaTeX", folded=True))
    else:
        blocks.append(
            Note("A hand-written pair: model and guide are Pyro programs of the user; below is how they were fitted.")
        )
    blocks.append(Code(case.run.files.spec_text, "Declaration as TOML"))
    return Section("declaration", "Declaration", tuple(blocks), is_appendix=True)


def environment(case: Case) -> Section:
    """What the run was made with."""
    told = environment_of(case.run)
    table = Table("environment", "What the run was made with", (Column("what"), Column("value", is_text=True)), told)
    return Section("environment", "Environment", (table,), numbers={"environment": dict(told)}, is_appendix=True)


def left_out(case: Case) -> Section | None:
    """What this report has no figure for, and why: comes last, when all others have been made."""
    if not case.missing:
        return Section("left_out", "", numbers={"missing": {}}, is_appendix=True)
    rows = tuple(case.missing.items())
    columns = (Column("what"), Column("why", is_text=True))
    table = Table("left_out", "Not available for this run", columns, rows)
    return Section("left_out", "Left out", (table,), numbers={"missing": dict(case.missing)}, is_appendix=True)


def environment_of(run: Run) -> tuple[tuple[str, str], ...]:
    """(what, value) from the run's manifest and status."""
    manifest, status = run.files.manifest, run.status
    data = _table(manifest.get("data"))
    git = _table(manifest.get("git"))
    told = [
        ("run", f"{run.name} / {run.path.name}"),
        ("started", manifest.get("started")),
        ("state", f"{status.get('state')}, epoch {status.get('epoch')} of {status.get('epochs')}"),
        ("training time", f"{status.get('seconds')} s"),
        ("device", manifest.get("device")),
        ("engine", status.get("engine", manifest.get("engine"))),
        ("threads", manifest.get("threads")),
        ("seed", manifest.get("seed")),
        ("data", f"{data.get('source')}, shape {data.get('shape')}"),
        ("data fingerprint", data.get("fingerprint")),
        ("commit", f"{git['commit']}{' (changed since)' if git.get('dirty') else ''}" if git.get("commit") else None),
        ("platform", manifest.get("platform")),
        *_table(manifest.get("versions")).items(),
    ]
    return tuple((str(what), str(value)) for what, value in told if value is not None)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
