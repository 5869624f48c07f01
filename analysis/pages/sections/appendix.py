"""Appendix of a report: model declaration, environment of the run, and analyses that could not be computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pvae.analysis.pages.document.blocks import Block, Listing, Note, PageSection, PageTable, columns
from pvae.analysis.pages.sections.examination import Examination
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.runs.run import Run


def declaration(exam: Examination) -> PageSection:
    """Return the section with the formulas of model and guide, and the declaration of the run as TOML."""
    blocks: list[Block] = [Note("A hand-written pair: model and guide are Pyro programs of the user.")]
    if isinstance(exam.run.plan, Experiment):
        found = formulas(exam.run.plan)
        latex = "\n".join((found["model_latex"], found["guide_latex"]))
        blocks = [
            Listing("\n".join((found["model"], found["guide"])), "Formulas"),
            Listing(latex, "In LaTeX", folded=True),
        ]
    blocks.append(Listing(exam.run.files.spec_text, "Declaration as TOML"))
    return PageSection("declaration", "Declaration", tuple(blocks), is_appendix=True)


def environment(exam: Examination) -> PageSection:
    """Return the section with state, device, threads, seed, data and software versions of the run."""
    told = environment_of(exam.run)
    table = PageTable("environment", "Environment of the run", columns("what", words=["value"]), told)
    return PageSection("environment", "Environment", (table,), numbers={"environment": dict(told)}, is_appendix=True)


def left_out(exam: Examination) -> PageSection:
    """Return the section that lists analyses that failed, with the reason; it must be computed after all others."""
    missing = dict(exam.missing)
    table = PageTable("left_out", "Not available for this run", columns("what", words=["why"]), tuple(missing.items()))
    blocks = (table,) if missing else ()
    title = "Left out" if missing else ""
    return PageSection("left_out", title, blocks, numbers={"missing": missing}, is_appendix=True)


def environment_of(run: Run) -> tuple[tuple[str, str], ...]:
    """Return (name, value) pairs on state, device, seed, data and versions of a run, from its manifest and status."""
    manifest, status = run.files.manifest, run.status
    data, git = _mapping(manifest.get("data")), _mapping(manifest.get("git"))
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
        *_mapping(manifest.get("versions")).items(),
    ]
    return tuple((str(what), str(value)) for what, value in told if value is not None)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
