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
    """Treatment of batches by a fit: a gradient step with each (`Step`), or sums for a closed form."""

    moving_now = False
    """Whether a step has begun to move weights and has not ended; it stays so where it broke off."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What the returned vector holds."""

    @abstractmethod
    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take in one batch; parameters in `frozen` do not move. Returns the detached vector named by `names`."""

    def begin(self) -> None:  # noqa: B027 - most have nothing to do
        """Called once, before the first step of a fit."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after the last step of every epoch, before validation."""


@dataclass(frozen=True)
class Fitting:
    """What a stepper other than gradient steps knows of its fit."""

    loss: Loss
    """The objective over the pair."""
    data: Split
    """The training data."""
    steps: int
    """Batches of an epoch."""
    seed: int
    gathered: dict[str, Tensor]
    """What the steps of an epoch sum up, kept here because it belongs to every checkpoint."""
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
    """What parameters are cast to; None leaves them as they are."""
    engine: ClassVar[str | None] = None
    """How its steps run, where there is no choice."""
    refuses: ClassVar[tuple[str, ...]] = ()
    """Keys of `train` that must stay as they are by default."""
    scores: ClassVar[bool] = True
    """Whether it fits a density of x, so that an ELBO can be reported."""

    beta: Schedule = Constant()
    """Weight of the KL in per-datum nats: 1 is the ELBO, 0 an autoencoder."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats per latent and datum below which the batch-mean KL of a latent is not penalised.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8
    """

    @abstractmethod
    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """The terms this objective needs of a batch of a data set of `rows`."""

    @abstractmethod
    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Scalar loss, nats per datum."""

    def attach(self, pair: Pair) -> None:  # noqa: B027 - most have nothing to add
        """Add to a declared pair what is fitted beside model and guide; called once, with weights still at random."""

    def measure(self, pair: Pair, x: Tensor | Streamed, seed: int) -> dict[str, float] | None:
        """What validation reports of held-out data `(n, *row)` in place of an ELBO; None for that.

        Moves no weight and no random state; the same seed, the same figures.
        """
        return None

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """What keeps a pair from being fitted to `rows` training rows by this objective, one line each."""
        return []

    def stepper(self, fitting: Fitting) -> Stepper | None:
        """What fits the pair instead of gradient steps; None for those."""
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
        """x `(batch, *event)` to the scalar loss and the vector named by `names`."""
        with products_in(self.precision):
            terms = self.objective.terms(self.pair, x, self.rows)
        loss = self.objective.loss(terms, self.beta)
        return loss, torch.stack([loss, *terms.means]).detach()
