"""Annealed importance sampling: log p(x) from below on any data, and between two bounds on data of the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pvae.analysis.bounds.annealing import Plan, Start, Target, anneal, pilot, schedule
from pvae.analysis.decompose.draws import accept, quiet, require_likelihood
from pvae.analysis.figures.estimate import CONSERVATIVE, Estimate, Kind
from pvae.analysis.figures.table import Figures, Row
from pvae.errors import DataError
from pvae.pair.layout import samples
from pvae.pair.pair import Pair

Progress = Callable[[int, int], None]

STATES = 4000
"""Most states (chains times rows) of a chunk: each keeps the graph of one density."""


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
        require_likelihood(pair, "ais")
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
        require_likelihood(pair, "bracket")
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


def _lower(
    target: Target, plan: Plan, tick: Callable[[], None]
) -> tuple[Tensor, Tensor, list[float], list[tuple[float, Tensor]]]:
    """Forward log weights and acceptance; widths and transitions, for the way back."""
    betas = schedule(plan.temperatures)
    widths = [high - low for low, high in zip(betas[:-1], betas[1:], strict=True)]
    kernels = list(zip(betas[1:-1], pilot(target, plan, tick), strict=True))
    log_weights, acceptance = anneal(target, target.draw(plan.chains), widths, kernels, plan.leapfrog, tick)
    # A chain that left what floating point can score has weight zero: that only lowers a lower bound.
    return log_weights.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), acceptance, widths, kernels


def _both(pair: Pair, like: Tensor, plan: Plan, tick: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Simulated data, forward and reverse log weights `(chains, n)`, acceptance `(n,)`."""
    x, values = _simulate(pair, like)
    target = Target(pair, x, plan)
    forward, acceptance, widths, kernels = _lower(target, plan, tick)
    back = target.given(values, plan.chains)
    backward, _ = anneal(target, back, widths[::-1], kernels[::-1], plan.leapfrog, tick)
    return x, forward, backward, acceptance


def _simulate(pair: Pair, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Data and latents drawn from the model, the data in the form that the model takes."""
    trace = samples(pair.simulate(like))
    (site,) = pair.layout.observed
    value = trace[site]["value"]
    values = {name: node["value"] for name, node in trace.items() if name != site}
    if pair.frame.covariates:
        return pair.frame.join(value, like), values
    if value.numel() == like.numel():
        x = value.to(like.dtype).reshape(like.shape)
        seen = samples(pair.model_trace(x, values))[site]["value"]
        if torch.equal(seen.to(like.dtype).reshape(like.shape), x):
            return x, values
    raise DataError(
        f"bracket: expected the model to observe x as it is at {site}; got a site that holds something else of shape "
        f"{list(value.shape)}. Use ais on data."
    )
