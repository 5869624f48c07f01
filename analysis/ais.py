"""Annealed importance sampling: log p(x) from below on any data, and between two bounds on data of the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pvae.analysis.draws import accept, quiet
from pvae.analysis.estimate import CONSERVATIVE, Estimate, Kind
from pvae.analysis.table import Figures, Row
from pvae.errors import DataError
from pvae.pair import PARTICLES, Pair
from pvae.traces import Layout, SiteShape, log_prob, samples, site_shape, sum_over

Start = Literal["guide", "prior"]
Progress = Callable[[int, int], None]
Runner = Callable[[Callable[..., Any], "dict[str, Tensor]", int], Trace]

STATES = 4000
"""Most states (chains times rows) of a chunk: each keeps the graph of one density."""
PILOT_CHAINS = 8
PILOT_FIRST, PILOT_ALL = 30, 60
"""Least transitions of the pilot at the first temperature, and at all of them together."""
TARGET_ACCEPTANCE = 0.65
RATE = 0.5
"""Of the adaptation of log step sizes to the acceptance."""
FIRST_STEP = 0.2
JITTER = 0.2
"""Half the spread of a transition's step size around the frozen one: no trajectory closes on itself every time."""
STEEPNESS = 4.0
"""Of the sigmoid schedule."""


# ---------------------------------------------------------------------- results


@final
@dataclass(frozen=True, repr=False)
class Annealed(Figures):
    """What annealed importance sampling says of log p(x), nats per datum."""

    n: int
    temperatures: int
    chains: int
    leapfrog: int
    start: Start
    lower: Estimate
    """Mean of `log_p`, a lower bound of the mean log p(x) in expectation."""
    log_p: Tensor
    """log of the mean weight of every datum, `(n,)`, float64 on the CPU."""
    log_weights: Tensor
    """log of every chain's weight, `(chains, n)`."""
    ess: Tensor
    """Effective sample size of the chains' weights of every datum, `(n,)`, at most `chains`."""
    acceptance: Tensor
    """Mean acceptance of the transitions of every datum, `(n,)`; NaN with one temperature, which has none."""

    @property
    def title(self) -> str:
        """What the figures are of."""
        return f"annealed importance sampling, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        """(term, figure, what it means)."""
        what = f"log p(x) from below, {self.chains} chains from the {self.start}, {self.temperatures} temperatures"
        yield f"ais_{self.temperatures}", self.lower, what

    @property
    def remarks(self) -> tuple[str, ...]:
        """Acceptance and effective chains."""
        return (f"{_accepted(self.acceptance)}; effective chains {self.ess.median():.1f} of {self.chains} (median)",)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "n": self.n,
            "temperatures": self.temperatures,
            "chains": self.chains,
            "leapfrog": self.leapfrog,
            "start": self.start,
            "figures": self.figures(),
            "ess_median": float(self.ess.median()),
            "ess_min": float(self.ess.min()),
            "acceptance": _plain(float(self.acceptance.mean())),
        }


@final
@dataclass(frozen=True, repr=False)
class Bracket(Figures):
    """The mean log p(x) of data simulated from the model between two bounds, nats per datum."""

    n: int
    temperatures: int
    chains: int
    leapfrog: int
    start: Start
    lower: Estimate
    """Forward annealing: a lower bound in expectation."""
    upper: Estimate
    """Annealing back from exact posterior draws: an upper bound in expectation."""
    width: Estimate
    """upper - lower: in expectation at least what the lower bound lacks."""
    x: Tensor
    """The simulated data, `(n, *event)`."""
    lower_per_datum: Tensor
    """`(n,)`, float64 on the CPU."""
    upper_per_datum: Tensor
    """`(n,)`."""
    acceptance: Tensor
    """Mean acceptance of the forward transitions of every datum, `(n,)`; NaN with one temperature."""

    @property
    def title(self) -> str:
        """What the figures are of."""
        return f"bidirectional Monte Carlo on simulated data, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        """(term, figure, what it means)."""
        how = f"{self.chains} chains, {self.temperatures} temperatures"
        yield "lower", self.lower, f"log p(x) from below: annealed from the {self.start}, {how}"
        yield "upper", self.upper, f"log p(x) from above: annealed back from exact posterior draws, {how}"
        yield "width", self.width, "upper - lower: no less, on average, than what the lower bound lacks"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Acceptance."""
        return (_accepted(self.acceptance),)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "n": self.n,
            "temperatures": self.temperatures,
            "chains": self.chains,
            "leapfrog": self.leapfrog,
            "start": self.start,
            "figures": self.figures(),
            "acceptance": _plain(float(self.acceptance.mean())),
        }


