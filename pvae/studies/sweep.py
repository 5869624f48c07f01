"""Declaration of a study: a table `[sweep]` over declarations, values and seeds."""

import itertools
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from pvae.component import Names, Section, Table, from_table
from pvae.errors import DeclarationError
from pvae.util.toml import find as find_declared
from pvae.util.toml import flat

STUDIES_FOLDER = Path(__file__).parent.parent / "analysis" / "studies"
"""Folder of the studies that come with pvae."""
MAX_RUNS = 1000
"""Largest number of runs of one study."""
FIRST, SECOND = "fit", "refit"
"""Names of the stages of a case: the fit of the model, and the second stage that its declaration has under `refit`."""

SweptValues = Annotated[tuple[Any, ...], Field(strict=False, min_length=1, max_length=MAX_RUNS)]
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
    grid: dict[str, SweptValues] = {}
    """List of values for each dotted path; every combination of them is a case."""
    zip: dict[str, SweptValues] = {}
    """Lists of values of dotted paths that vary together, row by row; the key `label` names the rows."""
    refits: Annotated[tuple[Table[SecondStage], ...], Field(strict=False, max_length=100)] = ()
    measure: Table[Measure] = Measure()

    @field_validator("grid", "zip", mode="before")
    @classmethod
    def _dotted(cls, raw: Any) -> Any:
        """Flatten nested tables into dotted paths, each with its list of values."""
        return flat(raw) if isinstance(raw, dict) else raw


class StudyFile(Section):
    """Keys of a study file, apart from those of the declaration that it sweeps."""

    name: str = Field(min_length=1, max_length=100)
    description: str = ""
    sweep: Table[Sweep]


def names() -> list[str]:
    """Return the names of the studies that come with pvae, sorted."""
    return sorted(path.stem for path in STUDIES_FOLDER.glob("*.toml"))


def find(name_or_file: str) -> Path:
    """Return the TOML file of a study, given its name or path; raises DeclarationError if there is none."""
    return find_declared(name_or_file, STUDIES_FOLDER, "a study", "a TOML file with a table [sweep]")


# ---------------------------------------------------------------------- the file


def validated(raw: dict[str, Any], origin: str) -> StudyFile:
    """Return the validated keys of a study file; raises DeclarationError with every problem found in them."""
    if "sweep" not in raw:
        raise DeclarationError(f"{origin}: sweep: expected a table; got none. Fit one experiment with: pvae fit FILE.")
    own = {key: value for key, value in raw.items() if key in StudyFile.model_fields}
    file = from_table(StudyFile, own, origin)
    foreign = sorted(raw.keys() - StudyFile.model_fields.keys()) if file.sweep.specs else []
    problems = [f"{key}: expected in the files of sweep.specs; got it beside them. Move it there." for key in foreign]
    problems += _problems(file.sweep)
    if problems:
        raise DeclarationError([f"{origin}: {problem}" for problem in problems])
    return file


def _problems(sweep: Sweep) -> Iterator[str]:
    """Yield the problems that concern several keys of a sweep, such as too many runs or repeated labels."""
    lengths = {path: len(values) for path, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{path} {length}" for path, length in lengths.items())
        yield f"sweep.zip: expected lists of one length; got {told}."
    if set(lengths) == {"label"}:
        yield "sweep.zip: expected labels with values; got labels alone. Add a dotted path with its values."
    yield from _label_problems(sweep.zip.get("label", ()))
    for name in ("specs", "seeds"):
        if len(set(given := getattr(sweep, name))) < len(given):
            yield f"sweep.{name}: expected each once; got {list(given)}. Leave out the repeated ones."
    refits = [stage.label for stage in sweep.refits]
    if len({*refits, FIRST, SECOND}) < len(refits) + 2:
        yield f"sweep.refits: expected labels of their own, none {FIRST!r} or {SECOND!r}; got {refits}. Rename one."
    yield from _path_problems(sweep)
    rows, combinations = max(lengths.values(), default=1), prod(len(values) for values in sweep.grid.values())
    counts = (len(sweep.specs) or 1, rows, combinations, len(sweep.seeds) or 1, 1 + len(sweep.refits))
    if prod(counts) > MAX_RUNS:
        told = "{} specs x {} rows x {} combinations x {} seeds x {} stages".format(*counts)
        yield f"sweep: expected at most {MAX_RUNS} runs; got {prod(counts)} ({told}). Split the study."


def _label_problems(labels: Sequence[Any]) -> Iterator[str]:
    wrong = [label for label in labels if not isinstance(label, str) or not 0 < len(label) <= 100]
    if wrong:
        yield f"sweep.zip.label: expected texts of 1 to 100 characters; got {json.dumps(wrong[0], default=str)[:60]}."
    elif len(set(labels)) < len(labels):
        yield f"sweep.zip.label: expected a name of its own for each row; got {list(labels)}. Rename one."


def _path_problems(sweep: Sweep) -> Iterator[str]:
    """Yield a problem for each path of a sweep that cannot be swept or is swept twice."""
    paths = [("grid", path) for path in sweep.grid] + [("zip", path) for path in sweep.zip if path != "label"]
    for table, path in paths:
        root = path.partition(".")[0]
        if root in ("name", "description", "sweep", "seed", "label") or not all(path.split(".")):
            advice = "Use sweep.seeds." if root == "seed" else "Write it as an override has it, train.epochs."
            yield f"sweep.{table}: expected a dotted path of the declaration; got {path!r}. {advice}"
    for (one, first), (two, second) in itertools.combinations(paths, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            yield f"sweep.{two}: expected paths apart from each other; got {second!r} beside {first!r} of sweep.{one}."
