"""Test models beside those of `pvae selfcheck`: further members of their families, and families of the tests alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pyro
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from pvae.analysis.truths import linear, structured, truth
from pvae.analysis.truths.selfcheck import digits, standard
from pvae.analysis.truths.structured import WITH_EVIDENCE
from pvae.analysis.truths.truth import EVIDENCE_SAMPLES, EstimatorName, FloatArray, Programs, Truth, normal_nodes


def product_channel(centres: Sequence[FloatArray], noises: Sequence[float]) -> Truth:
    """Return a test model whose data x are all tuples of the centres, with q(z|x) = N(x, diag(noises)^2).

    Thus q_agg is a product, and its total correlation is 0. A label is a pair of neighbouring centres of the first
    coordinate, the only coordinate that depends on it.
    """
    x = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, len(centres))
    parts = [truth.information(c[:, None], np.array([[s * s]])) for c, s in zip(centres, noises, strict=True)]
    law = linear.identity_channel(noises)
    labels = np.argsort(np.argsort(centres[0])).repeat(len(x) // len(centres[0])) // 2
    kl = float(law.kl(x).mean())
    exact = truth.split_kl(kl, sum(parts))
    if len(centres) > 1:
        exact |= {"total_correlation": 0.0, "coordinate_kl": kl - sum(parts)}
    exact["label_information"] = linear.identity_channel([noises[0]]).label_information(x[:, :1], labels)
    sizes = " x ".join(str(len(c)) for c in centres)
    return linear.linear(f"product channel, {sizes}", law, x, labels, exact)


def binary_input(a: float, copies: int = 200) -> Truth:
    """Return a test model with data x = a and x = -a, `copies` of each, and q(z|x) = N(x, 1).

    The mutual information is log 2 - E log(1 + exp(-2 a (a + eps))) with eps ~ N(0, 1), and KL(q(z|x) || N(0, 1)) is
    a^2/2.
    """
    nodes, weights = normal_nodes()
    mutual = math.log(2) - float(weights @ np.logaddexp(0, -2 * a * (a + nodes)))
    x, kl = np.tile([[a], [-a]], (copies, 1)), a * a / 2
    known = {"kl": kl, **truth.split_kl(kl, mutual)}
    return linear.linear(f"binary input, a={a:g}", linear.identity_channel([1.0]), x, known=known)


def disjoint(n: int) -> Truth:
    """Return a test model whose n posteriors are 20 standard deviations apart: the mutual information is log n."""
    x = np.arange(n)[:, None] - (n - 1) / 2
    return linear.linear(
        f"disjoint, n={n}", linear.identity_channel([0.05]), x, known={"mutual_information": math.log(n)}
    )


def blind(x: FloatArray, loc: float = 0.3, scale: float = 0.7) -> Truth:
    """Return a test model whose guide N(loc, scale^2 I) does not depend on x: the mutual information is 0."""
    d = x.shape[1]
    law = replace(linear.identity_channel([scale] * d), g=np.zeros((d, d)), c=np.full(d, loc))
    exact = {**truth.split_kl(float(law.kl(x).mean()), 0.0), "total_correlation": 0.0}
    return linear.linear(f"blind, d={d}", law, x, known=exact)


def wrong_guide(law: linear.LinearGaussian, x: FloatArray) -> Truth:
    """Return a test model: a linear Gaussian model whose guide is wider than the posterior, and data x `(n, d)`.

    Its importance weights are therefore bounded. With one latent coordinate the bound IWAE_2 is known as well, by a
    double integral.
    """
    d, q = law.w.shape
    exact = {"iwae_2": float(iwae_2(law, x).mean())} if q == 1 else {}
    return linear.linear(f"wrong guide, {q} in {d}", law, x, known=exact, estimators=get_args(EstimatorName))


def iwae_2(law: linear.LinearGaussian, x: FloatArray) -> FloatArray:
    """Return the importance-weighted bound IWAE_2, E log (w_1 + w_2) / 2, of a model with one latent, `(n,)`, nats."""
    nodes, weights = normal_nodes()
    scale = math.sqrt(law.s[0, 0])
    z = law.means(x) + scale * nodes
    log_q = norm.logpdf(nodes) - math.log(scale)
    log_x = norm.logpdf(x[:, None], law.b + z[..., None] * law.w[:, 0], law.noise).sum(2)
    log_w = norm.logpdf(z) + log_x - log_q
    both = np.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
    return np.asarray(np.einsum("nij,i,j->n", both, weights, weights, optimize=True))


def code(name: str, table: FloatArray, prior: FloatArray) -> Truth:
    """Return the test model of `structured.code`, on which the evidence estimator is checked only where it can be.

    That is if the variance of its importance weights, known by sums over all states, is small enough.
    """
    inputs, positions, k = table.shape
    states = np.indices([k] * positions).reshape(positions, -1)
    q, p = (np.prod([t[:, i, at] for i, at in enumerate(states)], axis=0) for t in (table, prior[None]))
    log_joint = norm.logpdf(np.arange(inputs)[:, None], states.sum(0), 1.0) + np.log(p)
    is_tame = relative_square(log_joint, q) < EVIDENCE_SAMPLES / 20
    return structured.code(name, table, prior, WITH_EVIDENCE if is_tame else ("surgery", "prior_evidence"))


def relative_square(log_joint: FloatArray, q: FloatArray) -> float:
    """Return the largest E_q w^2 / (E_q w)^2 over inputs, where w = p(x, c) / q(c|x); infinite if q misses a state."""
    missed = (q == 0).any(1)
    squares = logsumexp(2 * log_joint - np.log(np.where(q == 0, 1.0, q)), axis=1) - 2 * logsumexp(log_joint, axis=1)
    return float(np.where(missed, math.inf, np.exp(squares)).max())


def symmetric_channel(k: int, error: float) -> Truth:
    """Return a test model: a k-ary symmetric channel as the posterior, with a uniform prior.

    The code equals the symbol x with probability 1 - `error`, and is otherwise one of the other k - 1, equally likely.
    """
    table = np.full((k, 1, k), error / (k - 1)) + np.eye(k)[:, None] * (1 - error - error / (k - 1))
    return code(f"{k}-ary symmetric, {error:g}", table, np.full((1, k), 1 / k))


def deterministic_code(symbols: NDArray[np.intp], k: int) -> Truth:
    """Return a test model whose posterior gives input i the code `symbols[i]` with certainty; symbols `(inputs, P)`.

    The mutual information is the entropy of the joint code over the inputs.
    """
    positions = symbols.shape[1]
    return code(f"deterministic code, {positions} x {k}", np.eye(k)[symbols], np.full((positions, k), 1 / k))


def random_code(inputs: int, positions: int, k: int, seed: int = 0) -> Truth:
    """Return a test model with a categorical code whose posterior and prior probabilities are random (Dirichlet)."""
    random = np.random.default_rng(seed)
    even = np.full(k, 2.0)
    table, prior = random.dirichlet(even, (inputs, positions)), random.dirichlet(even, positions)
    return code(f"random code, {positions} x {k}", table, prior)


class MixturePrograms(Programs):
    """Pyro model of a mixture of normals p(c) p(x | c), with c summed out (enumerated); the parameter is the means."""

    def model(self, x: Tensor) -> None:
        """Sum out the component c and observe x: the model p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.learned[c], self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample nothing: an empty guide, as the posterior p(c|x) follows from Bayes' rule."""


