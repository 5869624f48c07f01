"""Declaration of a study: tables `[sweep]` over declarations, values and seeds, and `[search]` over ranges."""

import itertools
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pvae.component import Names, Section, Table, from_table
from pvae.errors import misdeclared, text
from pvae.util import toml

STUDIES_FOLDER = Path(__file__).parent.parent / "analysis" / "studies"
"""Folder of the studies that come with pvae."""
MAX_RUNS = 1000
"""Largest number of runs of one study."""
FIRST, SECOND = "fit", "refit"
"""Names of the stages of a case: the fit of the model, and the second stage that its declaration has under `refit`."""


def _dotted(*ends: str) -> BeforeValidator:
    """Return the validator that flattens nested tables into dotted paths; one with a key of `ends` stays a table."""
    return BeforeValidator(lambda raw: toml.flat(raw, stop=frozenset(ends)) if isinstance(raw, dict) else raw)


SweptValues = Annotated[tuple[Any, ...], Field(strict=False, min_length=1, max_length=MAX_RUNS)]
Axes = Annotated[dict[str, SweptValues], _dotted()]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(strict=False, max_length=MAX_RUNS)]
Label = Annotated[str, Field(min_length=1, max_length=100)]


class SecondStage(Section):
    """A table `[[sweep.refits]]`: new priors, fitted to finished first stages with everything else frozen."""

    label: Label
    of: Names = ()
    """Labels of the cases that get this second stage, or parts of their labels; all cases unless set."""
    overrides: dict[str, Any] = Field(min_length=1)
    """Overrides that declare the new priors and their training, as `pvae refit` takes them."""


class Measure(Section):
    """Settings of the metrics that are computed for every finished run."""

    samples: int = Field(default=1, gt=0)
    """Samples of z per datum in the ELBO surgeries of the train and test splits."""
    evidence: int = Field(default=500, ge=0)
    """Importance samples per test datum for the IWAE bound on log p(x); 0 leaves it out."""
    rows: int | None = Field(default=None, gt=1)
    """Largest number of rows of each split that are used, chosen at random; all unless set."""


class Sweep(Section):
    """The table `[sweep]`: every declaration is fitted for every zipped row, grid point and seed."""

    specs: Names = Field(default=(), max_length=MAX_RUNS)
    """Zoo names, or TOML files below the study's folder; the study's own declaration unless set."""
    seeds: Seeds = ()
    """Random seeds with which each case is fitted; that of the declaration unless set."""
    grid: Axes = {}
    """List of values for each dotted path; every combination of them is a case."""
    zip: Axes = {}
    """Lists of values of dotted paths that vary together, row by row; the key `label` names the rows."""
    refits: Annotated[tuple[Table[SecondStage], ...], Field(strict=False, max_length=100)] = ()
    measure: Table[Measure] = Measure()


class SearchRange(Section):
    """Range of a searched value, `{ low = 8, high = 64, log = true }`; of whole numbers if both ends are."""

    low: int | float
    high: int | float
    log: bool = False
    """True to sample the logarithm of the value."""


class Search(Section):
    """The table `[search]`: trials of the file's own declaration, whose values Optuna chooses by their figures."""

    ranges: Annotated[dict[str, Table[SearchRange]], _dotted("low", "high")] = {}
    """Range of each dotted path."""
    choices: Axes = {}
    """List of values for each dotted path."""
    figure: Literal["elbo", "iwae", "new_gain_upper", "bits_per_dimension"] = "elbo"
    """Figure of the validation split that is optimised: ELBO or IWAE bound (maximised); the upper end of the interval
    for what a better prior wins on new data, or bits per dimension (minimised)."""
    trials: int = Field(ge=1, le=MAX_RUNS)
    """Number of trials, with those that are pruned or fail."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Rule that stops a trial early by its validation ELBO of each epoch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the choices of values."""
    storage: str | None = None
    """URL of an Optuna database; a journal file in the study's folder unless set."""
    measure: Table[Measure] = Measure(evidence=50)
    """Settings of the figure."""

    @property
    def sign(self) -> int:
        """Return 1 if the figure is maximised, -1 if it is minimised."""
        return 1 if self.figure in ("elbo", "iwae") else -1

    @property
    def ends(self) -> dict[str, tuple[Any, ...]]:
        """Return by path the values that are checked before anything runs: both ends of a range, or all choices."""
        return {path: (given.low, given.high) for path, given in self.ranges.items()} | self.choices


