"""log p(x) from below: the importance-weighted bound, per datum, with its errors."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.draws import accept, quiet
from pvae.analysis.estimate import CONSERVATIVE, Estimate
from pvae.errors import DataError
from pvae.pair import Pair, Terms

ROWS = 20_000


@dataclass(frozen=True, repr=False)
class Evidence:
    """Bounds on the mean log p(x), nats per datum."""

    n: int
    samples: int
    elbo: Estimate
    """The bound with one sample, averaged over the same draws."""
    iwae: Estimate
    """The bound with all samples; the tighter."""
    log_p: Tensor
    """IWAE of every datum, `(n,)`."""
    ess: Tensor
    """Effective sample size of the importance weights of every datum, `(n,)`, at most `samples`."""

    def rows(self) -> Iterator[tuple[str, Estimate, str]]:
        """(term, figure, what it means)."""
        yield f"iwae_{self.samples}", self.iwae, f"log p(x) from below, {self.samples} samples per datum"
        yield "elbo", self.elbo, "the same draws one by one"

    @property
    def gap(self) -> float:
        """iwae - elbo, nats: a lower bound on KL(q(z|x) || p(z|x))."""
        return self.iwae.value - self.elbo.value

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "n": self.n,
            "samples": self.samples,
            "figures": {name: e.to_dict() for name, e, _ in self.rows()},
            "gap": self.gap,
            "ess_median": float(self.ess.median()),
            "ess_min": float(self.ess.min()),
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"evidence, nats per datum, n = {self.n}"]
        lines += [f"{name:28s} {e}" for name, e, _ in self.rows()]
        return "\n".join([*lines, f"gap {self.gap:.4f}; effective samples {self.ess.median():.0f} (median)"])

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(str(e))}</td></tr>" for n, e, _ in self.rows())
        return f"<table><caption>n = {self.n}</caption>{body}</table>"


def log_weights(terms: Terms) -> Tensor:
    """log p(x, z) - log q(z | x), `(particles, batch)`, from terms with particles."""
    return terms.reconstruction - sum(terms.kl.values())


def vectorises(pair: Pair, x: Tensor) -> bool:
    """Whether both programs accept a leading plate of particles; a foreign one that reshapes may not."""
    try:
        return pair.terms(x[:2], particles=3).reconstruction.shape == (3, min(2, len(x)))
    except (ValueError, RuntimeError, IndexError):
        return False


def evidence(
    pair: Pair,
    x: Tensor,
    samples: int = 5000,
    seed: int = 0,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evidence:
    r"""The importance-weighted bound L_K = E log 1/K sum_k p(x, z_k) / q(z_k | x) <= log p(x).

    Weights are summed as they are drawn, so memory does not grow with `samples`. The Monte Carlo error of one
    datum is the delta method's, sqrt(sum w^2 / (sum w)^2 - 1/K).

    Warning: where the guide is narrower than the posterior the weights may have infinite variance; the error is
    then too small, and a low `ess` is the sign of it.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: K.
        seed: of the draws.
        on_progress: called with (rows done, rows in all).

    Returns:
        Evidence; `iwae` and `elbo` are lower bounds in nats per datum.

    Raises:
        DataError: no rows, no samples, or a pair with global latents.
    """
    if samples < 1:
        raise DataError(f"evidence: expected at least one sample; got samples={samples}.")
    x = accept(pair, x)
    if pair.layout.shared:
        names = ", ".join(pair.layout.shared)
        raise DataError(f"evidence: expected latents of single data only; got global {names}.")
    with quiet(pair, x, seed):
        draw = _by_particles if vectorises(pair, x) else _by_repetition
        rows = max(1, min(len(x), ROWS // samples or 1, 200))
        parts = []
        for start in range(0, len(x), rows):
            parts.append(_bound(pair, x[start : start + rows], samples, draw))
            on_progress(min(start + rows, len(x)), len(x))
    log_p, error, elbo, elbo_variance, ess = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    n = len(x)

    def mean(values: Tensor, standard_error: float) -> Estimate:
        spread = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
        if samples == 1:
            return Estimate(float(values.mean()), spread, "lower_bound", spread, CONSERVATIVE)
        return Estimate(float(values.mean()), standard_error, "lower_bound", spread)

    return Evidence(
        n=n,
        samples=samples,
        elbo=mean(elbo, float((elbo_variance.sum() / samples).sqrt() / n)),
        iwae=mean(log_p, float(error.square().sum().sqrt() / n)),
        log_p=log_p,
        ess=ess,
    )


def _by_particles(pair: Pair, x: Tensor, count: int) -> Tensor:
    terms = pair.terms(x, particles=count)
    weights = log_weights(terms)
    return weights if count > 1 else weights[None]


def _by_repetition(pair: Pair, x: Tensor, count: int) -> Tensor:
    return log_weights(pair.terms(x.repeat(count, *(1,) * (x.dim() - 1)))).reshape(count, len(x))


def _bound(pair: Pair, x: Tensor, samples: int, draw: Callable[[Pair, Tensor, int], Tensor]) -> tuple[Tensor, ...]:
    """log p, its error, mean and variance of the log weights, effective samples; each `(rows,)`, float64."""
    shape = {"dtype": torch.float64, "device": x.device}
    first = torch.full((len(x),), -math.inf, **shape)  # type: ignore[call-overload]
    second, total, squares = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    block = max(1, ROWS // len(x))
    done = 0
    while done < samples:
        count = min(block, samples - done)
        weights = draw(pair, x, count).double()
        first = torch.logaddexp(first, weights.logsumexp(0))
        second = torch.logaddexp(second, (2 * weights).logsumexp(0))
        total += weights.sum(0)
        squares += weights.square().sum(0)
        done += count
    mean = total / samples
    variance = (squares / samples - mean.square()).clamp(min=0) * samples / max(samples - 1, 1)
    inverse_ess = (second - 2 * first).exp()
    error = (inverse_ess - 1 / samples).clamp(min=0).sqrt()
    return first - math.log(samples), error, mean, variance, 1 / inverse_ess
