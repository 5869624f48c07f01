"""Discrete codes, whose figures are sums over all states."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy.special import logsumexp, rel_entr
from scipy.stats import norm
from torch import Tensor

from pvae.analysis.truths.truth import (
    EVIDENCE_SAMPLES,
    EstimatorName,
    FloatArray,
    Programs,
    Truth,
    enough,
    state_figures,
    tensor,
)
from pvae.pair.pair import Pair


class CodePrograms(Programs):
    """Pyro programs q(c | x = i) = table[i], a factorised prior, and x = sum of the positions + noise."""

    def __init__(self, table: FloatArray, prior: FloatArray) -> None:
        super().__init__(1.0, log_q=np.log(np.maximum(table, 1e-300)), log_p=np.log(prior))  # logits must be finite

    def model(self, x: Tensor) -> None:
        """p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.log_p).to_event(1))
            pyro.sample("x", dist.Normal(self.learned * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(c|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.log_q[x[:, 0].long()]).to_event(1))


def code_truth(name: str, table: FloatArray, prior: FloatArray, copies: int = 40) -> Truth:
    """Return the truth of a table of independent positions, by the sum over all joint states.

    Evidence is checked where the variance of the importance weights, known by the same sum, is small enough.

    Arguments:
        name: name of the truth.
        table: q(c_p | x = i), `(inputs, P, K)`; inputs are equally likely.
        prior: `(P, K)`.
        copies: number of rows of every input.
    """
    inputs, positions, k = table.shape
    states = np.stack(np.meshgrid(*[np.arange(k)] * positions, indexing="ij"), -1).reshape(-1, positions)
    q, p, alone = (_joint(t, states) for t in (table, prior[None], table.mean(0, keepdims=True)))
    log_x = norm.logpdf(np.arange(inputs)[:, None], states.sum(1), 1.0)
    asked: list[EstimatorName] = ["surgery", "prior_evidence"]
    if _relative_square(log_x + np.log(p), q) < EVIDENCE_SAMPLES / 20:
        asked.append("evidence")
    exact = state_figures(q, p[0], log_x) | {
        "total_correlation": float(rel_entr(q.mean(0), alone[0]).sum()),
        "coordinate_kl": float(rel_entr(table.mean(0), prior).sum()),
    }
    programs = CodePrograms(table, prior)
    x = np.tile(np.arange(inputs), copies)[:, None]
    return Truth(name, Pair(programs.model, programs.guide), tensor(x), exact, tuple(asked), enough(len(x)))


def _joint(table: FloatArray, states: NDArray[np.intp]) -> FloatArray:
    """Probabilities `(inputs, states)` of joint states whose positions are independent."""
    return np.asarray(np.prod([table[:, i, column] for i, column in enumerate(states.T)], axis=0))


def _relative_square(log_joint: FloatArray, q: FloatArray) -> float:
    """Largest E_q w^2 / (E_q w)^2 of all inputs; infinite where q misses a state."""
    missed = (q == 0).any(1)
    squares = logsumexp(2 * log_joint - np.log(np.where(q == 0, 1.0, q)), axis=1) - 2 * logsumexp(log_joint, axis=1)
    return float(np.where(missed, math.inf, np.exp(squares)).max())


def symmetric_channel(k: int, error: float) -> Truth:
    """One of k symbols, another in its place with probability `error`, under the uniform prior."""
    table = np.full((k, 1, k), error / (k - 1)) + np.eye(k)[:, None] * (1 - error - error / (k - 1))
    return code_truth(f"{k}-ary symmetric, {error:g}", table, np.full((1, k), 1 / k))


def deterministic_code(symbols: NDArray[np.intp], k: int) -> Truth:
    """Input i always has the symbols `symbols[i]`, `(inputs, P)`: the information is the entropy of the joint code."""
    table = np.eye(k)[symbols]
    positions = symbols.shape[1]
    name = f"deterministic code, {positions} x {k}"
    return code_truth(name, table, np.full((positions, k), 1 / k))


def random_code(inputs: int, positions: int, k: int, seed: int = 0) -> Truth:
    """A random table and a random prior."""
    random = np.random.default_rng(seed)
    even = np.full(k, 2.0)
    table, prior = random.dirichlet(even, (inputs, positions)), random.dirichlet(even, positions)
    return code_truth(f"random code, {positions} x {k}", table, prior)
