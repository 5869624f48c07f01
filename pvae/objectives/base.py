"""Objectives: what SVI minimises, as functions of a pair's terms; nats per datum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Component
from pvae.nn.precision import Precision, products_in
from pvae.nn.schedules import Constant, Schedule
from pvae.pair.pair import Pair
from pvae.pair.terms import Terms

if TYPE_CHECKING:
    from pvae.data import Split
    from pvae.data.streamed import Streamed


class Stepper(ABC):
    """Base of the steps of a fit: a gradient step for each batch (`Step`), or sums for a closed form."""

    moving_now = False
    """True from the first change of a weight to the end of a step, also after an error in between."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the figures in the returned vector."""

    @abstractmethod
    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take in one batch; parameters in `frozen` do not move. Returns the detached vector named by `names`."""

    def begin(self) -> None:  # noqa: B027 - most have nothing to do
        """Called once, before the first step of a fit."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after the last step of every epoch, before validation."""


@dataclass(frozen=True)
class Fitting:
    """The fit that an objective's own stepper belongs to."""

    loss: Loss
    """The objective over the pair."""
    data: Split
    """The training data."""
    steps: int
    """Batches of an epoch."""
    seed: int
    gathered: dict[str, Tensor]
    """Sums over the steps of an epoch; every checkpoint holds them."""
    tell: Callable[[str, str], None]
    """Reports an event, as kind and message."""
    optimizer: torch.optim.Optimizer
    """Over all parameters that are free."""
    clip_norm: float | None = None
    """Largest norm of a gradient; infinite where it is only watched, None where it is not."""
    average: tuple[Sequence[Tensor], float] | None = None
    """Averaged weights in the order of the pair's free parameters, moved in place, with their decay."""


class Objective(Component):
    """A loss over `Terms`; `beta` weighs the KL, `free_bits` leaves the first nats of each latent unpenalised."""

    default: ClassVar[str] = "trace_elbo"
    dtype: ClassVar[torch.dtype | None] = None
    """Type that parameters are cast to; None leaves them as they are."""
    engine: ClassVar[str | None] = None
    """Engine of its steps, where there is no choice."""
    refuses: ClassVar[tuple[str, ...]] = ()
    """Keys of `train` that must keep their defaults."""
    scores: ClassVar[bool] = True
    """True if it fits a density of x, so that an ELBO can be reported."""

    beta: Schedule = Constant()
    """Weight of the KL in per-datum nats: 1 is the ELBO, 0 an autoencoder."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats per latent and datum below which the batch-mean KL of a latent is not penalised.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8
    """

    @abstractmethod
    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """Return the terms that this objective needs, of a batch from a data set of `rows`."""

    @abstractmethod
    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Return the scalar loss, nats per datum."""

    def attach(self, pair: Pair) -> None:  # noqa: B027 - most have nothing to add
        """Add further modules to a declared pair (a critic); called once, before the first weights are set."""

    def measure(self, pair: Pair, x: Tensor | Streamed, seed: int) -> dict[str, float] | None:
        """Return the figures of held-out data `(n, *row)` that validation reports; None for an ELBO.

        Changes no weight and no random state; the same seed gives the same figures.
        """
        return None

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """Return a line for each reason why this objective cannot fit a pair to `rows` training rows."""
        return []

    def stepper(self, fitting: Fitting) -> Stepper | None:
        """Return the stepper of this objective; None for gradient steps."""
        return None


class Loss(nn.Module):
    """An objective over a pair as one module, ready to be exported: weights that change live in buffers.

    `forward(x)` returns the loss, differentiable, and a vector of figures without gradient: loss, reconstruction,
    then the KL of every latent (batch means, nats per datum); `names` names them. Networks multiply in `precision`.
    """

    beta: Tensor

    def __init__(
        self, objective: Objective, pair: Pair, rows: int | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__()
        self.rows, self.precision = rows, precision
        self.objective = objective
        self.pair = pair
        sites = (*pair.layout.latents, *pair.layout.shared, *pair.layout.enumerated)
        self.names: tuple[str, ...] = ("loss", "reconstruction", *(f"kl/{name}" for name in sites))
        self.register_buffer("beta", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalar loss of x `(batch, *event)` and the vector named by `names`."""
        with products_in(self.precision):
            terms = self.objective.terms(self.pair, x, self.rows)
        loss = self.objective.loss(terms, self.beta)
        return loss, torch.stack([loss, *terms.means]).detach()
