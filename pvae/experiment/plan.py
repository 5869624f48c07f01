"""Settings of a fit: training, what is analysed meanwhile, and the plan that holds both with an objective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field

from pvae.component import Section, Table, from_table
from pvae.experiment.overrides import apply_overrides
from pvae.nn.optimizers import Adam, Optimizer
from pvae.nn.precision import Precision
from pvae.nn.schedules import Constant, Schedule
from pvae.objectives.base import Objective
from pvae.objectives.elbo import TraceELBO
from pvae.util import toml


class Train(Section):
    """Settings of SVI: epochs, batches, optimiser, and the rules of a fit."""

    epochs: int = Field(default=20, gt=0)
    batch_size: int = Field(default=100, gt=0)
    optimizer: Optimizer = Adam()
    schedule: Schedule = Constant()
    """Factor on the learning rate over training."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs during which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; validation and analysis then use the average."""
    alternate: int = Field(default=0, ge=0)
    """Guide steps per model step (variational EM); 0 moves both at once."""
    validate_every: int = Field(default=1, gt=0)
    """Epochs between validations."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many validations without a better ELBO."""
    keep: Literal["best", "last"] = "best"
    """Weights that the run keeps: those of the best validation ELBO, or the last."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Response to a NaN or infinite loss: stop with a diagnosis, skip the step, or go back to the last checkpoint."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Least seconds between two checkpoints; one is always written at the end."""
    precision: Precision = "float32"
    """Type in which dense layers and convolutions multiply in training: `bfloat16` is 1.1 to 1.6 times as fast where
    the processor has its instructions (avx512_bf16); elsewhere factors are rounded, and a step is no faster. The rest
    is float32, validation and analyses too."""
    engine: Literal["auto", "eager", "compiled"] = "auto"
    """Engine of a step: `compiled` is export + Inductor; `auto` compares compile time with the time that it saves."""


class Watch(Section):
    """Analysis during a fit."""

    every: int = Field(default=0, ge=0)
    """Epochs between two ELBO surgeries of a few rows, kept in the metrics (split "analysis"); 0 for none."""
    rows: int = Field(default=1000, gt=1)
    """Rows of each surgery, chosen once by the seed; I_q is at most their logarithm."""
    samples: int = Field(default=1, gt=0)
    """Samples of z per datum."""
    split: Literal["train", "validation"] = "train"


class Plan(Section):
    """Declaration of a fit: all that a hand-written pair needs."""

    name: str = Field(default="experiment", min_length=1, max_length=300)
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objective: Objective = TraceELBO()
    train: Table[Train] = Train()
    analysis: Table[Watch] = Watch()

    @classmethod
    def from_toml(cls, text: str, origin: str = "toml") -> Self:
        """Return the declaration of a TOML document."""
        return cls.from_dict(toml.parse(text, origin), origin)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: str = "experiment") -> Self:
        """Return the declaration of nested dicts; a DeclarationError names every problem."""
        return from_table(cls, raw, origin)

    def with_overrides(self, *overrides: str) -> Self:
        """Return a copy with dotted overrides such as `"train.epochs=20"`."""
        raw = self.model_dump(exclude_none=True, exclude_unset=True)
        apply_overrides(raw, toml.parse_overrides(overrides), type(self))
        return type(self).from_dict(raw)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy with other top-level values."""
        return type(self).from_dict({**self.model_dump(exclude_none=True, exclude_unset=True), **changes})

    def to_toml(self) -> str:
        """Return the declaration as TOML with every default; it reads back to an equal one."""
        table = self.model_dump(exclude_none=True)
        last = {key: table.pop(key) for key in ("objective", "train", "analysis")}
        return tomli_w.dumps({**table, **last})

    def digest(self) -> str:
        """Return the SHA-256 (hex) of everything but name and description."""
        table = self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True)
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()
