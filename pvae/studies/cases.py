"""Cases of a study: all combinations of declaration, zipped row, grid point and seed, checked before any fit."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pvae.errors import DeclarationError, misdeclared, near, text
from pvae.experiment import plan, zoo
from pvae.experiment.experiment import Experiment
from pvae.studies.sweep import FIRST, SECOND, Measure, Search, StudyFile, Sweep, find, validated
from pvae.training.resume import stage_of
from pvae.util import Record, replace, toml

MAX_LISTED_PROBLEMS = 40
"""Largest number of problems that an error lists; it gives only the number of further ones."""


class Case(Record, eq=False):
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

    @classmethod
    def of(cls, experiment: Experiment, parent: Case | None = None) -> Case:
        """Return a case of a declaration alone, as a worker knows it."""
        return cls(experiment.name, (), experiment.seed, FIRST, experiment, {}, parent)

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


class Declared(Record):
    """A study file that has been read and expanded into cases; all of it has been validated."""

    name: str
    description: str
    origin: str
    """Name or path by which the study was loaded."""
    cases: tuple[Case, ...]
    """Cases of the first stages, each followed by those of its second stages."""
    measure: Measure
    search: Search | None
    base: Mapping[str, Any]
    """The file's own declaration, in which a search sets values."""

    @classmethod
    def load(cls, name_or_file: str | Path) -> Self:
        """Read a study, given its name or a TOML file, and expand it into cases.

        Raises:
            DeclarationError: every problem of the file, or else of all its cases, each with its place.
        """
        path, origin = find(str(name_or_file)), str(name_or_file)
        raw = toml.read(path)
        file = validated({"name": path.stem, **raw}, origin)
        base = {key: value for key, value in raw.items() if key not in ("sweep", "search")}
        settings, problems = _settings(file, base, path) if "sweep" in raw else [], _Problems(dict)
        cases = [case for setting in settings for case in _cases(file, setting, problems)]
        _require_distinct(cases, problems)
        trials = [*_trials(file.search, base)] if file.search else []
        _ = [case for trial in trials for case in _cases(file, trial, problems)]
        unknown = (f"{origin}: {line}" for line in _unknown_first_stages(file.sweep, settings))
        misdeclared(found := [*_listed(problems, origin, len(settings)), *unknown], found)
        return cls(file.name, file.description, origin, tuple(cases), file.sweep.measure, file.search, base)


# ---------------------------------------------------------------------- expansion


class _Setting(Record):
    """A case without a seed: a declaration and the values that the sweep sets in it."""

    label: str
    parts: tuple[str, ...]
    raw: Mapping[str, Any]
    changes: Mapping[str, Any]
    """Swept values by dotted path."""
    differences: Mapping[str, str]


def _settings(file: StudyFile, own: dict[str, Any], path: Path) -> list[_Setting]:
    """Return every combination of declaration, zipped row and grid point, the grid point varying fastest."""
    bases, settings = _read_specs(file.sweep.specs, path) if file.sweep.specs else {"": own}, []
    for (spec, base), *points in itertools.product(bases.items(), *_axes(file.sweep)):
        named = {"spec": spec} if len(bases) > 1 else {}
        changes = {path: value for _, values in points for path, value in values.items()}
        differences = named | {path: _text(value) for path, value in changes.items()}
        parts = tuple(part for part in (*named.values(), *(label for label, _ in points)) if part)
        settings.append(_Setting(", ".join(parts) or spec or file.name, parts, base, changes, differences))
    return settings


def _trials(search: Search, base: Mapping[str, Any]) -> Iterator[_Setting]:
    """Yield a setting for each end and choice of a search, beside the first ones of all other paths."""
    first = {path: values[0] for path, values in search.ends.items()}
    for path, value in ((path, value) for path, values in search.ends.items() for value in values):
        yield _Setting(f"{path}={_text(value)}", (), base, {**first, path: value}, {})


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
    misdeclared(problems, problems)
    return found


def _spec_file(spec: str, folder: Path) -> Path:
    """Return the TOML file of a zoo name, or one below `folder`; a study can read no other files."""
    if spec in zoo.names():
        return zoo.FOLDER / f"{spec}.toml"
    path = (folder / spec).resolve() if "\0" not in spec else folder
    if path.suffix == ".toml" and path.is_relative_to(folder) and path.is_file():
        return path
    raise DeclarationError.of("studies.cases.spec", spec=spec[:200], hint=near(spec, zoo.names()))