def _plain(value: float) -> float | None:
    """A number that JSON knows."""
    return value if math.isfinite(value) else None


def _accepted(acceptance: Tensor) -> str:
    mean = float(acceptance.mean())
    return "no transitions" if math.isnan(mean) else f"mean acceptance {mean:.2f}"


# ---------------------------------------------------------------------- entry points


def ais(
    pair: Pair,
    x: Tensor,
    *,
    temperatures: int = 200,
    chains: int = 16,
    leapfrog: int = 10,
    start: Start = "guide",
    seed: int = 0,
    on_progress: Progress = lambda _done, _total: None,
) -> Annealed:
    r"""Anneal from p0(z) to p(x, z) by Hamiltonian Monte Carlo; the mean weight is unbiased for p(x).

    With log f_b(z) = (1 - b) log p0(z) + b log p(x, z), 0 = b_0 < ... < b_T = 1, z_0 ~ p0 and z_t from a
    transition that leaves f_{b_t} invariant,

    w = prod_t f_{b_t}(z_{t-1}) / f_{b_{t-1}}(z_{t-1}),   E[w] = p(x),   E[log 1/C sum_c w_c] <= log p(x).

    p0 is the guide q(z | x) or the prior p(z). Latents with constrained support move in the reals, with the log
    Jacobian of torch's `biject_to`. Step sizes, one for every datum and temperature, are tuned to an acceptance of
    0.65 by chains of their own and then frozen, so the weights stay unbiased.

    Warning: the error of one datum is the delta method's over its chains; where one chain holds all the weight
    (`ess` near one) it is too small.

    References:
        Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008

        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair with continuous latents of single data.
        x: data `(n, *event)`.
        temperatures: T, factors of a weight; 1 is plain importance sampling.
        chains: C, per datum.
        leapfrog: steps of a transition.
        start: p0.
        seed: of the draws; the same seed, the same numbers.
        on_progress: called with (temperatures done, temperatures in all), those of the pilots included.

    Returns:
        Annealed; `lower` is a lower bound in nats per datum.

    Raises:
        DataError: no rows, a count below one, global or discrete latents, a guide that does not start on the
            model's latents.
    """
    x = accept(pair, x)
    plan = Plan("ais", temperatures, chains, leapfrog, start)
    plan.check(pair)
    tick = _counter(2 * temperatures * _chunks(len(x), chains), on_progress)
    with quiet(pair, x, seed):
        parts = [_lower(Target(pair, rows, plan), plan, tick)[:2] for rows in x.split(_rows(chains))]
    log_weights, acceptance = (torch.cat(column, -1).cpu() for column in zip(*parts, strict=True))
    log_p, inverse_ess = _log_mean(log_weights), _inverse_ess(log_weights)
    return Annealed(
        n=len(x),
        temperatures=temperatures,
        chains=chains,
        leapfrog=leapfrog,
        start=start,
        lower=_bound(log_p, _delta_error(inverse_ess, chains), "lower_bound"),
        log_p=log_p,
        log_weights=log_weights,
        ess=1 / inverse_ess,
        acceptance=acceptance,
    )