class StudyFile(Section):
    """Keys of a study file, apart from those of the declaration that it sweeps."""

    name: str = Field(min_length=1, max_length=100)
    description: str = ""
    sweep: Table[Sweep] = Sweep()
    search: Table[Search] | None = None


def find(name_or_file: str) -> Path:
    """Return the TOML file of a study, given its name or path; raises DeclarationError if there is none."""
    return toml.find(name_or_file, STUDIES_FOLDER, "a study", "a TOML file with a table [sweep]")


# ---------------------------------------------------------------------- the file


def validated(raw: dict[str, Any], origin: str) -> StudyFile:
    """Return the validated keys of a study file; raises DeclarationError with every problem found in them."""
    misdeclared(not {"sweep", "search"} & raw.keys(), "studies.sweep.none", origin=origin)
    file = from_table(StudyFile, {key: value for key, value in raw.items() if key in StudyFile.model_fields}, origin)
    foreign = sorted(raw.keys() - StudyFile.model_fields.keys()) if file.sweep.specs else []
    problems = [f"{key}: expected in the files of sweep.specs; got it beside them. Move it there." for key in foreign]
    problems += [*_problems(file.sweep), *(_range_problems(file.search) if file.search else ())]
    if file.search and file.sweep.specs:
        problems.append("search: expected the declaration in this file; got sweep.specs. Write two files.")
    misdeclared(problems, [f"{origin}: {problem}" for problem in problems])
    return file


def _problems(sweep: Sweep) -> Iterator[str]:
    """Yield the problems that concern several keys of a sweep, such as too many runs or repeated labels."""
    lengths = {path: len(values) for path, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        yield text("studies.sweep.lengths", lengths=lengths)
    if set(lengths) == {"label"}:
        yield "sweep.zip: expected labels with values; got labels alone. Add a dotted path with its values."
    yield from _label_problems(sweep.zip.get("label", ()))
    for name in ("specs", "seeds"):
        if len(set(given := getattr(sweep, name))) < len(given):
            yield f"sweep.{name}: expected each once; got {list(given)}. Leave out the repeated ones."
    refits = [stage.label for stage in sweep.refits]
    if len({*refits, FIRST, SECOND}) < len(refits) + 2:
        yield f"sweep.refits: expected labels of their own, none {FIRST!r} or {SECOND!r}; got {refits}. Rename one."
    paths = [("grid", path) for path in sweep.grid] + [("zip", path) for path in sweep.zip if path != "label"]
    yield from _path_problems("sweep", paths, "Use sweep.seeds.")
    rows, combinations = max(lengths.values(), default=1), prod(len(values) for values in sweep.grid.values())
    counts = (len(sweep.specs) or 1, rows, combinations, len(sweep.seeds) or 1, 1 + len(sweep.refits))
    if prod(counts) > MAX_RUNS:
        yield text("studies.sweep.runs", most=MAX_RUNS, runs=prod(counts), counts=counts)


def _label_problems(labels: Sequence[Any]) -> Iterator[str]:
    if wrong := [label for label in labels if not isinstance(label, str) or not 0 < len(label) <= 100]:
        yield f"sweep.zip.label: expected texts of 1 to 100 characters; got {json.dumps(wrong[0], default=str)[:60]}."
    elif len(set(labels)) < len(labels):
        yield f"sweep.zip.label: expected a name of its own for each row; got {list(labels)}. Rename one."


def _range_problems(search: Search) -> Iterator[str]:
    """Yield a problem for each path of a search that is none, and each range that is empty."""
    paths = [("ranges", path) for path in search.ranges] + [("choices", path) for path in search.choices]
    yield from _path_problems("search", paths, "Every trial has the file's seed.")
    if not paths:
        yield "search: expected ranges or choices; got neither."
    for path, given in search.ranges.items():
        if given.low >= given.high or (given.log and given.low <= 0):
            yield text("studies.sweep.range", path=path, given=given)


def _path_problems(name: str, paths: Sequence[tuple[str, str]], of_seeds: str) -> Iterator[str]:
    """Yield a problem for each path of a sweep or search, after its table, that cannot be varied or is varied twice."""
    for table, path in paths:
        root = path.partition(".")[0]
        if root in ("name", "description", "sweep", "search", "seed", "label") or not all(path.split(".")):
            advice = of_seeds if root == "seed" else "Write it as an override has it, train.epochs."
            yield f"{name}.{table}: expected a dotted path of the declaration; got {path!r}. {advice}"
    for (one, first), (two, second) in itertools.combinations(paths, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            yield text("studies.sweep.apart", name=name, one=one, first=first, two=two, second=second)
