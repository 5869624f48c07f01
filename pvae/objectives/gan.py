"""Adversarial training (GAN): a critic learns to distinguish data from samples, and the model to fool it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.data.streamed import Streamed
from pvae.errors import DeclarationError, at, text
from pvae.graph.frame import Frame
from pvae.graph.site import OBSERVED
from pvae.nn.network import MLP, Network, NetworkModule
from pvae.objectives.base import Fitting, Objective, Parts, Stepper
from pvae.pair import Pair, Terms, quiet, samples
from pvae.util import seeds

VALIDATION_ROWS = 1000
"""Number of rows processed at a time in validation."""
TWO_SAMPLE_ROWS = 500
"""Largest number of data, and of samples, that the two-sample test in validation compares."""
REFUSED = "objective gan: expected to be fitted by its own steps; got asked for terms of an ELBO."


# ---------------------------------------------------------------------- the game


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""Return -E log D(x) - E log(1 - D(g(z))), D = sigmoid(s), from the logits s of data and of samples, nats.

    For densities p of data and r of samples the best critic is s = log p - log r, D = p / (p + r), and then
    E_p log p/(p + r) + E_r log r/(p + r) = 2 JS(p || r) - log 4: the loss is at least log 4 - 2 JS(p || r).
    """
    return nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()


def generator_loss(fake: Tensor, form: Literal["non_saturating", "minimax"]) -> Tensor:
    """Return the loss of the generator from the logits s of its samples, nats.

    `minimax`: E log(1 - D) = -E softplus(s), the generator's part of the game's value, whose slope in s, -D, vanishes
    where the critic is certain. `non_saturating`: -E log D = E softplus(-s), of slope -(1 - D): the same fixed point,
    and a gradient that is largest there.
    """
    return nn.functional.softplus(-fake).mean() if form == "non_saturating" else -nn.functional.softplus(fake).mean()