def _axes(sweep: Sweep) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the axes of a sweep, its zipped rows and each path of its grid: label and values by path of every point."""
    if paths := [path for path in sweep.zip if path != "label"]:
        rows = [dict(zip(paths, row, strict=True)) for row in zip(*(sweep.zip[path] for path in paths), strict=True)]
        varying = [path for path in paths if len(set(map(_text, sweep.zip[path]))) > 1]
        texts = [_named(paths, path, sweep.zip[path]) for path in varying or paths]
        labels = sweep.zip.get("label", tuple(map(" ".join, zip(*texts, strict=True))))
        yield list(zip(labels, rows, strict=True))
    for path, values in sweep.grid.items():
        names = _named(list(sweep.grid), path, values)
        yield [(name, {path: value}) for name, value in zip(names, values, strict=True)]


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


_Problems = defaultdict[str, dict[str, None]]
"""Labels of the cases that have a problem, by problem; seeds of a case have the same."""


def _listed(problems: _Problems, origin: str, settings: int) -> list[str]:
    """Return a line for each problem and each case that has it; a problem that all cases share is listed once."""
    lines = []
    for problem, cases in problems.items():
        named = ["every case"] if len(cases) == settings > 1 else [f"case {case!r}" for case in cases]
        lines += [f"{origin}: {case}: {problem}" for case in named]
    more = [f"... and {len(lines) - MAX_LISTED_PROBLEMS} more"] if len(lines) > MAX_LISTED_PROBLEMS else []
    return lines[:MAX_LISTED_PROBLEMS] + more


def _note(problems: _Problems, label: str, error: DeclarationError, place: str = "") -> None:
    """Record the problems of an error, without the placeholder that `overridden` puts first."""
    for problem in error.problems:
        problems[place + problem.removeprefix("\0: ")][label] = None


def _cases(file: StudyFile, setting: _Setting, problems: _Problems) -> Iterator[Case]:
    """Yield the cases of a setting for every seed, and record its problems."""
    name = file.name if setting.label == file.name else f"{file.name} {setting.label}"
    try:
        base = overridden(setting.raw, setting.changes, name[:250])
    except DeclarationError as error:
        _note(problems, setting.label, error)
        return
    for seed in file.sweep.seeds or (base.seed,):
        experiment = base.with_changes({"seed": seed})
        first = Case(setting.label, setting.parts, seed, FIRST, experiment, setting.differences)
        yield first
        named = {first.label, *first.parts}
        stages: list[tuple[str, dict[str, Any]]] = [(SECOND, {})] if experiment.refit else []
        stages += [(refit.label, refit.overrides) for refit in file.sweep.refits if not refit.of or named & {*refit.of}]
        for stage, overrides in stages:
            try:
                second = _second_stage(experiment, stage, overrides)
            except DeclarationError as error:
                _note(problems, setting.label, error, f"refit {stage!r}: ")
            else:
                yield replace(first, stage=stage, experiment=second, parent=first)


def overridden(raw: Mapping[str, Any], changes: Mapping[str, Any], name: str) -> Experiment:
    """Return the experiment `name` that a declaration gives with other values at dotted paths."""
    table: dict[str, Any] = copy.deepcopy(dict(raw))
    values = [(tuple(path.split(".")), copy.deepcopy(value)) for path, value in changes.items()]
    plan.apply_overrides(table, values, Experiment)
    return Experiment.from_dict({**table, "name": name}, origin="\0")


def _second_stage(first: Experiment, name: str, overrides: dict[str, Any]) -> Experiment:
    """Return the declaration of the second stage `name` of an experiment.

    Raises DeclarationError if it changes more than priors and training settings.
    """
    if overrides:
        raw = first.model_dump(exclude_none=True, exclude_unset=True)
        return stage_of(first, overridden(raw, toml.flat(overrides), f"{first.name}, {name}"[:300]))
    stage = first.second_stage()
    first.refitted(stage)
    return stage


def _require_distinct(cases: Sequence[Case], problems: _Problems) -> None:
    """Record as problems the cases that share a label, and those whose declarations are equal."""
    for (label, _, _), count in Counter(case.key for case in cases).items():
        if count > 1:
            problems["expected a label of its own; got it twice. Name the rows with sweep.zip.label."][label] = None
    known: dict[tuple[str, Case | None], Case] = {}
    for case in cases:
        other = known.setdefault((case.digest, case.parent), case)
        if (other.label, other.stage) != (case.label, case.stage):
            problems[text("studies.cases.same", case=case, other=other)][case.label] = None


def _unknown_first_stages(sweep: Sweep, settings: Sequence[_Setting]) -> Iterator[str]:
    known = sorted({name for setting in settings for name in (setting.label, *setting.parts)})
    for i, refit in enumerate(sweep.refits):
        for name in refit.of:
            if name not in known:
                yield text("studies.cases.unknown", i=i, known=known[:20], name=name, hint=near(name, known))
