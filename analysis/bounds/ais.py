"""Annealed importance sampling: lower bounds on log p(x) of any data, lower and upper bounds on simulated data."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet, require_likelihood, simulated
from pvae.analysis.bounds.targets import AnnealingPlan, Start, Target, anneal, pilot, schedule
from pvae.analysis.bounds.weights import inverse_ess, log_mean, squared_error
from pvae.analysis.figures.estimate import Estimate, Figures, Row, over_noisy_rows, over_rows, refuse
from pvae.pair import Pair, PairData
from pvae.util import Progress, silent

SETTINGS = "{0.chains} chains, {0.temperatures} temperatures"
STATES_PER_CHUNK = 4000
"""Largest number of chains times rows annealed at once: each keeps the autograd graph of one log density."""


class _Annealing(Figures):
    """Base class of results of annealing: settings, lower bound on log p(x), and acceptance of the transitions."""

    n: int
    """Number of data."""
    temperatures: int
    """Number of temperatures T."""
    chains: int
    """Number of chains per datum."""
    leapfrog: int
    """Number of leapfrog steps per Hamiltonian Monte Carlo transition."""
    start: Start
    """Distribution the chains start from: "guide" or "prior"."""
    lower: Estimate
    """Lower bound, in expectation, of the mean log p(x), nats per datum."""
    acceptance: Tensor
    """Mean acceptance of the (forward) transitions of every datum, `(n,)`; NaN with one temperature."""

    def to_dict(self) -> dict[str, Any]:
        return self.nested(acceptance=self.acceptance.mean())


class Annealed(_Annealing):
    """Lower bound on the mean log p(x) by annealed importance sampling, nats per datum; the result of `ais`."""

    log_p: Tensor
    """Log of the mean weight of every datum, nats, `(n,)`, float64 on the CPU."""
    log_weights: Tensor
    """Log importance weight of every chain and datum, `(chains, n)`."""
    ess: Tensor
    """Effective sample size of the chains' weights of every datum, `(n,)`, at most `chains`."""

    def rows(self) -> Iterator[Row]:
        how = f"{self.chains} chains from the {self.start}, {self.temperatures} temperatures"
        yield f"ais_{self.temperatures}", self.lower, f"lower bound on log p(x), {how}"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "ess_median": float(self.ess.median()), "ess_min": float(self.ess.min())}


class Bracket(_Annealing):
    """Lower and upper bound on the mean log p(x) of simulated data, nats per datum; the result of `bracket`."""

    lower: Annotated[Estimate, f"lower bound on log p(x): annealed from the {{0.start}}, {SETTINGS}"]
    upper: Annotated[Estimate, f"upper bound on log p(x): annealed back from exact posterior samples, {SETTINGS}"]
    """Upper bound in expectation, from annealing back from exact posterior samples."""
    width: Annotated[Estimate, "upper - lower: on average at least the bias of the lower bound"]
    """Width of the bracket, upper - lower: in expectation at least the bias of the lower bound."""
    x: Tensor
    """Simulated data, `(n, *event)`."""
    lower_per_datum: Tensor
    """Lower bound of every datum, nats, `(n,)`, float64 on the CPU."""
    upper_per_datum: Tensor
    """Upper bound of every datum, nats, `(n,)`."""


