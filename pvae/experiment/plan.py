"""Settings of a fit: training, analysis during training, the plan of both with an objective; dotted overrides."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, Field

from pvae.component import Component, Section, Table, from_table, table_at
from pvae.nn.optimizers import Adam, Optimizer
from pvae.nn.precision import Precision
from pvae.nn.schedules import Constant, Schedule
from pvae.objectives.base import Objective
from pvae.objectives.elbo import TraceELBO
from pvae.util import toml


class Train(Section):
    """Settings of training by SVI: epochs, batches, optimiser, early stopping, checkpoints, non-finite losses."""

    epochs: int = Field(default=20, gt=0)
    batch_size: int = Field(default=100, gt=0)
    optimizer: Optimizer = Adam()
    schedule: Schedule = Constant()
    """Schedule of a factor on the learning rate."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs during which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; validation and analysis then use the average."""
    alternate: int = Field(default=0, ge=0)
    """Number of guide steps per model step (variational EM); 0 updates both in every step."""
    validate_every: int = Field(default=1, gt=0)
    """Number of epochs between two validations."""
    patience: int | None = Field(default=None, gt=0)
    """Number of validations without a better figure (see `keep`) after which training stops early; never unless set."""
    keep: Literal["best", "last"] = "best"
    """Weights that the run keeps: the last, or those of the best validation figure of the objective: ELBO, `iwae`,
    ... Under `em` the best are those that have converged on the training data."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Response to a NaN or infinite loss: stop with a diagnosis, skip the step, or go back to the last checkpoint."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Smallest number of seconds between two checkpoints; one is always written at the end."""
    precision: Precision = "float32"
    """Type in which dense layers and convolutions multiply in training: `bfloat16` is 1.1 to 1.6 times as fast where
    the processor has its instructions (avx512_bf16); elsewhere factors are rounded, and a step is no faster. `auto` is
    `bfloat16` where the processor has them, else `float32`. All other computations are in float32, validation and
    analyses too."""
    engine: Literal["auto", "eager", "compiled"] = "auto"
    """Execution of a step: `eager`; `compiled` by torch.export and Inductor; `auto` compiles if that should save
    time, sooner where an earlier fit of the same shapes was compiled."""


class Watch(Section):
    """Settings of the ELBO surgeries during a fit (table `analysis`)."""

    every: int = Field(default=0, ge=0)
    """Number of epochs between two ELBO surgeries of a few rows, logged as metrics (split "analysis"); 0 for none."""
    rows: int = Field(default=1000, gt=1)
    """Number of rows in each surgery, chosen once by the seed; the mutual information I_q is at most log(rows)."""
    samples: int = Field(default=1, gt=0)
    """Number of samples of z per datum in each surgery."""
    split: Literal["train", "validation"] = "train"


class Plan(Section):
    """Declaration of a fit without model and data, sufficient for a hand-written pair: objective, training, seed."""

    name: str = Field(default="experiment", min_length=1, max_length=300)
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objective: Objective = TraceELBO()
    train: Table[Train] = Train()
    analysis: Table[Watch] = Watch()

    @classmethod
    def from_toml(cls, text: str, origin: str = "toml") -> Self:
        """Return the declaration that a TOML document contains."""
        return cls.from_dict(toml.parse(text, origin), origin)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: str = "experiment") -> Self:
        """Return the declaration that nested dictionaries contain.

        Raises a DeclarationError that names every problem.
        """
        return from_table(cls, raw, origin)

    def with_overrides(self, *overrides: str) -> Self:
        """Return a copy of the declaration with dotted overrides such as `"train.epochs=20"` applied."""
        raw = self.model_dump(exclude_none=True, exclude_unset=True)
        apply_overrides(raw, toml.parse_overrides(overrides), type(self))
        return type(self).from_dict(raw)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy of the declaration with other values for some of its top-level keys."""
        return type(self).from_dict({**self.model_dump(exclude_none=True, exclude_unset=True), **changes})

    def to_toml(self) -> str:
        """Return the declaration as TOML with every default written out; reading it gives an equal declaration."""
        table = self.model_dump(exclude_none=True)
        last = {key: table.pop(key) for key in ("objective", "train", "analysis")}
        return tomli_w.dumps({**table, **last})

    def digest(self) -> str:
        """Return the SHA-256 digest (hex) of the declaration without name and description."""
        table = self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True)
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def apply_overrides(
    raw: dict[str, Any], overrides: Sequence[tuple[tuple[str, ...], Any]], root: type[BaseModel]
) -> None:
    """Set dotted paths in the nested dictionaries of a declaration.

    A table whose `kind` is overridden loses the keys that the new kind does not have.

    Arguments:
        raw: the declaration, changed in place.
        overrides: pairs of path, as a tuple of keys, and value.
        root: class of the declaration.
    """
    for path, value in overrides:
        table = raw
        for depth, part in enumerate(path[:-1], 1):
            inner = table.get(part)
            table[part] = inner if isinstance(inner, dict) else _new_table(raw, path[:depth], root, inner)
            table = table[part]
        table[path[-1]] = value
        _forget_foreign_keys(raw, path, root)


def _new_table(raw: dict[str, Any], path: Sequence[str], root: type[BaseModel], found: Any) -> dict[str, Any]:
    """Return the table for an overridden key where the declaration has none.

    It is that of the kind whose name is `found` in its place, else that of the default kind, or {}.
    """
    if isinstance(found, str):
        _, kind = table_at(raw, path, root)
        return {kind.tag if kind is not None and issubclass(kind, Component) else "kind": found}
    _, parent = table_at(raw, path[:-1], root)
    field = parent.model_fields.get(path[-1]) if parent else None
    default = field.default if field else None
    return {default.tag: getattr(default, default.tag)} if isinstance(default, Component) else {}


def _forget_foreign_keys(raw: dict[str, Any], path: tuple[str, ...], root: type[BaseModel]) -> None:
    """Remove from a table whose kind has been overridden the keys that the new kind does not have."""
    if path[-1] not in ("kind", "source", "type") or len(path) == 1:
        return
    table, kind = table_at(raw, path[:-1], root)
    if isinstance(table, dict) and kind is not None and not kind.is_family():  # type: ignore[attr-defined]
        for key in [key for key in table if key not in kind.model_fields]:
            del table[key]
