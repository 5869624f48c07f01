"""Cases of a study: all combinations of declaration, zipped row, grid point and seed, checked before any fit."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pvae.data.sources.python import TensorSource
from pvae.data.sources.tabular import FrameSource
from pvae.errors import DeclarationError, near
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.experiment.overrides import apply_overrides
from pvae.studies.sweep import FIRST, SECOND, Measure, StudyFile, Sweep, find, validated
from pvae.training.resume import stage_of
from pvae.util import toml

MAX_LISTED_PROBLEMS = 40
"""Largest number of problems that an error lists; it gives only the number of further ones."""


@dataclass(frozen=True, eq=False)
class Case:
    """One run of a study: its complete declaration, and the swept values that distinguish it from other runs."""

    label: str
    parts: tuple[str, ...]
    """Parts of the label: name of the declaration, label of the zipped row, and each value of the grid."""
    seed: int
    stage: str
    """Stage: `fit`; `refit` for the second stage of the declaration; else the label of a `[[sweep.refits]]`."""
    experiment: Experiment
    differences: Mapping[str, str]
    """Values that the sweep sets, as text, by dotted path."""
    parent: Case | None = None
    """Case of the first stage, if this one is a second stage; else None."""

    @property
    def key(self) -> tuple[str, int, str]:
        """Return (label, seed, stage), unique in a study."""
        return self.label, self.seed, self.stage

    @property
    def title(self) -> str:
        """Return label, stage and seed of the case as text for people."""
        stage = "" if self.stage == FIRST else f", {self.stage}"
        return f"{self.label}{stage}, seed {self.seed}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 digest of the declaration without name and description, by which a finished run is found."""
        return self.experiment.digest()


@dataclass(frozen=True)
class Declared:
    """A study file that has been read and expanded into cases; all of it has been validated."""

    name: str
    description: str
    origin: str
    """Name or path by which the study was loaded."""
    cases: tuple[Case, ...]
    """Cases of the first stages, each followed by those of its second stages."""
    measure: Measure

    @classmethod
    def load(cls, name_or_file: str | Path) -> Self:
        """Read a study, given its name or a TOML file, and expand it into cases.

        Raises:
            DeclarationError: every problem of the file, or else of all its cases, each with its place.
        """
        path, origin = find(str(name_or_file)), str(name_or_file)
        raw = toml.read(path)
        file = validated({"name": path.stem, **raw}, origin)
        settings = _settings(file, raw, path)
        problems = _Problems(origin, len(settings))
        cases = [case for setting in settings for case in _cases(file, setting, problems)]
        _require_distinct(cases, problems)
        unknown = _unknown_first_stages(file.sweep, settings)
        if found := [*problems.lines(), *(f"{origin}: {line}" for line in unknown)]:
            raise DeclarationError(found)
        return cls(file.name, file.description, origin, tuple(cases), file.sweep.measure)


# ---------------------------------------------------------------------- expansion


@dataclass(frozen=True)
class _Setting:
    """A case without a seed: a declaration and the values that the sweep sets in it."""

    label: str
    parts: tuple[str, ...]
    raw: Mapping[str, Any]
    changes: tuple[tuple[str, Any], ...]
    differences: Mapping[str, str]


def _settings(file: StudyFile, raw: Mapping[str, Any], path: Path) -> list[_Setting]:
    """Return every combination of declaration, zipped row and grid point, the grid point varying fastest."""
    sweep = file.sweep
    own = {key: value for key, value in raw.items() if key != "sweep"}
    bases = _read_specs(sweep.specs, path) if sweep.specs else {"": own}
    rows, combinations = _rows(sweep.zip), _combinations(sweep.grid)
    settings = []
    for (spec, base), (row, together), (point, each) in itertools.product(bases.items(), rows, combinations):
        changes = (*together, *each)
        parts = tuple(part for part in (spec if len(bases) > 1 else "", row, *point) if part)
        differences = {"spec": spec} if len(bases) > 1 else {}
        differences |= {path: _text(value) for path, value in changes}
        label = ", ".join(parts) or spec or file.name
        settings.append(_Setting(label, parts, base, changes, differences))
    return settings


