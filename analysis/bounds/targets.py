"""Densities of annealed importance sampling in unconstrained space, and Hamiltonian Monte Carlo between them."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import require_counts, require_room
from pvae.analysis.figures.estimate import refuse, text, texts
from pvae.errors import DataError
from pvae.pair import PARTICLES, Layout, Pair, SiteShape, log_prob, samples, site_shape, sum_over, unwrapped
from pvae.util import Record

Start = Literal["guide", "prior"]
PILOT_CHAINS = 8
PILOT_FIRST, PILOT_ALL = 30, 60
"""Smallest number of pilot transitions, which tune step sizes, at the first temperature and at all temperatures
together."""
TARGET_ACCEPTANCE = 0.65
ADAPTATION_RATE = 0.5
"""Rate at which log step sizes adapt to the acceptance."""
FIRST_STEP = 0.2
STEP_JITTER = 0.2
"""Half-width of the random relative change of a step size, which avoids periodic trajectories."""
STEEPNESS = 4.0
"""Steepness of the sigmoid schedule."""


class AnnealingPlan(Record):
    """Settings of annealed importance sampling, and the name of the calling function for error messages."""

    caller: str
    temperatures: int
    chains: int
    leapfrog: int
    start: Start

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the result of annealing contains, by name."""
        return {name: getattr(self, name) for name in ("temperatures", "chains", "leapfrog", "start")}

    def check(self, pair: Pair, rows: int) -> None:
        """Refuse counts below one or too large for memory, an unknown start, latents that are global or summed out."""
        require_counts(self.caller, temperatures=self.temperatures, chains=self.chains, leapfrog=self.leapfrog)
        told = f"{self.chains:,} chains for each of {rows:,} rows, {self.temperatures:,} temperatures"
        require_room(pair, self.caller, rows + 4 * self.chains, rows * self.chains + 50 * self.temperatures, told)
        reasons = texts("refused.annealing", plan=self, layout=pair.layout, bounds=pair.structure.bounds)
        refuse(reasons, "".join(reasons[:1]))


# ---------------------------------------------------------------------- the annealed densities


class States(Record):
    """Latents of all annealing chains in unconstrained space, with their log densities."""

    u: Tensor
    """Unconstrained latents of every chain and datum, `(chains, n, D)`."""
    base: Tensor
    """Log density of the start distribution p0, with the log Jacobian, `(chains, n)`, float64."""
    joint: Tensor
    """Log joint density log p(x, z), with the log Jacobian, `(chains, n)`, float64."""

    def tempered(self, beta: float) -> Tensor:
        """Return the annealed log density log f_b = (1 - b) log p0 + b log p(x, z), `(chains, n)`."""
        return (1 - beta) * self.base + beta * self.joint


class Coordinate(Record):
    """One latent and the map from unconstrained values to its support."""

    name: str
    transform: distributions.Transform
    value: SiteShape
    free: SiteShape
    """Shape of the unconstrained value (of a simplex one element less)."""