def ais(
    pair: Pair, x: PairData, *, temperatures: int = 200, chains: int = 16, leapfrog: int = 10, start: Start = "guide",
    seed: int = 0, on_progress: Progress = silent,
) -> Annealed:  # fmt: skip
    r"""Bound the mean log p(x) from below by annealed importance sampling with Hamiltonian Monte Carlo transitions.

    With log f_b(z) = (1 - b) log p0(z) + b log p(x, z), temperatures 0 = b_0 < ... < b_T = 1, z_0 ~ p0, and z_t
    from a transition that leaves f_{b_t} invariant, the weight of a chain is

        w = prod_t f_{b_t}(z_{t-1}) / f_{b_{t-1}}(z_{t-1}),   E[w] = p(x),   E[log 1/C sum_c w_c] <= log p(x).

    p0 is the guide q(z | x) or the prior p(z). Latents with constrained support are moved in unconstrained space, with
    the log Jacobian of torch's `biject_to`. Step sizes, one for every datum and temperature, are tuned to an acceptance
    of 0.65 on separate chains and then fixed, so the weights stay unbiased.

    The standard error is the jackknife's over the chains of each datum (`weights.squared_error`). Where one chain has
    most of the weight (`ess` near one) the bound is loose.

    References:
        Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair with continuous latents of single data.
        x: data `(n, *event)`.
        temperatures: number T of factors of a weight; 1 is plain importance sampling.
        chains: number C of chains per datum.
        leapfrog: leapfrog steps per transition.
        start: p0, "guide" or "prior".
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (temperatures done, temperatures in all), those of the pilot chains included.

    Returns:
        Annealed, nats per datum; `lower` is a lower bound in expectation.

    Raises:
        DataError: there are no rows, a count is below one, latents are global or discrete, or the guide has other
            latents or supports than the model.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> ais(pair, x[:4], temperatures=3, chains=2, leapfrog=2).lower.kind
        'lower_bound'
    """
    x = accept(pair, x, guide=False)
    plan = AnnealingPlan("ais", temperatures, chains, leapfrog, start)
    plan.check(pair, len(x))
    chunks = x.split(pair.structure.rows or max(1, STATES_PER_CHUNK // chains))
    tick = counter(2 * temperatures * len(chunks), on_progress)
    with quiet(pair, x, seed):
        require_likelihood(pair, "ais")
        parts = [_lower(Target(pair, rows, plan), plan, tick)[:2] for rows in chunks]
    log_weights, acceptance = (torch.cat(column, -1).cpu() for column in zip(*parts, strict=True))
    log_p = log_mean(log_weights)
    return Annealed(
        n=len(x), **plan.settings, lower=over_noisy_rows(log_p, _error(log_weights), "lower_bound"), log_p=log_p,
        log_weights=log_weights, ess=1 / inverse_ess(log_weights), acceptance=acceptance,
    )  # fmt: skip


def bracket(
    pair: Pair, x_like: PairData, *, rows: int = 100, temperatures: int = 200, chains: int = 16, leapfrog: int = 10,
    start: Start = "guide", seed: int = 0, on_progress: Progress = silent,
) -> Bracket:  # fmt: skip
    r"""Bound log p(x) from below and above on data simulated from the model (bidirectional Monte Carlo).

    For x*, z* ~ p(x, z) the latent z* is an exact sample of the posterior of x*. Annealing back from it, with the
    transitions of `ais` in reverse order, gives weights with E[1 / w] = 1 / p(x*), so that

        E[-log 1/C sum_c 1 / w_c] >= log p(x*).

    Together with the forward weights this brackets log p(x*), and its width bounds the bias of `ais`.

    Warning: the width on simulated data carries over to real data only if both are equally difficult for the sampler.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani, Adams, 2015),
        https://arxiv.org/abs/1511.02543
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair with continuous latents of single data and one observed site, x itself.
        x_like: data `(m, *event)` of the shape to simulate; their values matter only where the model reads them.
        rows: number n of data to simulate.
        temperatures: number T of temperatures; see `ais`.
        chains: number C of chains per datum and direction.
        leapfrog: leapfrog steps per transition.
        start: p0, "guide" or "prior".
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (temperatures done, temperatures in all).

    Returns:
        Bracket, nats per datum: a lower and an upper bound, both in expectation, and their difference, an estimate. The
        standard error of `upper` is that of `width` over the data, as all chains of a datum start at the same z*; it is
        about 1.3 times the spread over seeds.

    Raises:
        DataError: as in `ais`; or the model observes several sites, or a site that is not x itself.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> found = bracket(pair, x, rows=4, temperatures=3, chains=2, leapfrog=2)
        >>> found.lower.kind, found.upper.kind
        ('lower_bound', 'upper_bound')
    """
    x_like = accept(pair, x_like, guide=False)
    plan = AnnealingPlan("bracket", temperatures, chains, leapfrog, start)
    plan.check(pair, rows)
    refuse(rows < 1, f"bracket: expected at least one row to simulate; got rows={rows}. Pass rows=100, say.")
    refuse(len(pair.layout.observed) != 1, "refused.several_observed", names=pair.layout.observed)
    chunks = x_like[torch.arange(rows, device=x_like.device) % len(x_like)].split(max(1, STATES_PER_CHUNK // chains))
    tick = counter(3 * temperatures * len(chunks), on_progress)
    with quiet(pair, x_like, seed):
        require_likelihood(pair, "bracket")
        parts = [_both(pair, like, plan, tick) for like in chunks]
    x, forward, backward, acceptance = (torch.cat(c, -1 if i else 0) for i, c in enumerate(zip(*parts, strict=True)))
    lower, upper = log_mean(forward.cpu()), -log_mean(-backward.cpu())
    width = over_noisy_rows(upper - lower, over_rows(upper - lower).standard_error, "estimate")
    return Bracket(
        n=rows, **plan.settings, lower=over_noisy_rows(lower, _error(forward.cpu()), "lower_bound"),
        upper=over_noisy_rows(upper, width.standard_error, "upper_bound"), width=width, x=x, lower_per_datum=lower,
        upper_per_datum=upper, acceptance=acceptance.cpu(),
    )  # fmt: skip


def counter(total: int, on_progress: Progress) -> Callable[[], None]:
    """Return a function that reports the number of its calls so far, and `total`, to `on_progress`."""
    count = iter(range(1, total + 1))
    return lambda: on_progress(next(count), total)


def _error(log_weights: Tensor) -> float:
    """Return the standard error of the mean over data of log mean weights `(chains, n)`; NaN with one chain."""
    chains, n = log_weights.shape
    found = squared_error(log_weights.sort(0, True).values, log_mean(log_weights), inverse_ess(log_weights), chains)
    return float(found.sum().sqrt() / n) if chains > 1 else math.nan


def _lower(
    target: Target, plan: AnnealingPlan, tick: Callable[[], None]
) -> tuple[Tensor, Tensor, list[float], list[tuple[float, Tensor]]]:
    """Return forward log weights and acceptance, and temperature steps and transitions for the reverse direction."""
    betas = schedule(plan.temperatures)
    widths = [high - low for low, high in zip(betas[:-1], betas[1:], strict=True)]
    kernels = list(zip(betas[1:-1], pilot(target, plan, tick), strict=True))
    log_weights, acceptance = anneal(target, target.draw(plan.chains), widths, kernels, plan.leapfrog, tick)
    # A chain whose density overflows gets weight zero, which only lowers a lower bound.
    return log_weights.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), acceptance, widths, kernels


def _both(pair: Pair, like: Tensor, plan: AnnealingPlan, tick: Callable[[], None]) -> tuple[Tensor, ...]:
    """Return simulated data, forward and reverse log weights, `(chains, n)` each, and mean acceptance, `(n,)`."""
    x, values = simulated(pair, like, "bracket")
    target = Target(pair, x, plan)
    forward, acceptance, widths, kernels = _lower(target, plan, tick)
    backward, _ = anneal(target, target.given(values, plan.chains), widths[::-1], kernels[::-1], plan.leapfrog, tick)
    return x, forward, backward, acceptance