def _read_specs(specs: Sequence[str], study: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of the files in `sweep.specs`, by name.

    Raises DeclarationError with every file that is missing, or outside of the folder of the study file.
    """
    found, problems = {}, []
    for spec in specs:
        try:
            path = _spec_file(spec, study.resolve().parent)
            found[path.stem if path.stem not in found else spec] = toml.read(path)
        except DeclarationError as error:
            problems += [f"{study}: sweep.specs: {problem}" for problem in error.problems]
    if problems:
        raise DeclarationError(problems)
    return found


def _spec_file(spec: str, folder: Path) -> Path:
    """Return the TOML file of a zoo name, or one below `folder`; a study can read no other files."""
    if spec in zoo.names():
        return zoo.FOLDER / f"{spec}.toml"
    path = (folder / spec).resolve() if "\0" not in spec else folder
    if path.suffix == ".toml" and path.is_relative_to(folder) and path.is_file():
        return path
    raise DeclarationError(
        f"expected a zoo name, or a TOML file below the study's folder; got {spec[:200]!r}{near(spec, zoo.names())}."
    )


def _rows(zipped: Mapping[str, Sequence[Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the label and the (path, value) pairs of each row of `sweep.zip`; one empty row if nothing is zipped."""
    paths = [path for path in zipped if path != "label"]
    if not paths:
        return [("", [])]
    values = list(zip(*(zipped[path] for path in paths), strict=True))
    varying = [i for i, path in enumerate(paths) if len({_text(value) for value in zipped[path]}) > 1]
    named = {i: _named(paths, paths[i], zipped[paths[i]]) for i in varying or range(len(paths))}
    made = [" ".join(texts[row] for texts in named.values()) for row in range(len(values))]
    labels = zipped.get("label", made)
    return [(label, list(zip(paths, row, strict=True))) for label, row in zip(labels, values, strict=True)]


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[tuple[list[str], list[tuple[str, Any]]]]:
    """Return parts of the label and (path, value) pairs of each combination of `sweep.grid`, the last path fastest."""
    paths = list(grid)
    axes = [zip(_named(paths, path, grid[path]), grid[path], strict=True) for path in paths]
    return [
        ([name for name, _ in point], [(path, value) for path, (_, value) in zip(paths, point, strict=True)])
        for point in itertools.product(*axes)
    ]


def _named(paths: Sequence[str], path: str, values: Sequence[Any]) -> list[str]:
    """Return a short label for each swept value of a path: its `kind` if all kinds differ, else `end of path=value`."""
    kinds = [value.get("kind") if isinstance(value, dict) else None for value in values]
    if None not in kinds and len(set(map(str, kinds))) == len(values):
        return [_short(str(kind)) for kind in kinds]
    ends = [path.split(".")[-n:] for n in range(1, path.count(".") + 2)]
    end = next((e for e in ends if sum(p.split(".")[-len(e) :] == e for p in paths) == 1), ends[-1])
    return [_short(f"{'.'.join(end)}={_text(value)}") for value in values]


def _text(value: Any) -> str:
    """Return a value from TOML as text on one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------- cases


class _Problems:
    """Problems of a study, each with the labels of its cases; a problem that all cases share is listed once."""

    def __init__(self, origin: str, cases: int) -> None:
        self.origin, self.cases = origin, cases
        self.found: dict[str, list[str]] = {}

    def add(self, case: str, problems: Sequence[str]) -> None:
        for problem in problems:
            cases = self.found.setdefault(problem, [])
            cases += [case] if case not in cases else []  # seeds of a case have the same

    def lines(self) -> list[str]:
        lines = []
        for problem, cases in self.found.items():
            everywhere = len(cases) == self.cases and self.cases > 1
            told = ["every case"] if everywhere else [f"case {case!r}" for case in cases]
            lines += [f"{self.origin}: {case}: {problem}" for case in told]
        more = [f"... and {len(lines) - MAX_LISTED_PROBLEMS} more"] if len(lines) > MAX_LISTED_PROBLEMS else []
        return lines[:MAX_LISTED_PROBLEMS] + more


def _cases(file: StudyFile, setting: _Setting, problems: _Problems) -> Iterator[Case]:
    """Yield the cases of a setting for every seed, and record its problems once, because each seed has the same."""
    try:
        base = _experiment(file, setting)
    except DeclarationError as error:
        problems.add(setting.label, _bare(error))
        return
    for seed in file.sweep.seeds or (base.seed,):
        experiment = base.with_changes({"seed": seed})
        case = Case(setting.label, setting.parts, seed, FIRST, experiment, setting.differences)
        yield case
        for name in _stages(file.sweep, case):
            try:
                stage = _second_stage(file.sweep, case, name)
            except DeclarationError as error:
                problems.add(setting.label, [f"refit {name!r}: {problem}" for problem in _bare(error)])
            else:
                yield Case(case.label, case.parts, seed, name, stage, case.differences, case)


def _bare(error: DeclarationError) -> list[str]:
    """Return the problems of an error without the placeholder that `_experiment` and `_second_stage` put first."""
    return [problem.removeprefix("\0: ") for problem in error.problems]


def _experiment(file: StudyFile, setting: _Setting) -> Experiment:
    """Return the experiment of a setting: its declaration with the swept values, named after study and label."""
    raw: dict[str, Any] = copy.deepcopy(dict(setting.raw))
    apply_overrides(
        raw, [(tuple(path.split(".")), copy.deepcopy(value)) for path, value in setting.changes], Experiment
    )
    name = file.name if setting.label == file.name else f"{file.name} {setting.label}"
    found = Experiment.from_dict({**raw, "name": name[:250]}, origin="\0")
    if isinstance(found.data, TensorSource | FrameSource):
        raise DeclarationError(f"data.source: expected one that is read from files; got {found.data.source!r}.")
    return found


def _stages(sweep: Sweep, case: Case) -> Iterator[str]:
    """Yield the names of the second stages of a case: that of its declaration, then those of `[[sweep.refits]]`."""
    if case.experiment.refit is not None:
        yield SECOND
    for refit in sweep.refits:
        if not refit.of or {case.label, *case.parts} & set(refit.of):
            yield refit.label


def _second_stage(sweep: Sweep, case: Case, name: str) -> Experiment:
    """Return the declaration of the second stage `name` of a case.

    Raises DeclarationError if it changes more than priors and training settings.
    """
    first = case.experiment
    if name == SECOND:
        stage = first.second_stage()
        first.refitted(stage)
        return stage
    raw = first.model_dump(exclude_none=True, exclude_unset=True)
    overrides = toml.flat(copy.deepcopy(next(refit.overrides for refit in sweep.refits if refit.label == name)))
    apply_overrides(raw, [(tuple(path.split(".")), value) for path, value in overrides.items()], Experiment)
    return stage_of(first, Experiment.from_dict({**raw, "name": f"{first.name}, {name}"[:300]}, origin="\0"))


def _require_distinct(cases: Sequence[Case], problems: _Problems) -> None:
    """Record as problems the cases that share a label, and those whose declarations are equal."""
    labels = Counter(case.key for case in cases)
    for label in dict.fromkeys(label for (label, _, _), count in labels.items() if count > 1):
        problems.add(label, ["expected a label of its own; got it twice. Name the rows with sweep.zip.label."])
    first: dict[tuple[str, Case | None], Case] = {}
    for case in cases:
        other = first.setdefault((case.digest, case.parent), case)
        if other is not case and other.label != case.label:
            problems.add(case.label, [f"expected another declaration than {other.label!r}; got the same. Drop one."])
        elif other is not case and other.stage != case.stage:
            problems.add(
                case.label, [f"expected {case.stage!r} to differ from {other.stage!r}; got the same. Drop one."]
            )


def _unknown_first_stages(sweep: Sweep, settings: Sequence[_Setting]) -> Iterator[str]:
    known = sorted({name for setting in settings for name in (setting.label, *setting.parts)})
    for i, refit in enumerate(sweep.refits):
        for name in refit.of:
            if name not in known:
                told = ", ".join(map(repr, known[:20]))
                yield f"sweep.refits.{i}.of: expected labels among {told}; got {name!r}{near(name, known)}."
