"""Objectives: the losses that SVI minimises, as functions of the ELBO terms of a model/guide pair; nats per datum."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Protocol, Self

import pyro
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Component, Shape, Table
from pvae.data import Split, streamed
from pvae.errors import DeclarationError, refuse, text
from pvae.models.graph import GraphModel
from pvae.nn.precision import products_in
from pvae.nn.schedules import Constant, Schedule
from pvae.pair import Dependencies, Pair, Terms
from pvae.util import Record

Weighed = tuple[Tensor, list[Tensor]]
"""Loss of a batch, and its metrics."""
FITTED = "train_log_p"
"""Figure that ranks weights by the negative loss on the training data: they have converged, or can be better."""


def named(figure: str) -> str:
    """Return the name of a validation figure in words."""
    known = {"elbo": "validation ELBO", "log_joint": "validation log joint", FITTED: "log p of the training data"}
    return known.get(figure, f"validation {figure}")


class Parts(Protocol):
    """Protocol for a batch that several shards make up, of which every process holds some (`train.shards`)."""

    count: int
    """Number of shards."""

    def total(self, work: Callable[[Tensor, float, int], Tensor], width: int, phase: int = 0) -> Tensor:
        """Return the sum over the shards of a vector of `width` numbers, in one order for any number of processes.

        `work` takes the rows of a shard, their proportion of the batch, and the number of the shard. Every `phase` of a
        step has noise of its own.
        """


class Stepper(ABC):
    """Base of the training steps of a fit, one call per batch: a gradient step (`Step`), an E-step or GAN steps."""

    moving_now = False
    """True from the first change of a weight in a step to its end, and at the end of an epoch; it stays True if an
    error interrupts them."""

    names: tuple[str, ...]
    """Names of the metrics in the vector that a step returns."""

    @abstractmethod
    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Process one batch, leaving parameters in `frozen` unchanged; return the detached metrics named by `names`."""

    @abstractmethod
    def sharded(self, batch: Parts, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Process one batch in shards, as a call does in one piece: from sums over the shards, the same everywhere."""

    def begin(self) -> None:  # noqa: B027 - most have nothing to do
        """Prepare the fit; called once, before its first step. The default does nothing."""

    def end_epoch(self) -> None:  # noqa: B027
        """Complete an epoch; called after its last step, before validation. The default does nothing."""


class Fitting(Record):
    """Data, optimiser and settings of a fit, from which an objective makes a stepper of its own."""

    loss: "Loss"
    """Module that computes the objective for the pair."""
    data: Split
    """Training data of the fit."""
    steps: int
    """Number of batches in an epoch."""
    seed: int
    gathered: dict[str, Tensor]
    """Sums that the stepper accumulates over the steps of an epoch, saved in every checkpoint."""
    tell: Callable[[str, str], None]
    """Function that reports an event, given its kind and a message."""
    optimizer: torch.optim.Optimizer
    """Optimiser of all trainable parameters."""
    clip_norm: float | None = None
    """Largest gradient norm, for clipping; infinity to compute the norm without clipping, None to do neither."""
    average: tuple[Sequence[Tensor], float] | None = None
    """Averaged weights, in the order of the pair's trainable parameters, updated in place, and their decay; or None."""


class Objective(Component):
    """Declared objective: loss of the ELBO terms; `beta` weights the KL, whose first `free_bits` nats are free."""

    default: ClassVar[str] = "trace_elbo"
    dtype: ClassVar[torch.dtype | None] = None
    """Floating-point type that the pair's parameters are cast to; None for no cast."""
    engine: ClassVar[str | None] = None
    """Only engine that can run the steps of this objective, such as "eager"; None if any engine can."""
    refuses: ClassVar[tuple[str, ...]] = ()
    """Keys of the declaration's section `train` that this objective does not support: they must keep their defaults."""
    fixed: ClassVar[str] = ""
    """Expected `beta` and `free_bits`, with the reason, as the error says it; empty if they may be set."""
    gradients: ClassVar[tuple[str, ...]] = ()
    """Estimators of the gradient of real latents beside `reparameterised`."""
    scores: ClassVar[bool] = True
    """True if the objective fits a density of x, so that an ELBO can be reported."""

    beta: Schedule = Constant()
    """Weight of the KL in per-datum nats: 1 is the ELBO, 0 an autoencoder."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats per latent and datum below which the batch-mean KL of a latent is not penalised.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8
    """
    classification: float | None = Field(default=None, gt=0)
    """Weight of the penalty -log q(y | x) in rows where a latent y is `observed`, nats, which is no part of the ELBO:
    the latter teaches q(y | x) only in the other rows.

    References:
        Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), https://arxiv.org/abs/1406.5298
    """

    gradient: str | Table[dict[str, str]] = "reparameterised"
    """Estimator of the gradient through samples of real latents, of the same loss and expectation; or a table with one
    for each of some latents. `stick_the_landing` (trace_elbo) leaves out the score of q, so that the gradient has no
    variance at the exact posterior; `doubly_reparameterised` (iwae) also squares the importance weights of samples,
    which keeps the signal-to-noise ratio as their number grows.

    References:
        Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018),
        https://arxiv.org/abs/1810.04152
        Generalized Doubly Reparameterized Gradient Estimators (Bauer, Mnih, 2021), https://arxiv.org/abs/2101.11046
    """

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse(self.fixed and (self.beta != Constant() or self.free_bits), self.fixed, ValueError)
        known, each = ["reparameterised", *self.gradients], self.gradient
        more = sorted(({*each.values()} if isinstance(each, dict) else {each}).difference(known))
        if more or (isinstance(each, dict) and "stick_the_landing" not in known):
            raise ValueError(text("objectives.base.gradient", known=known, objective=self, found=[*more, "a table"][0]))
        refuse(self.free_bits and each != "reparameterised", "objectives.base.free_bits", ValueError)
        return self

    @abstractmethod
    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """Return the ELBO terms that this objective needs, of a batch `x` from a data set of `rows` rows."""

    @abstractmethod
    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Return the scalar loss of ELBO terms, nats per datum, with weight `beta` of the KL."""

    def metrics(self, pair: Pair) -> tuple[str, ...]:
        """Return the names of the metrics of a batch beside the loss: reconstruction, then the KL of every latent."""
        summed = () if pair.layout.eliminated else pair.layout.enumerated
        return ("reconstruction", *(f"kl/{name}" for name in (*pair.layout.latents, *pair.layout.shared, *summed)))

    def evaluate(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor, closed: Collection[str] = ()) -> Weighed:
        """Return the differentiable loss of a batch, and its metrics as `metrics` names them (batch means, nats).

        KLs of the latents `closed` are metrics in closed form where there is one, whatever estimates the loss.
        """
        terms = self.terms(pair, x, rows)
        return self.loss(terms, beta), terms.figures(closed) if closed else terms.means

    def attach(self, pair: Pair) -> None:  # noqa: B027 - most have nothing to add
        """Add modules (a critic, say) to a declared pair, none by default; called once, before weights are set."""

    def measure(self, pair: Pair, x: Tensor | streamed.Streamed, seed: int) -> dict[str, float] | None:
        """Return the metrics of held-out data `(n, *row)` that validation reports, by name; None to report the ELBO.

        Weights and the random state stay unchanged; the same seed gives the same metrics.
        """
        return None

    def figure(self, epochs: int) -> str:
        """Return the name of the validation figure that ranks the weights of a fit: what the objective maximises.

        The weight of the KL is that of the last epoch, so that figures are comparable during a warm-up: `elbo` at 1,
        `reconstruction` at 0, else `beta_elbo`, in which every KL is at least `free_bits`.
        """
        beta = self.beta.at(epochs, epochs)
        return "reconstruction" if beta == 0 else "elbo" if beta == 1 and not self.free_bits else "beta_elbo"

    def bound(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor) -> Tensor | None:
        """Return the batch mean of the maximised bound, nats per datum; None if the ELBO's terms make it up.

        Penalties of factors, the observed sites of a guide, are subtracted.
        """
        return None

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """Return a message for each reason why this objective cannot fit a pair to `rows` training rows."""
        return []

    def stepper(self, fitting: Fitting) -> Stepper | None:
        """Return the objective's own stepper for a fit; None for ordinary gradient steps."""
        return None


def ranked_by(objective: Objective, epochs: int, pair: Pair) -> str:
    """Return the name of the figure that ranks the weights of a pair (`Objective.figure`), as its metrics name it."""
    figure = objective.figure(epochs)
    return pair.structure.total if figure == "elbo" else figure


def known_apart(pair: Pair) -> frozenset[str]:
    """Return the latents of which E_q[log q - log p] is the mean of KLs in closed form, if these exist.

    That is so of one latent alone, and of those of a declared pair whose prior reads none that is inferred from them.
    """
    names = frozenset((*pair.layout.latents, *pair.layout.shared))
    if len(names) == 1 or not isinstance(pair.model, GraphModel):
        return names if len(names) == 1 else frozenset()
    sites = pair.model.sites
    guide, model = {s.name: names & {*s.guide_given} for s in sites}, {s.name: names & {*s.given} for s in sites}
    return names - Dependencies(guide, model).bottom_up


def weigh_step(objective: Objective, pair: Pair, row: Shape, rows: int) -> None:
    """Run the loss of a batch on the meta device and its gradient, whose tensors `pvae.util.memory` counts."""
    with pyro.validation_enabled(False):
        loss, _ = Loss(objective, pair, rows)(torch.empty(rows, *row, dtype=objective.dtype, device="meta"))
    torch.autograd.grad(loss, [p for p in pair.parameters() if p.requires_grad], allow_unused=True)


class Loss(nn.Module):
    """Objective of a pair as one module that can be exported; the weight `beta`, which varies in training, is a buffer.

    `forward(x)` returns the differentiable loss and a vector of metrics without gradient: loss, reconstruction, then
    the KL of every latent (batch means, nats per datum), named by `names`. Matrix products use `precision`.
    """

    beta: Tensor

    def __init__(self, objective: Objective, pair: Pair, rows: int | None = None, precision: str = "float32") -> None:
        super().__init__()
        self.objective, self.pair, self.rows, self.precision = objective, pair, rows, precision
        self.names: tuple[str, ...] = ("loss", *objective.metrics(pair))
        self.closed = known_apart(pair)
        self.register_buffer("beta", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalar loss of x `(batch, *event)` and the vector of metrics named by `names`."""
        with products_in(self.precision):
            loss, metrics = self.objective.evaluate(self.pair, x, self.rows, self.beta, self.closed)
        if len(metrics) != len(self.names) - 1:
            found = self.objective.metrics(self.pair)[1:]
            raise DeclarationError.of("objectives.base.latents", names=self.names[2:], found=found)
        return loss, torch.stack([loss, *metrics]).detach()