class Target:
    """Log densities log p0(z) and log p(x, z) of a chunk of rows as functions of unconstrained latents.

    Arguments:
        pair: a pair that passed `AnnealingPlan.check`.
        x: data `(n, *event)`.
        plan: settings of annealing; its `start` names the distribution p0.

    Raises:
        DataError: a latent is discrete or global, or its support depends on other latents; or the chains start from
            the guide, whose latents or supports are not those of the model.
    """

    def __init__(self, pair: Pair, x: Tensor, plan: AnnealingPlan) -> None:
        self.pair, self.x, self.layout = pair, x, pair.layout
        self.start: Start = plan.start
        model, again = (_unseen(pair.model_trace(x)) for _ in range(2))
        self.coordinates = [_coordinate(plan, name, node, again[name], self.layout) for name, node in model.items()]
        refuse(not self.coordinates, "refused.no_latents", caller=plan.caller)
        if plan.start == "guide":
            _check_guide(plan, model, _unseen(pair.guide_trace(x)))
        self.sizes = [coordinate.free.numel for coordinate in self.coordinates]
        self.stacked = False
        self.stacked = self._stacks()

    # -- running the programs for (chains, n) states

    def _run(self, program: Callable[..., Any], flat: dict[str, Tensor], count: int) -> pyro.poutine.Trace:
        """Run guide or model with the chains along a plate of their own, to the left of all other plates.

        For pairs that accept no further plate the chains are further rows of the batch.
        """
        x, nesting = self.x, self.layout.nesting
        if not self.stacked:
            x, flat = x.repeat(count, *(1,) * (x.dim() - 1)), {name: t.flatten(0, 1) for name, t in flat.items()}
        data = {c.name: c.value.spread(flat[c.name], nesting) for c in self.coordinates if c.name in flat}
        with pyro.plate(PARTICLES, count, dim=-1 - nesting) if self.stacked else nullcontext():
            return self.pair.guide_trace(x, data) if program is self.pair.guide else self.pair.model_trace(x, data)

    def _stacks(self) -> bool:
        """Return True if a plate of chains gives the densities of single chains.

        A hand-written guide or model that reshapes its inputs may fail under a further plate, or sum over it.
        """
        single = [self.draw(1) for _ in range(3)]
        base, joint = torch.cat([p.base for p in single]), torch.cat([p.joint for p in single])
        self.stacked = True
        try:
            stacked = self.at(torch.cat([p.u for p in single]))
        except Exception:  # whatever a program raises under a further plate
            return False
        return stacked.joint.shape == joint.shape and _close(stacked.joint, joint) and _close(stacked.base, base)

    def _score(self, trace: pyro.poutine.Trace, names: Sequence[str], count: int) -> Tensor:
        """Return the summed log density of some sites of a trace, `(count, n)`, float64."""
        nodes = [trace.nodes[name] for name in names if name in trace.nodes]  # a batch may lack some
        if self.stacked:
            return sum_over([log_prob(node, self.layout, count).double() for node in nodes])
        return sum_over([log_prob(node, self.layout, 0).double() for node in nodes]).reshape(count, len(self.x))

    # -- densities

    def _constrained(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the constrained values `(chains, n, numel)` of every latent, and the log Jacobian `(chains, n)`."""
        values, jacobian = {}, torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for c, flat in zip(self.coordinates, u.split(self.sizes, -1), strict=True):
            free = c.free.spread(flat, self.layout.nesting)
            value = c.transform(free)
            values[c.name] = _gather(value, c.value)
            part = c.transform.log_abs_det_jacobian(free, value).double()  # summed over all but chains and rows
            axis = part.dim() - 1 - (len(c.value.right) - c.transform.codomain.event_dim)
            jacobian = jacobian + part.movedim(axis, 1).reshape(len(part), len(self.x), -1).sum(-1)
        return values, jacobian

    def at(self, u: Tensor) -> States:
        """Return the log densities at unconstrained latents `(chains, n, D)`; differentiable."""
        values, jacobian = self._constrained(u)
        count, names = len(u), [c.name for c in self.coordinates]
        model = self._run(self.pair.model, values, count)
        prior = self._score(model, names, count)
        joint = prior + self._score(model, self.layout.observed, count)
        base = self._score(self._run(self.pair.guide, values, count), names, count) if self.start == "guide" else prior
        return States(u, base + jacobian, joint + jacobian)

    def slope(self, u: Tensor, beta: float) -> tuple[States, Tensor]:
        """Return the log densities at `u`, and the gradient of log f_b, `(chains, n, D)`, zero where it is not finite.

        Leapfrog with any function of the position in place of the gradient is reversible and preserves volume, so the
        acceptance of a transition stays exact where the gradient is cut off.
        """
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            point = self.at(u)
            (gradient,) = torch.autograd.grad(point.tempered(beta).sum(), u)
        point = States(u.detach(), point.base.detach(), point.joint.detach())
        return point, gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    # -- states

    def draw(self, count: int) -> States:
        """Sample from p0 exactly, `count` chains of every datum."""
        sites = samples(self._run(self.pair.guide if self.start == "guide" else self.pair.model, {}, count))
        return self.at(torch.cat([self._free(c, sites[c.name]["value"], count) for c in self.coordinates], -1))

    def given(self, values: dict[str, Tensor], count: int) -> States:
        """Return the states of `count` chains that all start at the same latents, given in the shape of their sites."""
        free = [self._free(c, values[c.name], 1) for c in self.coordinates]
        return self.at(torch.cat(free, -1).expand(count, -1, -1).contiguous())

    def _free(self, c: Coordinate, value: Tensor, count: int) -> Tensor:
        """Map a value with its chains, stacked or side by side, to unconstrained space, `(count, n, numel)`."""
        rows = len(self.x) if self.stacked else count * len(self.x)
        lead = count if self.stacked else 1
        stacked = value.reshape(lead, *c.value.left, rows, *c.value.right).movedim(1 + len(c.value.left), 1)
        flat = stacked.reshape(count, len(self.x), -1)
        return _gather(c.transform.inv(c.value.spread(flat, self.layout.nesting)), c.free)


def _gather(value: Tensor, shape: SiteShape) -> Tensor:
    """Invert `SiteShape.spread`: reshape `(chains, ..., n, ...)` to `(chains, n, numel)`."""
    lead, axis = len(value), value.dim() - len(shape.right) - 1
    return value.movedim(axis, 1).reshape(lead, value.shape[axis], -1)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def _unseen(trace: pyro.poutine.Trace) -> dict[str, Any]:
    return {name: node for name, node in samples(trace).items() if not node["is_observed"]}


def _coordinate(plan: AnnealingPlan, name: str, node: Any, again: Any, layout: Layout) -> Coordinate:
    """Return one latent of the model with the map from unconstrained space to its support."""
    refuse(not layout.holds(node), f"{plan.caller}: expected latents of single data only; got global {name}.")
    transform = _to_support(plan, name, node)
    other = _to_support(plan, name, again)(transform.inv(node["value"]))
    if other.shape != node["value"].shape or not _close(other, node["value"]):
        raise DataError(text("refused.moving_support", caller=plan.caller, name=name))
    value = site_shape(node, layout)
    free = tuple(transform.inv(node["value"]).shape)
    axis = len(value.left)
    return Coordinate(name, transform, value, SiteShape(free[:axis], free[axis + 1 :], value.batch))


def _to_support(plan: AnnealingPlan, name: str, node: Any) -> distributions.Transform:
    with suppress(NotImplementedError):
        if not node["fn"].support.is_discrete:
            return distributions.biject_to(node["fn"].support)
    raise DataError(text("refused.no_reals", caller=plan.caller, name=name, kind=type(unwrapped(node["fn"])).__name__))


def _check_guide(plan: AnnealingPlan, model: dict[str, Any], guide: dict[str, Any]) -> None:
    """Refuse a guide whose density is not over the latents and supports of the model."""
    refuse({*guide} != {*model}, "refused.other_latents", caller=plan.caller, model=sorted(model), guide=sorted(guide))
    for name, node in guide.items():
        pairs = (node["fn"], model[name]["value"]), (model[name]["fn"], node["value"])
        fits = all(bool(fn.support.check(value).all()) for fn, value in pairs)
        refuse(not fits, "refused.other_support", caller=plan.caller, name=name, model=model[name], guide=node)


# ---------------------------------------------------------------------- transitions along the temperatures


def schedule(temperatures: int) -> list[float]:
    """Return temperatures b_0 = 0, ..., b_T = 1, dense at both ends: a rescaled sigmoid."""
    s = torch.sigmoid(torch.linspace(-STEEPNESS, STEEPNESS, temperatures + 1, dtype=torch.float64))
    return [float(b) for b in (s - s[0]) / (s[-1] - s[0])]


def transition(target: Target, point: States, beta: float, step: Tensor, leapfrog: int) -> tuple[States, Tensor]:
    """Take one step of Hamiltonian Monte Carlo that leaves f_b invariant, independently for every chain and datum.

    Arguments:
        target: the densities.
        point: current states of the chains.
        beta: temperature b.
        step: step size of every datum, `(n,)`.
        leapfrog: number of leapfrog steps.

    Returns:
        The new states, and the acceptance probabilities, `(chains, n)`.
    """
    spread = 1 + STEP_JITTER * (2 * torch.rand(point.base.shape, dtype=point.u.dtype, device=point.u.device) - 1)
    epsilon = (step.to(point.u) * spread)[..., None]
    momentum = torch.randn_like(point.u)
    before = point.tempered(beta) - _kinetic(momentum)
    new, gradient = target.slope(point.u, beta)
    for _ in range(leapfrog):
        momentum = momentum + epsilon / 2 * gradient
        new, gradient = target.slope(new.u + epsilon * momentum, beta)
        momentum = momentum + epsilon / 2 * gradient
    probability = (new.tempered(beta) - _kinetic(momentum) - before).clamp(max=0).exp().nan_to_num(nan=0.0)
    take = torch.rand_like(probability) < probability
    u = torch.where(take[..., None], new.u, point.u)
    base, joint = torch.where(take, new.base, point.base), torch.where(take, new.joint, point.joint)
    return States(u, base, joint), probability


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(-1) / 2


def pilot(target: Target, plan: AnnealingPlan, tick: Callable[[], None]) -> list[Tensor]:
    """Return step sizes `(n,)` for b_1, ..., b_{T-1}, tuned to the target acceptance on separate chains."""
    log_step = torch.full((len(target.x),), math.log(FIRST_STEP), dtype=torch.float64, device=target.x.device)
    point, steps = target.draw(PILOT_CHAINS), []
    rounds = math.ceil(PILOT_ALL / plan.temperatures)
    for t, beta in enumerate(schedule(plan.temperatures)[1:-1]):
        for _ in range(rounds if t else max(rounds, PILOT_FIRST)):
            point, accepted = transition(target, point, beta, log_step.exp(), plan.leapfrog)
            log_step = log_step + ADAPTATION_RATE * (accepted.mean(0) - TARGET_ACCEPTANCE)
        steps.append(log_step.exp())
        tick()
    tick()
    return steps


def anneal(
    target: Target, point: States, widths: Sequence[float], kernels: Sequence[tuple[float, Tensor]],
    leapfrog: int, tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Anneal along a sequence of temperatures, forward or in reverse.

    Arguments:
        target: the densities.
        point: first states of the chains.
        widths: difference b_t - b_{t-1} of the temperatures of every factor.
        kernels: temperature and step sizes of the transitions between the factors, one fewer than factors.
        leapfrog: leapfrog steps per transition.
        tick: called after every factor.

    Returns:
        Log weights `(chains, n)`, and the mean acceptance `(n,)`, NaN without transitions.
    """
    log_weights = torch.zeros_like(point.base)
    accepted = torch.zeros_like(point.base[0])
    for t, width in enumerate(widths):
        log_weights = log_weights + width * (point.joint - point.base)
        if t < len(kernels):
            point, probability = transition(target, point, *kernels[t], leapfrog)
            accepted = accepted + probability.mean(0)
        tick()
    return log_weights, accepted / len(kernels) if kernels else torch.full_like(accepted, math.nan)
