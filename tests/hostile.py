"""What must hold of any declaration and any bytes: built, trained and read back, or refused by a typed error."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import constraints

import pvae
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError, NonFiniteError
from pvae.run import Run
from pvae.spec import Experiment
from pvae.svi import tensor_source
from tests.drawn import Drawn

LOCATED = re.compile(r"(\S+: (?s:.)*e|E)xpected (?s:.)+; got (?s:.)+")
"""A dotted path (after the file's name where there is one), what was expected, what was found; without a path, what is
too large as a whole."""


def require_located(error: DeclarationError, origin: str = "") -> None:
    """Every problem begins with its path and says what was expected and what was found."""
    for problem in error.problems:
        if not LOCATED.fullmatch(problem.removeprefix(f"{origin}: ")):
            raise AssertionError(f"no path, expectation or finding: {problem}") from error


def data_for(experiment: Experiment, drawn: Drawn) -> Dataset:
    """Rows that the likelihood can score; or rows that are drawn without a look at it."""
    generator = torch.Generator().manual_seed(drawn.seed)
    binarize = experiment.data.binarize != "none"
    support = constraints.unit_interval if binarize else elementwise(experiment.decoder.support)
    x = rows_in(support, (drawn.rows, *drawn.shape), generator, drawn.fitting)
    y = None
    for covariate in experiment.covariates.values():
        y = torch.randint(covariate.labels if drawn.fitting else 5, (drawn.rows,), generator=generator)
    return Dataset.from_tensors(x, y, declared=tensor_source(experiment))


def elementwise(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint of one element of an event."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def rows_in(support: constraints.Constraint, shape: tuple[int, ...], generator: torch.Generator, fitting: bool) -> Tensor:
    """Random numbers in a support: normal, uniform, or small whole numbers, whichever it takes."""
    even = torch.rand(shape, generator=generator)
    for x in (torch.randn(shape, generator=generator), even, even.round(), (even * 3).floor()):
        if not fitting or bool(support.check(x).all()):
            return x
    return (even * 20).floor() / 20 + 1


def try_declaration(drawn: Drawn, folder: Path) -> str:
    """Refused with paths; or built, trained and read back as it was. Returns what became of it."""
    try:
        experiment = Experiment.from_dict(drawn.raw, "drawn")
    except DeclarationError as error:
        require_located(error, "drawn")
        return "refused"
    if Experiment.from_toml(experiment.to_toml()) != experiment:
        raise AssertionError("the declaration does not round-trip")
    try:
        data = data_for(experiment, drawn)
        run = pvae.fit(experiment, data=data, run_dir=folder, device="cpu", progress=False)
    except DeclarationError as error:
        require_located(error)
        return "refused by its data's shape"
    except DataError as error:
        if "xpected" not in str(error):
            raise
        return "data refused"
    except NonFiniteError:
        return "not finite"
    require_read_back(run, run.data)
    return "trained"


def require_read_back(run: Run, data: Dataset) -> None:
    """From disk come the same declaration and the same weights, and from one seed the same figures, bit for bit."""
    again = Run.load(run.path, data=data)
    if again.plan != run.plan:
        raise AssertionError("the run's declaration is another one")
    weights = run.pair.state_dict()
    if set(weights) != set(again.pair.state_dict()):
        raise AssertionError("the run's weights have other names")
    for name, value in again.pair.state_dict().items():
        if not same_bits(value, weights[name]):
            raise AssertionError(f"{name} is not what was saved")
    x, measure = data.test.x[:8], run.plan.objective.measure
    if repr(measure(run.pair, x, 1)) != repr(measure(again.pair, x, 1)):
        raise AssertionError("the same seed gives other figures")
    if problems := [] if run.pair.implicit else run.pair.check(x[:3]):
        raise AssertionError(f"the pair is not sound: {'; '.join(map(str, problems))}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN and all."""
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
