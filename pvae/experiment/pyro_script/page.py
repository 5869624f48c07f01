"""Text of a generated Pyro script: imports, data, networks, `model`, `guide`, optimiser and training loop."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pvae import data
from pvae.component import Component, Section
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.nn.schedules import Constant, Schedule
from pvae.pair.pair import Pair

ELBOS = {"trace_elbo": "Trace_ELBO", "trace_mean_field_elbo": "TraceMeanField_ELBO"}
"""Kinds of the objectives that `pyro.infer.SVI` can minimise, and Pyro's loss classes for them."""
LEFT_OUT = ("clip_norm", "average", "alternate", "patience", "shards")
"""Settings of training that the plain SVI loop of a generated script ignores."""
TIME = "(epoch + i / STEPS)"
"""Expression, inside the loop of a generated script, for the time since the start of training in epochs."""
SUMMED = 'infer={"enumerate": "parallel"}'
WRITTEN = ("model", "guide", "before", "after")
"""Parts of a script that its two generators write each in its own way."""
PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
RULES: Any = PAGE.get_template("parts.py.j2").module
"""Tables of the template `parts.py.j2`: rules of priors, posteriors and schedules, and statements of imports."""


class Script(ABC):
    """Base of the two generators of a Pyro script, which differ in how they write the data, `model` and `guide`."""

    def __init__(self, experiment: Experiment, pair: Pair) -> None:
        self.experiment, self.pair = experiment, pair
        self.modeller: Any = pair.model
        self.guider: Any = pair.guide
        self.imports: dict[str, set[str]] = {"pyro": {"poutine"}, "torch": {"nn"}}
        self.parts: dict[str, str] = {}
        """Variables of the script that hold modules, each with the expression that constructs it."""
        self.numbers: dict[str, Schedule] = {}
        """Numbers that change during training (beta, temperatures), arguments of both `model` and `guide`."""
        beta = experiment.objective.beta
        weight = beta.value if isinstance(beta, Constant) else None
        self.context = {0.0: "poutine.mask(mask=False)", 1.0: ""}.get(weight, "poutine.scale(scale=beta)")  # type: ignore[arg-type]
        if weight not in (0, 1):
            self.numbers["beta"] = beta

    @property
    @abstractmethod
    def batch(self) -> dict[str, str]:
        """Arguments of both `model` and `guide`, each with its expression in the training loop."""

    @abstractmethod
    def data(self) -> list[str]:
        """Return the statements that load the data."""

    @abstractmethod
    def statements(self) -> dict[str, list[str]]:
        """Return the statements of `model` and `guide` inside the data plate, and those `before` and `after` a step."""

    # ------------------------------------------------------------------ the page

    def text(self) -> str:
        """Return the source text of the script: the template `script.py.j2`, filled in, below the imports it needs."""
        train, said = self.experiment.train, formulas(self.experiment)
        loads, written = self.data(), self.statements()
        numbers = {name: self.at(schedule, TIME) for name, schedule in self.numbers.items()}
        if "beta" in numbers:  # Pyro refuses to scale by 0
            numbers["beta"] = f"max(1e-20, {numbers['beta']})"
        given = [*self.batch.values(), *(f"{name}={name}" for name in numbers)]
        before = [*(f"{name} = {value}" for name, value in numbers.items()), *written["before"]]
        changed = [name for name in LEFT_OUT if getattr(train, name) != type(train).model_fields[name].default]
        settings = train.optimizer.model_dump(exclude={"kind"}, exclude_defaults=True)
        body = PAGE.get_template("script.py.j2").render(
            script=self, data=loads, programs={name: written[name] for name in ("model", "guide")},
            formulas={name: re.sub(r"^(.*) = \1$", r"\1", said[name]) for name in ("model", "guide")},
            arguments=[*self.batch, *(f"{number}=1.0" for number in numbers)],
            left_out=[f"{name} = {getattr(train, name)}" for name in changed],
            optimizer=type(train.optimizer.build([torch.nn.Parameter(torch.zeros(1))])).__name__,
            settings=literal({"lr": train.optimizer.lr, **settings}), timed=TIME in " ".join(before),
            step=[*before, f"loss = svi.step({', '.join(given)})", "optimizer.step()", *written["after"]],
        )  # fmt: skip
        head = [f'"""{self.experiment.description or self.experiment.name}"""', "", *self.import_lines(body), "", body]
        return "\n".join(head)

    def used(self, lines: Iterable[str]) -> list[str]:
        """Return the variables of modules that statements use."""
        return [part for part in self.parts if re.search(rf"\b{part}\b", "\n".join(lines))]

    def import_lines(self, body: str) -> Iterator[str]:
        """Yield the imports: those of Pyro and torch, then those of pvae and of plugins."""
        yield from (line for name, line in RULES.imports.items() if re.search(rf"\b{name}\.", body))
        lines = {home: f"from {home} import {', '.join(sorted(names))}" for home, names in sorted(self.imports.items())}
        theirs = [home for home in lines if home.split(".")[0] in ("pyro", "torch")]
        yield from (lines.pop(home) for home in theirs)
        yield from ["", "import pvae"] if "pvae." in body else [""]
        yield from lines.values()

    def weighed(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield statements that sample latents, inside the Pyro handler that scales their log densities by beta."""
        if self.context:
            yield f"with {self.context}:" + ("  # beta = 0: no KL" if "mask" in self.context else "")
        yield from (f"    {line}" if self.context else line for line in lines)

    def elbo(self) -> str:
        """Return the constructor call of Pyro's loss, whose class the script then imports."""
        objective: Any = self.experiment.objective
        particles, layout = getattr(objective, "particles", 1), self.pair.layout
        loss = "TraceGraph_ELBO" if layout.scored else ELBOS[objective.kind]
        options = {"num_particles": particles, "vectorize_particles": True} if particles > 1 else {}
        if layout.expected or layout.enumerated:
            loss = "TraceEnum_ELBO"
        if options or loss == "TraceEnum_ELBO":
            options["max_plate_nesting"] = 1
        self.imports["pyro.infer"] = {"SVI", loss}
        return f"{loss}({', '.join(f'{name}={value}' for name, value in options.items())})"

    # ------------------------------------------------------------------ expressions

    def at(self, schedule: Schedule, epoch: str) -> str:
        """Return the Python expression of a schedule's value at a time in epochs, which is itself an expression."""
        span = getattr(schedule, "epochs", None)
        if rule := RULES.schedules.get(schedule.kind):
            return str(rule(schedule, f"min({epoch} / {'EPOCHS' if span is None else f'{span:g}'}, 1)"))
        return f"{self.construct(schedule)}.at({epoch}, EPOCHS)"

    def imported(self, kind: Callable[..., Any]) -> str:
        """Add the import of a class or function to the script, and return its name."""
        home = "pvae.data" if kind.__name__ in data.__all__ else kind.__module__
        self.imports.setdefault(home, set()).add(kind.__name__)
        return kind.__name__

    def construct(self, part: Section) -> str:
        """Return the constructor call of a declared component, with the arguments that differ from their defaults."""
        kind, tag = type(part), part.tag if isinstance(part, Component) else None
        usual = {name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()}
        changed = {name: own for name, known in usual.items() if name != tag and (own := getattr(part, name)) != known}
        given = [f"{name}={self.value(value)}" for name, value in changed.items()]
        return f"{self.imported(kind)}({', '.join(given)})"

    def value(self, value: Any) -> str:
        """Return a value of a declaration as a Python expression."""
        if isinstance(value, Mapping):
            return named({key: self.value(item) for key, item in value.items()})
        return self.construct(value) if isinstance(value, Section) else literal(value)


def sampled(name: str, distribution: str, infer: str = "") -> str:
    """Return the `pyro.sample` statement of a latent, from the expression of its distribution."""
    return f'{name} = pyro.sample("{name}", {", ".join([distribution, *([infer] if infer else [])])})'


def quoted(text: str) -> str:
    """Return a string as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def literal(value: Any) -> str:
    """Return numbers, strings, lists, tuples and dictionaries as a Python literal, strings in double quotes."""
    if isinstance(value, dict):
        return named({key: literal(item) for key, item in value.items()})
    if isinstance(value, tuple | list):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return quoted(value) if isinstance(value, str) else repr(value)


def named(expressions: Mapping[str, str]) -> str:
    """Return the source text of a dictionary, given the expressions of its values."""
    return f"{{{', '.join(f'{quoted(name)}: {value}' for name, value in expressions.items())}}}"