def slope_penalty(critic: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits s `(n,)` of rows `(n, *row)`, and the R1 penalty 1/2 E ||grad_x s(x)||^2; both differentiable."""
    rows = rows.detach().requires_grad_(True)
    logits = critic(rows)
    (slope,) = torch.autograd.grad(logits.sum(), rows, create_graph=True)
    return logits, 0.5 * slope.flatten(1).square().sum(1).mean()


def generate(pair: Pair, rows: Tensor) -> Tensor:
    """Return a sample of the model for each of the rows `(n, *row)`, with its covariates; differentiable."""
    return pair.frame.join(samples(pair.simulate(rows))[OBSERVED]["value"], rows)


def nearest_accuracy(real: Tensor, fake: Tensor) -> float:
    """Return the leave-one-out accuracy of a one-nearest-neighbour classifier of data and samples, each `(n, D)`.

    It is 1/2 in expectation for samples of one distribution (a little less on few rows, for one row of its own class
    is missing), 1 for separated samples, and below 1/2 where samples are copies of single data.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545
        An empirical study on evaluation metrics of GANs (Xu et al., 2018), https://arxiv.org/abs/1806.07755
    """
    rows = torch.cat([real.flatten(1), fake.flatten(1)]).double()
    distance = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    own = torch.arange(len(rows), device=rows.device) < len(real)
    return float((own[distance.argmin(1)] == own).double().mean())


# ---------------------------------------------------------------------- the objective


class Critic(nn.Module):
    """Classifier of a row of data and its covariates: a logit, positive for data."""

    def __init__(self, network: NetworkModule, frame: Frame) -> None:
        super().__init__()
        self.network, self.frame = network, frame

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits `(n,)` of rows `(n, *row)`."""
        x, seen = self.frame.split(rows)
        return self.network({OBSERVED: x, **seen}).squeeze(-1)


class GAN(Objective):
    """GAN objective: min over the model, max over a critic D, of E log D(x) + E log(1 - D(g(z))), z ~ p(z).

    It needs no likelihood and no inference: the declared likelihood is `determined`, x = g(z), all posteriors `prior`.
    An epoch takes every training row once; for each batch there are `critic_steps` steps of the critic and then one of
    the model. The last weights are kept, whatever `train.keep` says, because no metric ranks them. `train.average`
    averages the weights of the model and of the critic.

    Warning: the losses do not fall as the model improves; watch `two_sample`, or `pvae two-sample`.

    References:
        Generative Adversarial Networks (Goodfellow et al., 2014), https://arxiv.org/abs/1406.2661
    """

    kind: Literal["gan"] = "gan"
    fixed: ClassVar[str] = "beta = 1 and free_bits = 0 with gan: nothing is inferred, and no KL is paid"
    engine: ClassVar[str | None] = "eager"
    scores: ClassVar[bool] = False
    refuses: ClassVar[tuple[str, ...]] = ("alternate", "patience", "precision")
    critic: Network = MLP(hidden=(300, 300))
    """Network of the critic, from x (and covariates) to one logit."""
    form: Literal["non_saturating", "minimax"] = "non_saturating"
    """The generator's loss: -E log D(g(z)), or E log(1 - D(g(z))) as in the value of the game."""
    r1: float = Field(default=0.0, ge=0)
    """Weight of the R1 penalty 1/2 E ||grad_x s(x)||^2 on data, s the critic's logit: training then converges locally.

    References:
        Which Training Methods for GANs do actually Converge? (Mescheder et al., 2018), https://arxiv.org/abs/1801.04406
    """
    critic_steps: int = Field(default=1, gt=0)
    """Number of critic steps before each step of the model: the first on the batch, others on random training rows."""

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """Raise DeclarationError: a GAN has no ELBO."""
        raise DeclarationError(REFUSED)

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Raise DeclarationError: a GAN has two losses, minimised in turn."""
        raise DeclarationError(REFUSED)

    def attach(self, pair: Pair) -> None:
        """Add the critic as `pair.critic`, and replace the likelihood by one without a density."""
        model: Any = pair.model
        model.decoder.likelihood = model.decoder.likelihood.implicit()
        with at("objective.critic"):
            network = self.critic.build({OBSERVED: model.frame.x, **model.frame.shapes}, (1,))
        pair.implicit = True
        pair.critic = Critic(network, model.frame)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        if not pair.implicit:
            return ["pair: expected a declared pair for the objective gan, which has a critic; got another."]
        model: Any = pair.model
        like = torch.zeros(2, *pair.frame.row).to(next(pair.parameters()))
        with torch.random.fork_rng():
            nodes = samples(pair.simulate(like))
        learned = [name for name, prior in model.priors.items() if any(p.requires_grad for p in prior.parameters())]
        stuck = {name: nodes[name]["fn"] for name in learned if not nodes[name]["fn"].has_rsample}
        return [text("objectives.gan.no_gradient", name=name, fn=fn) for name, fn in stuck.items()]

    def stepper(self, fitting: Fitting) -> Stepper:
        return GANStepper(self, fitting)

    def measure(self, pair: Pair, x: Tensor | Streamed, seed: int) -> dict[str, float]:
        """Return the losses of critic and generator and the two-sample accuracy, on held-out data and as many samples.

        The accuracy `two_sample` uses the first `TWO_SAMPLE_ROWS` of both. `js_bound` is
        (log 4 - critic_loss) / 2: on rows the critic has not learned from, a lower bound in expectation of the
        Jensen-Shannon divergence, nats, at most log 2.
        """
        totals, pieces = dict.fromkeys(("critic_loss", "generator_loss"), 0.0), []
        with quiet(pair, x[:1]):
            for start in range(0, len(x), VALIDATION_ROWS):
                seeds.set_noise(seeds.mix(seed, seeds.VALIDATION, start), x.device)
                real = pair.accept(x[start : start + VALIDATION_ROWS])
                fake = generate(pair, real)
                pieces.append((real, fake)) if start < TWO_SAMPLE_ROWS else None
                seen, shown = (pair.get_submodule("critic")(rows).double() for rows in (real, fake))
                totals["critic_loss"] += float(critic_loss(seen, shown)) * len(real)
                totals["generator_loss"] += float(generator_loss(shown, self.form)) * len(real)
        means = {name: total / len(x) for name, total in totals.items()}
        sides = [torch.cat(parts)[:TWO_SAMPLE_ROWS] for parts in zip(*pieces, strict=True)]
        return {**means, "js_bound": (math.log(4) - means["critic_loss"]) / 2, "two_sample": nearest_accuracy(*sides)}


class GANStepper(Stepper):
    """Alternating gradient steps of critic and model, by one optimiser; parameters without a gradient stay unchanged.

    After a loss that is not finite no parameter changes for the rest of the step. On a GPU there is no synchronisation.

    Arguments:
        objective: the declared objective, with the two losses.
        fitting: data, optimiser and settings of the fit.
    """

    def __init__(self, objective: GAN, fitting: Fitting) -> None:
        self.objective, self.data = objective, fitting.data
        self.pair, self.optimizer = fitting.loss.pair, fitting.optimizer
        self.critic = self.pair.get_submodule("critic")
        self.clip_norm, self.average = fitting.clip_norm, fitting.average
        self.learned = [p for p in self.pair.parameters() if p.requires_grad]
        self.sound = torch.ones((), dtype=torch.bool)
        self.unused: set[int] = set()
        critic = {id(p) for p in self.critic.parameters()}
        self.sides = [p for p in self.learned if id(p) in critic], [p for p in self.learned if id(p) not in critic]
        norms = ("critic_grad_norm", "generator_grad_norm") if self.clip_norm else ()
        self.names = ("critic_loss", "r1", *norms[:1], "generator_loss", *norms[1:])
        """Names of the metrics of a step; gradient norms are included only if gradients are clipped or checked."""

    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take steps of critic and model on a batch `(n, *row)`; return metrics, the critic's averaged over steps."""
        return self._steps(lambda part, width, phase: part(x, 1.0, 0))

    def sharded(self, batch: Parts, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        return self._steps(batch.total)

    def _steps(self, total: Callable[[Callable[[Tensor, float, int], Tensor], int, int], Tensor]) -> Tensor:
        """Take the steps of critic and model; `total` sums gradients and losses over the parts of the batch."""
        critic, model = (sum(p.numel() for p in side) for side in self.sides)
        taken = []
        for phase in range(self.objective.critic_steps):
            found = total(partial(self._against, fresh=phase > 0), critic + 2, phase)
            if not phase:
                self.sound = torch.ones((), dtype=torch.bool, device=found.device)
            moved = self._move(found[:critic], found[-2:].sum(), 0)
            taken.append(torch.cat([found[-2:], moved[1:]]))
        found = total(self._fooling, model + 1, self.objective.critic_steps)
        moved = self._move(found[:model], found[-1], 1)
        if self.average is not None and (found.is_cuda or bool(self.sound)):
            averaged, decay = self.average
            torch._foreach_lerp_(list(averaged), [p.detach() for p in self.learned], 1 - decay)
        self.moving_now = False
        return torch.cat([torch.stack(taken).mean(0), moved])

    def _against(self, x: Tensor, share: float, _shard: int, fresh: bool = False) -> Tensor:
        """Return gradient, loss and R1 penalty of the critic on data and samples; `fresh` takes other random rows."""
        if fresh:
            x = self.data.draw(torch.randint(len(self.data), (len(x),), device=x.device)).to(x)
        with torch.no_grad():
            fake = generate(self.pair, x)
        real, penalty = slope_penalty(self.critic, x) if self.objective.r1 else (self.critic(x), x.new_zeros(()))
        loss, penalty = critic_loss(real, self.critic(fake)), self.objective.r1 * penalty
        return share * torch.cat([self._slopes(loss + penalty, 0), torch.stack([loss, penalty]).detach()])

    def _fooling(self, x: Tensor, share: float, _shard: int) -> Tensor:
        """Return gradient and loss of the model on samples for the rows of a batch."""
        loss = generator_loss(self.critic(generate(self.pair, x)), self.objective.form)
        return share * torch.cat([self._slopes(loss, 1), loss.detach().reshape(1)])

    def _slopes(self, loss: Tensor, side: int) -> Tensor:
        """Return the gradient of a loss in the parameters of critic (`side` 0) or model (1), as one vector."""
        moving = self.sides[side]
        slopes = torch.autograd.grad(loss, moving, allow_unused=True)
        self.unused |= {id(p) for p, slope in zip(moving, slopes, strict=True) if slope is None}
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(moving, slopes, strict=True)]
        return torch.cat([slope.flatten() for slope in whole])

    def _move(self, slopes: Tensor, loss: Tensor, side: int) -> Tensor:
        """Take a step of critic (`side` 0) or model (1), if finite; return the loss and, if computed, gradient norm."""
        moving = self.sides[side]
        for p, slope in zip(moving, slopes.split([p.numel() for p in moving]), strict=True):
            p.grad = None if id(p) in self.unused else slope.view_as(p)
        out = loss.reshape(1)
        if self.clip_norm:
            out = torch.cat([out, nn.utils.clip_grad_norm_(moving, self.clip_norm).detach().reshape(1)])
        self.sound = self.sound & out.isfinite().all()
        if out.is_cuda:  # no synchronisation: the fused kernel skips the update where found_inf is 1
            self.optimizer.found_inf = (~self.sound).float()  # type: ignore[attr-defined]
        if out.is_cuda or bool(self.sound):
            self.moving_now = True
            self.optimizer.step()
        for p in moving:
            p.grad = None
        return out
