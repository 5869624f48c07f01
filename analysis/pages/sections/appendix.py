"""Appendix of a report: model declaration, environment of the run, and analyses that could not be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pvae.analysis.pages.document.blocks import Listing, Note, PageTable, Part, columns, section
from pvae.analysis.pages.sections.examination import Examination
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.runs.run import Run


@section("declaration", "Declaration", is_appendix=True)
def declaration(exam: Examination) -> Iterator[Part]:
    """Yield the formulas of model and guide, and the declaration of the run as TOML."""
    if isinstance(exam.run.plan, Experiment):
        found = formulas(exam.run.plan)
        yield Listing(f"{found['model']}\n{found['guide']}", "Formulas")
        yield Listing(f"{found['model_latex']}\n{found['guide_latex']}", "In LaTeX", folded=True)
    else:
        yield Note("A hand-written pair: model and guide are Pyro programs of the user.")
    yield Listing(exam.run.files.spec_text, "Declaration as TOML")


@section("environment", "Environment", is_appendix=True)
def environment(exam: Examination) -> Iterator[Part]:
    """Yield state, device, threads, seed, data and software versions of the run."""
    told = environment_of(exam.run)
    yield PageTable("environment", "Environment of the run", columns("what", words=["value"]), told)
    yield {"environment": dict(told)}


@section("left_out", "Left out", is_appendix=True)
def left_out(exam: Examination) -> Iterator[Part]:
    """Yield the analyses that failed, with the reason of each; this section must be computed after all others."""
    if exam.missing:
        titles = columns("what", words=["why"])
        yield PageTable("left_out", "Not available for this run", titles, tuple(exam.missing.items()))
    yield {"missing": dict(exam.missing)}


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
        ("precision", manifest.get("precision")),
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
