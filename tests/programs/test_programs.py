"""Programs in the manner of Pyro's examples and of pyroVED, each beside Pyro's own figures and closed forms.

The table of `tests/README.md` is made from what these tests are held to.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.guide import GuideMessenger

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.bounds.gap import gap
from pvae.analysis.bounds.weights import Evidence
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.export.posterior import posterior
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.report import report
from pvae.errors import PvaeError
from pvae.pair.running import modules_within
from pvae.training.fit import fit
from tests.programs.cells import REASONS, WORKS, cell, refusal, written
from tests.programs.program import Program
from tests.programs.table import COLUMNS, PROGRAMS

ROUNDING = 1e-4
"""Relative difference of two sums in float32."""
SHORT_REPORTS = ("VAE", "DMM, ragged", "HMM, ragged", "regression, AutoNormal", "plates without a size")
"""Programs whose report is written in every run of the tests: of rows, of steps, summed out, of globals, bare."""
SHARP = (
    "global and local",
    "linear state space",
    "mixture, enumerated guide",
    "plates without a size",
    "subsample plate",
)
"""Programs whose guide is near enough to the posterior for the evidence to reach log p(x)."""
every_program = pytest.mark.parametrize("name", PROGRAMS)


@cache
def made(name: str) -> Program:
    """A program of the table; its tests share it, but for the fit."""
    with seeded():
        return PROGRAMS[name]()


@cache
def pair_of(name: str) -> Any:
    return made(name).pair


@contextmanager
def seeded() -> Iterator[None]:
    pyro.set_rng_seed(1)
    try:
        yield
    finally:
        pyro.clear_param_store()


@cache
def figures_of_pyro(name: str, count: int = 60) -> tuple[float, float]:
    """ELBO per datum and its standard error: the closed form, else Pyro's loss in evaluation mode."""
    program = made(name)
    if program.elbo is not None:
        return float(program.elbo()), 0.0
    model, guide = program.bound or (program.model, program.guide)
    data = program.data if isinstance(program.data, tuple) else (program.data,)
    loss: Any = TraceEnum_ELBO(max_plate_nesting=program.plates, strict_enumeration_warning=False)
    if isinstance(guide, GuideMessenger):  # which knows the plain loss only
        loss = Trace_ELBO()
    size = program.size or program.rows
    modules = modules_within([model, guide])
    with seeded(), torch.no_grad():
        for module in modules:
            module.eval()
        found = torch.tensor([-loss.loss(model, guide, *data) / size for _ in range(count)])
        for module in modules:
            module.train()
    return float(found.mean()), float(found.std() / math.sqrt(count))


def agrees(found: Estimate, mean: float, error: float) -> bool:
    """True if two figures differ by less than four standard errors of both."""
    return abs(found.value - mean) < 4 * math.hypot(found.standard_error, error) + ROUNDING * (1 + abs(mean))


def held_to(name: str, column: str, act: Callable[[], Any]) -> Any:
    """The result; None where the table says that it is refused, which it is then, in those words."""
    words = refusal(name, column)
    if words is None:
        return act()
    with pytest.raises(PvaeError, match=words):
        act()
    return None


@every_program
def test_no_problem_is_found(name):
    with seeded():
        found = pair_of(name).check(made(name).data)
    words = refusal(name, "check")
    assert not found if words is None else re.search(words, str(found[0]))


@every_program
def test_the_surgery_gives_the_elbo_of_pyro(name):
    with seeded():
        found = held_to(name, "surgery", lambda: surgery(pair_of(name), made(name).data, samples=20))
    if found is None:
        return
    figure = found.log_joint if cell(name, "surgery") == "log joint" else found.elbo
    assert figure is not None
    assert (found.elbo is None) == (cell(name, "surgery") == "log joint")
    assert agrees(figure, *figures_of_pyro(name)), (figure, figures_of_pyro(name))
    if found.marginal_kl is not None and found.mutual_information is not None:
        assert found.marginal_kl.value > -4 * found.marginal_kl.standard_error - ROUNDING


@every_program
def test_the_evidence_is_below_log_p_and_begins_at_the_elbo(name):
    program = made(name)
    with seeded():
        found = held_to(name, "evidence", lambda: evidence(pair_of(name), program.data, samples=60))
    if found is None:
        return
    assert isinstance(found, Evidence)
    if cell(name, "evidence") == WORKS and program.size is None:
        assert agrees(found.elbo, *figures_of_pyro(name)), (found.elbo, figures_of_pyro(name))
    if program.log_p is not None:
        assert found.iwae.value < program.log_p + 4 * found.iwae.standard_error + ROUNDING * (1 + abs(program.log_p))
        assert found.exact is None or agrees(found.exact, program.log_p, 0.0)


@pytest.mark.parametrize("name", SHARP)
def test_the_evidence_of_many_samples_is_log_p(name):
    log_p = made(name).log_p
    assert log_p is not None
    with seeded():
        found = evidence(pair_of(name), made(name).data, samples=5000).iwae
    assert abs(found.value - log_p) < 4 * found.standard_error + 2e-3


@every_program
def test_the_gap_splits_or_is_refused(name):
    with seeded():
        found = held_to(
            name, "gap", lambda: gap(pair_of(name), made(name).data, steps=3, samples=10, evidence_samples=50)
        )
    if found is not None:
        assert found.inference.value == pytest.approx(found.approximation.value + found.amortisation.value, abs=1e-6)


@every_program
def test_it_is_fitted_and_gives_a_posterior(name, tmp_path):
    run = _fitted(name, tmp_path)
    if run is None:
        assert {cell(name, column) for column in ("posterior", "report")} == {"no run"}
        return
    assert run.status["state"] == "finished"
    assert all(torch.isfinite(p).all() for p in run.pair.parameters())
    found = posterior(run, split="train", draws=2)
    assert not any(array.isnull().any() for array in found["sample_stats"].data_vars.values())


def _fitted(name: str, folder: Path) -> Any:
    """A run of one epoch, from a pair that has seen no data."""
    with seeded():
        fresh = PROGRAMS[name]()
        options = ("train.epochs=1", "train.batch_size=10", "train.engine=eager", *fresh.options)
        return held_to(name, "fit", lambda: fit(fresh.pair, *options, data=fresh.data, run_dir=folder, progress=False))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHORT_REPORTS else pytest.mark.slow)
        for name in PROGRAMS
        if cell(name, "report") == WORKS
    ],
)
def test_its_report_is_written(name, tmp_path):
    run = _fitted(name, tmp_path)
    page = report(run, samples=2, evidence_samples=20, gap_steps=3).read_text(encoding="utf-8")
    assert "ELBO" in page


def test_at_least_thirty_programs_are_right_wherever_there_is_a_figure():
    right = [name for name in PROGRAMS if {cell(name, c) for c in ("check", "fit", "surgery", "evidence")} == {WORKS}]
    assert len(PROGRAMS) >= 36
    assert len(right) >= 30


def test_the_readme_holds_the_table():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert written() in text, "Write `tests.programs.cells.written()` into tests/README.md."
    known = {cell(name, column) for name in PROGRAMS for column in COLUMNS}
    assert known == {WORKS, *REASONS}