def bracket(
    pair: Pair,
    x_like: Tensor,
    *,
    rows: int = 100,
    temperatures: int = 200,
    chains: int = 16,
    leapfrog: int = 10,
    start: Start = "guide",
    seed: int = 0,
    on_progress: Progress = lambda _done, _total: None,
) -> Bracket:
    r"""Bound log p(x) from both sides on data simulated from the model: how far annealing can be trusted.

    For x*, z* ~ p(x, z) the latent z* is an exact draw from the posterior of x*. Annealing back from it, with the
    transitions of `ais` in reverse order, gives weights with E[1 / w] = 1 / p(x*), so that
    E[-log 1/C sum_c 1 / w_c] >= log p(x*): forward and reverse weights hold log p(x*) between them.

    Warning: what holds for simulated data holds for real data only where these look alike to the sampler.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani, Adams, 2015),
        https://arxiv.org/abs/1511.02543

        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair with continuous latents of single data and one observed site, x itself.
        x_like: data `(m, *event)` of the shape to simulate; their values matter only where the model reads them.
        rows: n, data to simulate.
        temperatures: T; see `ais`.
        chains: C, per datum and direction.
        leapfrog: steps of a transition.
        start: p0.
        seed: of the draws; the same seed, the same numbers.
        on_progress: called with (temperatures done, temperatures in all).

    Returns:
        Bracket; a lower and an upper bound in nats per datum, both in expectation, and their distance. The error of
        `upper` is the spread of the distance over the data, as chains of one datum start at the same z*.

    Raises:
        DataError: as `ais`; several observed sites; an observed site that is not x itself.
    """
    x_like = accept(pair, x_like)
    plan = Plan("bracket", temperatures, chains, leapfrog, start)
    plan.check(pair)
    if rows < 1:
        raise DataError(f"bracket: expected at least one row to simulate; got rows={rows}. Pass rows=100, say.")
    if len(pair.layout.observed) != 1:
        names = ", ".join(pair.layout.observed)
        raise DataError(f"bracket: expected one observed site to simulate; got {names}. Use ais on data.")
    tick = _counter(3 * temperatures * _chunks(rows, chains), on_progress)
    template = x_like[torch.arange(rows, device=x_like.device) % len(x_like)]
    with quiet(pair, x_like, seed):
        parts = [_both(pair, like, plan, tick) for like in template.split(_rows(chains))]
    x, forward, backward, acceptance = (
        torch.cat(column, -1 if i else 0) for i, column in enumerate(zip(*parts, strict=True))
    )
    lower, upper = _log_mean(forward.cpu()), -_log_mean(-backward.cpu())
    width = _bound(upper - lower, _spread(upper - lower), "estimate")
    return Bracket(
        n=rows,
        temperatures=temperatures,
        chains=chains,
        leapfrog=leapfrog,
        start=start,
        lower=_bound(lower, _delta_error(_inverse_ess(forward.cpu()), chains), "lower_bound"),
        upper=_bound(upper, width.standard_error, "upper_bound"),
        width=width,
        x=x,
        lower_per_datum=lower,
        upper_per_datum=upper,
        acceptance=acceptance.cpu(),
    )


@final
@dataclass(frozen=True)
class Plan:
    """How to anneal, and who asks."""

    caller: str
    temperatures: int
    chains: int
    leapfrog: int
    start: Start

    def check(self, pair: Pair) -> None:
        """Refuse counts below one, an unknown start and what cannot be annealed."""
        for name in ("temperatures", "chains", "leapfrog"):
            if getattr(self, name) < 1:
                raise DataError(f"{self.caller}: expected {name} of at least 1; got {getattr(self, name)}.")
        if self.start not in ("guide", "prior"):
            raise DataError(f"{self.caller}: expected start 'guide' or 'prior'; got {self.start!r}.")
        if pair.layout.shared:
            names = ", ".join(pair.layout.shared)
            raise DataError(f"{self.caller}: expected latents of single data only; got global {names}.")
        if pair.layout.enumerated:
            names = ", ".join(pair.layout.enumerated)
            raise DataError(
                f"{self.caller}: expected continuous latents; got {names}, which the model sums out. Use evidence."
            )


