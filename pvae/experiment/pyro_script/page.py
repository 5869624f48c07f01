"""Text of a generated Pyro script: imports, data, networks, `model`, `guide`, optimiser and training loop."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pvae import data
from pvae.component import Component, Section
from pvae.experiment.pyro_script.expressions import between, literal, named
from pvae.experiment.readback import formulas
from pvae.nn.schedules import Constant, Schedule
from pvae.pair.pair import Pair

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment

ELBOS = {"trace_elbo": "Trace_ELBO", "trace_mean_field_elbo": "TraceMeanField_ELBO"}
"""Kinds of the objectives that `pyro.infer.SVI` can minimise, and Pyro's loss classes for them."""
IMPORTS = {
    "math": "import math\n",
    "pyro": "import pyro",
    "dist": "import pyro.distributions as dist",
    "T": "import pyro.distributions.transforms as T",
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
}
"""Names of modules that a generated script may use, each with its import statement."""
LEFT_OUT = ("clip_norm", "average", "alternate", "patience")
"""Settings of training that the plain SVI loop of a generated script ignores."""
STEPS = "STEPS = -(-len(data.train) // BATCH)  # of an epoch"
TIME = "(epoch + i / STEPS)"
"""Expression, inside the loop of a generated script, for the time since the start of training in epochs."""
SUMMED = 'infer={"enumerate": "parallel"}'


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
    def model(self) -> Iterator[str]:
        """Yield the statements of the model inside the data plate."""

    @abstractmethod
    def guide(self) -> Iterator[str]:
        """Yield the statements of the guide inside the data plate."""

    def before_step(self) -> list[str]:
        """Return the statements that the training loop runs before every step of SVI."""
        return []

    def after_step(self) -> list[str]:
        """Return the statements that the training loop runs after every step of SVI."""
        return []

    # ------------------------------------------------------------------ the page

    def text(self) -> str:
        """Return the whole source text of the script."""
        data, said = self.data(), formulas(self.experiment)
        model = self.program("model", said["model"], self.model())
        guide = self.program("guide", said["guide"], self.guide())
        parts = [f"{name} = {code}" for name, code in self.parts.items()]
        fit = [*self.optimizer(), "", *self.loop()]
        body = "\n".join([*self.length(), *data, STEPS, *parts, "", "", *model, "", "", *guide, "", "", *fit, ""])
        head = [f'"""{self.experiment.description or self.experiment.name}"""', ""]
        return "\n".join([*head, *self.import_lines(body), "", body])

    def import_lines(self, body: str) -> Iterator[str]:
        """Yield the imports: those of Pyro and torch, then those of pvae and of plugins."""
        yield from (line for name, line in IMPORTS.items() if re.search(rf"\b{name}\.", body))
        theirs = [home for home in sorted(self.imports) if home.split(".")[0] in ("pyro", "torch")]
        yield from (self.import_line(home) for home in theirs)
        yield from ["", "import pvae"] if "pvae." in body else [""]
        yield from (self.import_line(home) for home in sorted({*self.imports} - {*theirs}))

    def import_line(self, home: str) -> str:
        """Return the import of names from a module."""
        return f"from {home} import {', '.join(sorted(self.imports[home]))}"

    def program(self, name: str, formula: str, statements: Iterable[str]) -> list[str]:
        """Return the source lines of the function `model` or `guide`, which registers the modules that it uses."""
        lines = list(statements) or ["pass"]
        used = [part for part in self.parts if re.search(rf"\b{part}\b", "\n".join(lines))]
        rows = f"len({next(iter(self.batch))})"
        left, _, right = formula.partition(" = ")
        return [
            f"def {name}({', '.join([*self.batch, *(f'{number}=1.0' for number in self.numbers)])}):",
            f'    """{left if left == right else formula}"""',
            *(f'    pyro.module("{part}", {part})' for part in used),
            f'    with pyro.plate("data", {rows}), poutine.scale(scale=1 / {rows}):  # nats per datum',
            *(f"        {line}" for line in lines),
        ]

    def weighed(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield statements that sample latents, inside the Pyro handler that scales their log densities by beta."""
        if self.context:
            yield f"with {self.context}:" + ("  # beta = 0: no KL" if "mask" in self.context else "")
        yield from (f"    {line}" if self.context else line for line in lines)

    def length(self) -> list[str]:
        """Return the statements that set the random seed, the number of epochs and the batch size."""
        train = self.experiment.train
        return [f"torch.manual_seed({self.experiment.seed})", f"EPOCHS, BATCH = {train.epochs}, {train.batch_size}"]

    def optimizer(self) -> Iterator[str]:
        """Yield the statements that construct the optimiser and `SVI`."""
        train = self.experiment.train
        if left := ", ".join(f"{name} = {getattr(train, name)}" for name in LEFT_OUT if getattr(train, name)):
            yield f"# Left out of the declared training: {left}"
        built = type(train.optimizer.build([nn.Parameter(torch.zeros(1))])).__name__
        given = {"lr": train.optimizer.lr, **train.optimizer.model_dump(exclude={"kind"}, exclude_defaults=True)}
        rate = self.at(train.schedule, "step / STEPS")
        if train.warmup:
            rate = f"{rate} * min((step + 1) / ({train.warmup:g} * STEPS), 1)"
        loss, options = self.elbo()
        self.imports["pyro.infer"] = {"SVI", loss}
        yield "optimizer = pyro.optim.LambdaLR({"
        yield f'    "optimizer": torch.optim.{built}, "optim_args": {literal(given)},'
        yield f'    "lr_lambda": lambda step: {rate},'
        yield "})"
        yield f"svi = SVI(model, guide, optimizer, {loss}({', '.join(f'{k}={v}' for k, v in options.items())}))"

    def elbo(self) -> tuple[str, dict[str, object]]:
        """Return the name of Pyro's loss class and its keyword arguments."""
        objective: Any = self.experiment.objective
        particles, layout = getattr(objective, "particles", 1), self.pair.layout
        flat = {"max_plate_nesting": 1}
        many = {"num_particles": particles, "vectorize_particles": True, **flat} if particles > 1 else {}
        if layout.expected or layout.enumerated:
            return "TraceEnum_ELBO", {**many, **flat}
        return "TraceGraph_ELBO" if layout.scored else ELBOS[objective.kind], many

    def loop(self) -> Iterator[str]:
        """Yield the source lines of the training loop over epochs and batches."""
        given = ", ".join([*self.batch.values(), *(f"{name}={name}" for name in self.numbers)])
        values = {name: self.at(schedule, TIME) for name, schedule in self.numbers.items()}
        if "beta" in values:  # Pyro refuses to scale by 0
            values["beta"] = f"max(1e-20, {values['beta']})"
        before = [*(f"{name} = {value}" for name, value in values.items()), *self.before_step()]
        order, batches = "index", "torch.randperm(len(data.train)).split(BATCH)"
        if TIME in " ".join(before):
            order, batches = "i, index", f"enumerate({batches})"
        step = [f"loss = svi.step({given})", "optimizer.step()"]
        yield 'if __name__ == "__main__":'
        yield "    for epoch in range(EPOCHS):"
        yield f"        for {order} in {batches}:"
        yield from (f"            {line}" for line in [*before, *step, *self.after_step()])
        yield '        print(f"epoch {epoch + 1}: loss {loss:.2f} nats per datum")'

    # ------------------------------------------------------------------ expressions

    def at(self, schedule: Schedule, epoch: str) -> str:
        """Return the Python expression of a schedule's value at a time in epochs, which is itself an expression."""
        declared: Any = schedule
        span = getattr(schedule, "epochs", None)
        share = f"min({epoch} / {'EPOCHS' if span is None else f'{span:g}'}, 1)"
        match declared.kind:
            case "constant":
                return f"{declared.value:g}"
            case "linear":
                return between(declared.start, declared.end, share)
            case "cosine":
                return between(declared.end, declared.start, f"(1 + math.cos(math.pi * {share})) / 2")
            case "exponential":
                return f"{declared.start:g} * {declared.end / declared.start!r} ** {share}"
        return f"{self.construct(schedule)}.at({epoch}, EPOCHS)"

    def imported(self, kind: Callable[..., Any]) -> str:
        """Add the import of a class or function to the script, and return its name."""
        home = "pvae.data" if kind.__name__ in data.__all__ else kind.__module__
        self.imports.setdefault(home, set()).add(kind.__name__)
        return kind.__name__

    def construct(self, part: Section) -> str:
        """Return the constructor call of a declared component, with the arguments that differ from their defaults."""
        kind = type(part)
        tag = part.tag if isinstance(part, Component) else None
        given = [
            f"{name}={self.value(getattr(part, name))}"
            for name, field in kind.model_fields.items()
            if name != tag and getattr(part, name) != field.get_default(call_default_factory=True)
        ]
        return f"{self.imported(kind)}({', '.join(given)})"

    def value(self, value: Any) -> str:
        """Return a value of a declaration as a Python expression."""
        if isinstance(value, Mapping):
            return named({key: self.value(item) for key, item in value.items()})
        return self.construct(value) if isinstance(value, Section) else literal(value)


def sampled(name: str, distribution: str, infer: str = "") -> str:
    """Return the `pyro.sample` statement of a latent, from the expression of its distribution."""
    return f'{name} = pyro.sample("{name}", {", ".join([distribution, *([infer] if infer else [])])})'
