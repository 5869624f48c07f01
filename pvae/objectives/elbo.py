"""ELBOs as objectives: from samples, with KLs in closed form, and those of `pyro.infer`."""

from collections.abc import Collection
from typing import Any, ClassVar, Literal, Self, get_args

import pyro.infer
import torch
from pydantic import Field
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.objectives.base import Objective, Weighed, known_apart
from pvae.pair import Estimator, Layout, Pair, Terms, sum_over


def minus_elbo(terms: Terms, beta: Tensor, free_bits: float = 0.0) -> Tensor:
    """Return beta * sum of batch-mean KLs, each at least `free_bits`, minus the mean reconstruction; nats per datum."""
    reconstruction, *kl = terms.means
    if free_bits:
        kl = [mean.clamp(min=free_bits) for mean in kl]
    return torch.addcmul(-reconstruction, beta, sum_over(kl)) if kl else -reconstruction


def with_penalties(loss: Tensor, terms: Terms) -> Tensor:
    """Return a loss plus the batch means of the penalties that are no part of the ELBO (a commitment loss, say)."""
    return sum_over([loss, *(value.mean() for value in terms.penalties.values())]) if terms.penalties else loss


def with_score_functions(loss: Tensor, terms: Terms, beta: Tensor) -> Tensor:
    """Return a loss of the same value, plus the score-function gradients of latents that have no pathwise gradient.

    The gradient is (gain - baseline) grad log q, gain = reconstruction - beta * sum of KLs, without the latent's own KL
    if that is in closed form. With several particles the mean gain of the others is subtracted as well (which leaves
    the gradient unbiased). The network of a baseline is fitted to the gain by least squares.
    """
    for name, score in terms.scores.items():
        others = [kl for site, kl in terms.kl.items() if score.own_kl or site != name]
        gain = terms.reconstruction - (beta * sum_over(others) if others else 0.0)
        gain = gain.detach()
        score.note(gain)
        left = gain if score.baseline is None else gain - score.baseline.detach()
        if left.dim() > 1:
            left = (left - left.mean(0)) * (len(left) / (len(left) - 1))
        loss = loss - (left * (score.log_q - score.log_q.detach())).mean()
        if score.learns and score.baseline is not None:
            error = (score.baseline - gain).square().mean()
            loss = loss + (error - error.detach())
    return loss


class ELBO(Objective):
    """Base of negative-ELBO losses, with score-function gradients and penalties; subclasses estimate the ELBO terms."""

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        return with_score_functions(with_penalties(minus_elbo(terms, beta, self.free_bits), terms), terms, beta)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        if not self.free_bits or not pair.layout.scored:
            return []
        names = ", ".join(pair.layout.scored)
        return [f"objective.free_bits: expected 0 beside a score function ({names}); got {self.free_bits}."]


class TraceELBO(ELBO):
    """Monte Carlo ELBO, E_q[log p(x, z) - log q(z | x)] from `particles` samples: Pyro's `Trace_ELBO` divided by n.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["trace_elbo"] = "trace_elbo"
    gradients: ClassVar[tuple[str, ...]] = ("stick_the_landing",)
    particles: int = Field(default=1, gt=0)
    """Number of samples per datum."""

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        each = self.gradient
        names = [name for name in each if each[name] != "reparameterised"] if isinstance(each, dict) else None
        estimator = None if each == "reparameterised" else Estimator(names)
        return pair.terms(x, particles=self.particles, rows=rows, expected=True, estimator=estimator)


class TraceMeanFieldELBO(ELBO):
    """ELBO with KL(q(z_l | .) || p(z_l | .)) in closed form for all pairs of distributions for which torch has one.

    It is valid if no parent of a latent, in model or guide, is itself inferred from that latent; other guides are
    refused.
    """

    kind: Literal["trace_mean_field_elbo"] = "trace_mean_field_elbo"

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        return pair.terms(x, closed_form=True, rows=rows, expected=True)


def estimators(objective: Objective, pair: Pair) -> dict[str, Objective]:
    """Return objectives of the same bound by the estimator of its gradient: first that of the samples as they are.

    Beside codes and bits other estimators are those of the real latents alone, which `TraceELBO` can name.
    """
    layout = pair.layout
    coded = {*layout.expected, *layout.scored, *layout.relaxed, *pair.structure.codes}
    real = [name for name in (*layout.latents, *layout.shared) if name not in coded]
    asked: dict[str, Any] = {"as declared" if coded else "reparameterised": "reparameterised"}
    if not coded or (real and isinstance(objective, TraceELBO) and not layout.expected):
        asked |= {name: dict.fromkeys(real, name) if coded else name for name in objective.gradients}
    found = {name: objective.model_copy(update={"gradient": gradient}) for name, gradient in asked.items()}
    if isinstance(objective, TraceELBO) and known_apart(pair).issuperset(layout.latents):
        found["closed_form"] = TraceMeanFieldELBO(beta=objective.beta, free_bits=objective.free_bits)
    return found


ELBOName = Literal["Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO", "TraceGraph_ELBO", "RenyiELBO"]
NAMES: tuple[ELBOName, ...] = get_args(ELBOName)


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
    def of(cls, loss: Any) -> Self:
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
        own: Any = {"RenyiELBO": {"alpha": self.alpha}, "TraceEnum_ELBO": {"strict_enumeration_warning": False}}
        options = {"num_particles": self.particles, "max_plate_nesting": pair.layout.nesting}
        return getattr(pyro.infer, self.elbo)(**options, **own.get(self.elbo, {}))

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

    def evaluate(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor, closed: Collection[str] = ()) -> Weighed:
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


class DataScale(pyro.poutine.messenger.Messenger):
    """Pyro handler that scales a data plate of a batch to `total` rows, unless the plate declares a size of its own.

    `size` is the number of rows that the loss is then of: `total`, or the declared size.
    """

    def __init__(self, layout: Layout, rows: int, total: int) -> None:
        super().__init__()
        self.layout, self.rows, self.size, self.factor = layout, rows, total, total / rows

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
        slopes = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in slopes)]))
    mine, theirs = found
    return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(1 + mine.abs().max()))