def _rows(chains: int) -> int:
    return max(1, STATES // chains)


def _chunks(n: int, chains: int) -> int:
    return math.ceil(n / _rows(chains))


def _counter(total: int, on_progress: Progress) -> Callable[[], None]:
    """A function that counts its calls for `on_progress`."""
    count = iter(range(1, total + 1))
    return lambda: on_progress(next(count), total)


# ---------------------------------------------------------------------- weights to figures


def _log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean weight over chains, `(n,)`."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _inverse_ess(log_weights: Tensor) -> Tensor:
    """sum w^2 / (sum w)^2 over chains, `(n,)`; 1 where all weights are zero."""
    return ((2 * log_weights).logsumexp(0) - 2 * log_weights.logsumexp(0)).exp().nan_to_num(nan=1.0)


def _delta_error(inverse_ess: Tensor, chains: int) -> float:
    """Standard error of a mean of log means, `(n,)` data; NaN with one chain, which shows no spread."""
    if chains == 1:
        return math.nan
    return float((inverse_ess - 1 / chains).clamp(min=0).sum().sqrt() / len(inverse_ess))


def _spread(values: Tensor) -> float:
    """Standard error of the mean of values `(n,)` over the data."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _bound(values: Tensor, error: float, kind: Kind) -> Estimate:
    data_error = _spread(values) if len(values) > 1 else None
    if math.isnan(error):
        return Estimate(float(values.mean()), _spread(values), kind, data_error, CONSERVATIVE)
    return Estimate(float(values.mean()), error, kind, data_error)


# ---------------------------------------------------------------------- the annealed densities


@final
@dataclass(frozen=True)
class Point:
    """States of all chains and their densities."""

    u: Tensor
    """Latents of every chain and datum in the reals, `(chains, n, D)`."""
    base: Tensor
    """log p0 with the Jacobian, `(chains, n)`, float64."""
    joint: Tensor
    """log p(x, z) with the Jacobian, `(chains, n)`, float64."""

    def tempered(self, beta: float) -> Tensor:
        """log f_b, `(chains, n)`."""
        return (1 - beta) * self.base + beta * self.joint


@final
@dataclass(frozen=True)
class Coordinate:
    """One latent and its map from the reals."""

    name: str
    transform: Transform
    value: SiteShape
    free: SiteShape
    """The shape of the value before the map (a simplex has one number less)."""

    @property
    def event_dim(self) -> int:
        """Event dimensions of the value, summed over by the Jacobian."""
        return int(self.transform.codomain.event_dim)


@final
class Target:
    """log p0 and log p(x, z) of a chunk of rows as functions of unconstrained states.

    Arguments:
        pair: a pair that `Plan.check` has let pass.
        x: data `(n, *event)`.
        plan: whose start is p0.

    Raises:
        DataError: a latent is discrete, global, or has a support that reads other latents; start "guide" and a guide
            of other latents or supports than the model's.
    """

    def __init__(self, pair: Pair, x: Tensor, plan: Plan) -> None:
        self.pair, self.x, self.layout = pair, x, pair.layout
        self.start: Start = plan.start
        model, again = (_unseen(pair.model_trace(x)) for _ in range(2))
        self.coordinates = [_coordinate(plan, name, node, again[name], self.layout) for name, node in model.items()]
        if not self.coordinates:
            raise DataError(f"{plan.caller}: expected latents in the model; got none. Its density is exact as it is.")
        if plan.start == "guide":
            _check_guide(plan, model, _unseen(pair.guide_trace(x)))
        self.sizes = [coordinate.free.numel for coordinate in self.coordinates]
        self.runner: Runner = self._side_by_side
        self.runner = self._choose_runner()

    # -- running the programs for (chains, n) states

    def _stacked(self, program: Callable[..., Any], flat: dict[str, Tensor], count: int) -> Trace:
        """Chains along a plate of their own, left of all others."""
        nesting = self.layout.nesting
        data = {c.name: c.value.spread(flat[c.name], nesting) for c in self.coordinates if c.name in flat}
        with self.pair._own_store(), pyro.plate(PARTICLES, count, dim=-1 - nesting):
            return poutine.trace(poutine.condition(program, data=data)).get_trace(self.x)

    def _side_by_side(self, program: Callable[..., Any], flat: dict[str, Tensor], count: int) -> Trace:
        """Chains as more rows of the batch, for programs that take no further plate."""
        data = {c.name: c.value.spread(flat[c.name].flatten(0, 1)) for c in self.coordinates if c.name in flat}
        x = self.x.repeat(count, *(1,) * (self.x.dim() - 1))
        with self.pair._own_store():
            return poutine.trace(poutine.condition(program, data=data)).get_trace(x)

    def _choose_runner(self) -> Runner:
        """`_stacked` where it says the same as chains one by one: a program that reshapes may fail, or sum wrongly."""
        single = [self.draw(1) for _ in range(3)]
        base, joint = torch.cat([p.base for p in single]), torch.cat([p.joint for p in single])
        self.runner = self._stacked
        try:
            stacked = self.at(torch.cat([p.u for p in single]))
        except (ValueError, RuntimeError, IndexError):
            return self._side_by_side
        same = stacked.joint.shape == joint.shape and _close(stacked.joint, joint) and _close(stacked.base, base)
        return self._stacked if same else self._side_by_side

    def _score(self, trace: Trace, names: Sequence[str], count: int) -> Tensor:
        """log density of some sites, `(count, n)`, float64."""
        if self.runner == self._stacked:
            return sum_over([log_prob(trace.nodes[name], self.layout, count).double() for name in names])
        parts = [log_prob(trace.nodes[name], self.layout, 0).double() for name in names]
        return sum_over(parts).reshape(count, len(self.x))

    # -- densities

    def _constrained(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values `(chains, n, numel)` of every latent, and the log Jacobian `(chains, n)`."""
        values, jacobian = {}, torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for c, flat in zip(self.coordinates, u.split(self.sizes, -1), strict=True):
            free = c.free.spread(flat, self.layout.nesting)
            value = c.transform(free)
            values[c.name] = _gather(value, c.value)
            part = c.transform.log_abs_det_jacobian(free, value).double()
            jacobian = jacobian + _rows_last(part, c, len(self.x))
        return values, jacobian

    def at(self, u: Tensor) -> Point:
        """States `(chains, n, D)` with their densities; differentiable."""
        values, jacobian = self._constrained(u)
        count, names = len(u), [c.name for c in self.coordinates]
        model = self.runner(self.pair.model, values, count)
        prior = self._score(model, names, count)
        joint = prior + self._score(model, self.layout.observed, count)
        base = prior
        if self.start == "guide":
            base = self._score(self.runner(self.pair.guide, values, count), names, count)
        return Point(u, base + jacobian, joint + jacobian)

    def slope(self, u: Tensor, beta: float) -> tuple[Point, Tensor]:
        """States with their densities, and the gradient of log f_b, `(chains, n, D)`; zero where it is not finite.

        Any field that is a function of the state keeps leapfrog reversible and its volume, so the acceptance of a
        transition stays exact where the gradient is cut off.
        """
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            point = self.at(u)
            (gradient,) = torch.autograd.grad(point.tempered(beta).sum(), u)
        point = Point(u.detach(), point.base.detach(), point.joint.detach())
        return point, gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    # -- states

    def draw(self, count: int) -> Point:
        """Exact draws from p0, `count` of every datum."""
        program = self.pair.guide if self.start == "guide" else self.pair.model
        sites = samples(self.runner(program, {}, count))
        return self.at(torch.cat([self._free(c, sites[c.name]["value"], count) for c in self.coordinates], -1))

    def given(self, values: dict[str, Tensor], count: int) -> Point:
        """`count` chains that all stand at the same values, each of the shape of its site."""
        free = [self._free(c, values[c.name], 1) for c in self.coordinates]
        return self.at(torch.cat(free, -1).expand(count, -1, -1).contiguous())

    def _free(self, c: Coordinate, value: Tensor, count: int) -> Tensor:
        """A value with its chains, stacked or side by side, in the reals, `(count, n, numel)`."""
        rows = len(self.x) if self.runner == self._stacked else count * len(self.x)
        lead = count if self.runner == self._stacked else 1
        stacked = value.reshape(lead, *c.value.left, rows, *c.value.right).movedim(1 + len(c.value.left), 1)
        flat = stacked.reshape(count, len(self.x), -1)
        return _gather(c.transform.inv(c.value.spread(flat, self.layout.nesting)), c.free)


def _gather(value: Tensor, shape: SiteShape) -> Tensor:
    """The inverse of `SiteShape.spread`: `(chains, ..., n, ...)` as `(chains, n, numel)`."""
    lead, axis = len(value), value.dim() - len(shape.right) - 1
    return value.movedim(axis, 1).reshape(lead, value.shape[axis], -1)


def _rows_last(part: Tensor, c: Coordinate, n: int) -> Tensor:
    """A batch-shaped part of the Jacobian as `(chains, n)`."""
    axis = part.dim() - 1 - (len(c.value.right) - c.event_dim)
    return part.movedim(axis, 1).reshape(len(part), n, -1).sum(-1)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def _unseen(trace: Trace) -> dict[str, Any]:
    return {name: node for name, node in samples(trace).items() if not node["is_observed"]}


def _coordinate(plan: Plan, name: str, node: Any, again: Any, layout: Layout) -> Coordinate:
    """How a latent of the model maps to the reals."""
    if not layout.holds(node):
        raise DataError(f"{plan.caller}: expected latents of single data only; got global {name}.")
    transform = _to_support(plan, name, node)
    if _inner(transform) != _inner(_to_support(plan, name, again)):
        raise DataError(
            f"{plan.caller}: expected a support of {name} that reads no other latent; got one that moves with them. "
            f"Write it as a map of a latent of fixed support."
        )
    value = site_shape(node, layout)
    free = tuple(transform.inv(node["value"]).shape)
    axis = len(value.left)
    return Coordinate(name, transform, value, SiteShape(free[:axis], free[axis + 1 :], value.batch))


def _to_support(plan: Plan, name: str, node: Any) -> Transform:
    support = node["fn"].support
    try:
        if support.is_discrete:
            raise NotImplementedError
        return biject_to(support)
    except NotImplementedError:
        kind = type(_innermost(node["fn"])).__name__
        raise DataError(
            f"{plan.caller}: expected a continuous {name} whose support torch maps to the reals; got {kind}. "
            f"Use evidence."
        ) from None


def _innermost(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _inner(transform: Transform) -> Transform:
    """A map without its wrappings, which torch does not compare."""
    while isinstance(transform, torch.distributions.IndependentTransform):
        transform = transform.base_transform
    return transform


def _check_guide(plan: Plan, model: dict[str, Any], guide: dict[str, Any]) -> None:
    """Refuse a guide whose density is not one over the model's latents."""
    if set(guide) != set(model):
        raise DataError(
            f"{plan.caller}: expected a guide of the model's latents {', '.join(sorted(model))}; got "
            f"{', '.join(sorted(guide)) or 'none'}. Pass start='prior'."
        )
    for name, node in guide.items():
        if _bounds(node) != _bounds(model[name]):
            raise DataError(
                f"{plan.caller}: expected the guide's {name} on the model's support {model[name]['fn'].support}; got "
                f"{node['fn'].support}. Pass start='prior'."
            )


def _bounds(node: Any) -> Transform | None:
    """What tells supports apart."""
    support: constraints.Constraint = node["fn"].support
    return None if support.is_discrete else _inner(biject_to(support))


# ---------------------------------------------------------------------- annealing


def schedule(temperatures: int) -> list[float]:
    """b_0 = 0, ..., b_T = 1, dense at both ends: a sigmoid, rescaled."""
    s = torch.sigmoid(torch.linspace(-STEEPNESS, STEEPNESS, temperatures + 1, dtype=torch.float64))
    return [float(b) for b in (s - s[0]) / (s[-1] - s[0])]


def transition(target: Target, point: Point, beta: float, step: Tensor, leapfrog: int) -> tuple[Point, Tensor]:
    """One step of Hamiltonian Monte Carlo that leaves f_b invariant, for every chain and datum by itself.

    Arguments:
        target: the densities.
        point: where the chains are, `(chains, n, D)`.
        beta: b.
        step: step size of every datum, `(n,)`.
        leapfrog: number of steps.

    Returns:
        The chains' new states, and the probabilities with which they were accepted, `(chains, n)`.
    """
    spread = 1 + JITTER * (2 * torch.rand(point.base.shape, dtype=point.u.dtype, device=point.u.device) - 1)
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
    return Point(u, base, joint), probability


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(-1) / 2


def pilot(target: Target, plan: Plan, tick: Callable[[], None]) -> list[Tensor]:
    """Step sizes `(n,)` for b_1, ..., b_{T-1}, tuned to the target acceptance by chains of their own."""
    log_step = torch.full((len(target.x),), math.log(FIRST_STEP), dtype=torch.float64, device=target.x.device)
    point, steps = target.draw(PILOT_CHAINS), []
    rounds = math.ceil(PILOT_ALL / plan.temperatures)
    for t, beta in enumerate(schedule(plan.temperatures)[1:-1]):
        for _ in range(rounds if t else max(rounds, PILOT_FIRST)):
            point, accepted = transition(target, point, beta, log_step.exp(), plan.leapfrog)
            log_step = log_step + RATE * (accepted.mean(0) - TARGET_ACCEPTANCE)
        steps.append(log_step.exp())
        tick()
    tick()
    return steps


def _anneal(
    target: Target,
    point: Point,
    widths: Sequence[float],
    kernels: Sequence[tuple[float, Tensor]],
    leapfrog: int,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Log weights `(chains, n)` along a sequence of temperatures, forward or back, and the mean acceptance `(n,)`.

    Arguments:
        target: the densities.
        point: where the chains start.
        widths: b_t - b_{t-1} of every factor.
        kernels: temperature and step sizes of the transitions between the factors, one less.
        leapfrog: steps of a transition.
        tick: called after every factor.
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


def _lower(
    target: Target, plan: Plan, tick: Callable[[], None]
) -> tuple[Tensor, Tensor, list[float], list[tuple[float, Tensor]]]:
    """Forward log weights and acceptance; widths and transitions, for the way back."""
    betas = schedule(plan.temperatures)
    widths = [high - low for low, high in zip(betas[:-1], betas[1:], strict=True)]
    kernels = list(zip(betas[1:-1], pilot(target, plan, tick), strict=True))
    log_weights, acceptance = _anneal(target, target.draw(plan.chains), widths, kernels, plan.leapfrog, tick)
    # A chain that left what floating point can score has weight zero: that only lowers a lower bound.
    return log_weights.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), acceptance, widths, kernels


def _both(pair: Pair, like: Tensor, plan: Plan, tick: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Simulated data, forward and reverse log weights `(chains, n)`, acceptance `(n,)`."""
    x, values = _simulate(pair, like)
    target = Target(pair, x, plan)
    forward, acceptance, widths, kernels = _lower(target, plan, tick)
    back = target.given(values, plan.chains)
    backward, _ = _anneal(target, back, widths[::-1], kernels[::-1], plan.leapfrog, tick)
    return x, forward, backward, acceptance


def _simulate(pair: Pair, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Data and latents drawn from the model, the data in the form that the model takes."""
    trace = samples(pair.simulate(like))
    (site,) = pair.layout.observed
    value = trace[site]["value"]
    values = {name: node["value"] for name, node in trace.items() if name != site}
    if value.numel() == like.numel():
        x = value.to(like.dtype).reshape(like.shape)
        seen = samples(pair.model_trace(x, values))[site]["value"]
        if torch.equal(seen.to(like.dtype).reshape(like.shape), x):
            return x, values
    raise DataError(
        f"bracket: expected the model to observe x as it is at {site}; got a site that holds something else of shape "
        f"{list(value.shape)}. Use ais on data."
    )
