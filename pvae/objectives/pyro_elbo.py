"""An ELBO of `pyro.infer` as the objective, run by Pyro itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal, final, get_args

import pyro.infer
import torch
from pydantic import Field
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.objectives.base import Objective
from pvae.pair.layout import Layout
from pvae.pair.pair import Pair
from pvae.pair.terms import Terms

ELBOName = Literal["Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO", "TraceGraph_ELBO", "RenyiELBO"]
NAMES: tuple[ELBOName, ...] = get_args(ELBOName)


@final
class PyroELBO(Objective):
    """An ELBO of `pyro.infer` with its own gradient estimator, per row of data; for hand-written pairs.

    The data plate is scaled to the size of the training set, so that global latents count once for all of it.
    `pvae.fit` makes this objective from `loss=`, where pvae's own step is not the same.

    References:
        Pyro: Deep Universal Probabilistic Programming (Bingham et al., 2019), https://jmlr.org/papers/v20/18-403.html
    """

    engine = "eager"

    kind: Literal["pyro"] = "pyro"
    fixed: ClassVar[str] = 'beta = 1 and free_bits = 0 with kind = "pyro", whose loss is Pyro\'s own; use trace_elbo'
    elbo: ELBOName = "Trace_ELBO"
    """Name of the class in `pyro.infer`."""
    particles: int = Field(default=1, gt=0)
    """Number of samples per step, one after another (`num_particles`)."""
    alpha: float = 0.0
    """Order of the divergence of `RenyiELBO`; 0 is the importance-weighted bound."""

    @classmethod
    def of(cls, loss: Any) -> PyroELBO:
        """Return the objective of an ELBO object such as `pyro.infer.Trace_ELBO(num_particles=2)`.

        Raises:
            DeclarationError: it is no ELBO of `pyro.infer` that Pyro runs without compiling.
        """
        name = type(loss).__name__
        if name not in NAMES or type(loss) is not getattr(pyro.infer, name):
            raise DeclarationError(f"loss: expected one of pyro.infer's {', '.join(NAMES)}; got {name}.")
        return cls(elbo=name, particles=loss.num_particles, alpha=getattr(loss, "alpha", 0.0))

    def made(self, pair: Pair) -> Any:
        """Return the ELBO object of `pyro.infer` for a pair that has seen data."""
        options: dict[str, Any] = {"alpha": self.alpha} if self.elbo == "RenyiELBO" else {}
        if self.elbo == "TraceEnum_ELBO":
            options["strict_enumeration_warning"] = False
        return getattr(pyro.infer, self.elbo)(
            num_particles=self.particles, max_plate_nesting=pair.layout.nesting, **options
        )

    def figure(self, epochs: int) -> str:
        return self.elbo

    def bound(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor) -> Tensor:
        return -self.evaluate(pair, x, rows, beta)[0].detach()

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        if not pair.declared:
            return []
        return ["objective.kind: expected trace_elbo for a declaration, whose penalties Pyro's loss lacks; got pyro."]

    def metrics(self, pair: Pair) -> tuple[str, ...]:
        return ()

    def evaluate(
        self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor, closed: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Return Pyro's loss of a batch divided by the number of rows, with the gradient that Pyro computes.

        The gradient arrives by a linear function of the parameters with that slope and no value.
        """
        total = rows or len(x)
        learned = [p for p in pair.parameters() if p.requires_grad]
        before = [p.grad for p in learned]
        for p in learned:
            p.grad = None
        scale = DataScale(pair.layout, len(x), total)
        with torch.set_grad_enabled(True), pair.own_store(), scale:
            value = self.made(pair).loss_and_grads(pair.program(pair.model), pair.program(pair.guide), x) / scale.size
        slopes = [p.grad for p in learned]
        for p, grad in zip(learned, before, strict=True):
            p.grad = grad
        loss = x.new_tensor(value) if x.is_floating_point() else torch.tensor(value, device=x.device)
        if torch.is_grad_enabled():
            for p, slope in zip(learned, slopes, strict=True):
                if slope is not None:
                    loss = loss + ((p - p.detach()) * (slope / scale.size)).sum()
        return loss, []

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        return pair.terms(x, rows=rows, expected=True)

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        raise NotImplementedError("the loss is Pyro's own: see evaluate")


class DataScale(Messenger):
    """Pyro handler that scales a data plate of a batch to `total` rows, unless the plate declares a size of its own.

    `size` is the number of rows that the loss is then of: `total`, or the declared size.
    """

    def __init__(self, layout: Layout, rows: int, total: int) -> None:
        super().__init__()
        self.layout, self.rows, self.size = layout, rows, total
        self.factor = total / rows

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if self.layout.is_data(frame):
                if (frame.full_size or frame.size) in (-1, self.rows):  # without a size, or the batch's
                    msg["scale"] = msg["scale"] * self.factor
                else:
                    self.size = frame.full_size or frame.size


def same_step(one: Objective, other: Objective, pair: Pair, x: Tensor) -> bool:
    """Return whether two objectives have the same loss and gradient on a batch, at the same noise."""
    found = []
    learned = [p for p in pair.parameters() if p.requires_grad]
    for objective in (one, other):
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            try:
                loss, _ = objective.evaluate(pair, x, len(x), torch.ones((), device=x.device))
            except DeclarationError:
                return False
        slopes = torch.autograd.grad(loss, learned, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(learned, slopes, strict=True)]
        found.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in flat)]))
    mine, theirs = found
    return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(1 + mine.abs().max()))
