"""Hamiltonian Monte Carlo transitions along a sequence of temperatures."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pvae.analysis.bounds.targets import AnnealingPlan, States, Target

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
    change = new.tempered(beta) - _kinetic(momentum) - before
    probability = change.clamp(max=0).exp().nan_to_num(nan=0.0)
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
    target: Target,
    point: States,
    widths: Sequence[float],
    kernels: Sequence[tuple[float, Tensor]],
    leapfrog: int,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
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