def mixture(weights: FloatArray, means: FloatArray, scale: float, x: FloatArray) -> Truth:
    """Return a test model: a mixture of normals with weights `(K,)`, means `(K, d)` and a common standard deviation.

    The posterior p(c|x) of the component is exact, so that ELBO = log p(x).
    """
    log_x = norm.logpdf(x[:, None], means, scale).sum(2)
    log_joint = log_x + np.log(weights)
    q = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
    programs, exact = MixturePrograms(means, weights=weights, scale=scale), truth.state_figures(q, weights, log_x)
    return programs.truth(f"mixture of {len(weights)}", x, exact, estimators=WITH_EVIDENCE)


def every() -> tuple[Truth, ...]:
    """Return the test models of `pvae selfcheck`, and members of every other family, at fixed parameters."""
    (images, _), plane = digits(), np.random.default_rng(0).standard_normal((200, 2)) * 1.5
    line = linear.widened(np.array([[1.0], [-0.6]]), 0.8, 1.4, 0.2)
    return (
        *standard(),
        linear.linear_vae(images, 10),
        linear.gaussian_channel(1, 0.25, 50),
        linear.gaussian_channel(10, 0.1, 1000),
        product_channel([np.linspace(-1.5, 1.5, 8), np.linspace(-1.2, 1.6, 8) ** 3], [0.4, 0.6]),
        *(binary_input(a) for a in (0.5, 1.0, 2.0)),
        disjoint(100),
        blind(plane),
        symmetric_channel(2, 0.1),
        symmetric_channel(10, 0.1),
        deterministic_code(np.array([[0, 1], [1, 1], [2, 0], [3, 4], [0, 1]]), 5),
        wrong_guide(line, np.random.default_rng(0).standard_normal((20, 2))),
        mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [1.2, 0.0]]), 0.8, plane),
    )
