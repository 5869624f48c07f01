"""Models with discrete codes, with mixtures, and with two levels of latents, whose figures are sums or integrals."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy.special import logsumexp, rel_entr
from scipy.stats import norm
from torch import Tensor

from pvae.analysis.truths import truth
from pvae.analysis.truths.linear import LinearGaussian
from pvae.analysis.truths.truth import EstimatorName, FloatArray, Programs, Truth, enough, information, tensor
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
    if _relative_square(log_x + np.log(p), q) < truth.EVIDENCE_SAMPLES / 20:
        asked.append("evidence")
    exact = truth.state_figures(q, p[0], log_x) | {
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


class MixturePrograms(Programs):
    """Pyro programs p(c) p(x | c), with c summed out by the model; the parameter holds the means."""

    def model(self, x: Tensor) -> None:
        """p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.learned[c], self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty, as p(c|x) comes from Bayes' rule."""


def mixture(weights: FloatArray, means: FloatArray, scale: float, x: FloatArray) -> Truth:
    """Mixture of normals, weights `(K,)` and means `(K, d)`: exact posterior, hence ELBO = log p(x)."""
    log_x = norm.logpdf(x[:, None], means, scale).sum(2)
    log_joint = log_x + np.log(weights)
    q = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
    programs = MixturePrograms(means, weights=weights, scale=scale)
    asked: tuple[EstimatorName, ...] = ("surgery", "evidence", "prior_evidence")
    pair = Pair(programs.model, programs.guide)
    return Truth(
        f"mixture of {len(weights)}", pair, tensor(x), truth.state_figures(q, weights, log_x), asked, enough(len(x))
    )


class MixturePriorPrograms(Programs):
    """Pyro programs p(c) p(z | c) p(x | z), c summed out, z and x scalars, and q(z|x) = N(gain x, scale^2)."""

    def model(self, x: Tensor) -> None:
        """p(x, z, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.learned[c], self.spread))
            pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gain * x, self.scale))


def mixture_prior(
    weights: FloatArray, means: FloatArray, spread: float, noise: float, x: FloatArray, gain: float, scale: float
) -> Truth:
    """x = z + noise with a mixture of normals N(m_c, spread^2) as the prior and a normal guide N(gain x, scale^2).

    Arguments:
        weights: weights of the components, `(K,)`.
        means: means of the components, `(K,)`.
        spread: standard deviation of every component.
        noise: standard deviation of x given z.
        x: data, `(n,)`.
        gain: factor of the guide's mean.
        scale: standard deviation of the guide; above `noise` its importance weights are bounded.
    """
    nodes, measure = truth.normal_nodes()
    z = gain * x[:, None] + scale * nodes
    log_prior = logsumexp(norm.logpdf(z[..., None], means, spread) + np.log(weights), axis=2)
    kl = float((-0.5 * math.log(2 * math.pi * math.e * scale**2) - log_prior @ measure).mean())
    reconstruction = float((norm.logpdf(x[:, None], z, noise) @ measure).mean())
    mutual = information(gain * x[:, None], np.array([[scale**2]]))
    wide = math.hypot(spread, noise)
    log_p = logsumexp(norm.logpdf(x[:, None], means, wide) + np.log(weights), axis=1)
    far = weights @ ((x[:, None] - means) ** 2).T + spread**2
    jensen = float((-0.5 * (far / noise**2 + math.log(2 * math.pi * noise**2))).mean())
    exact = truth.elbo_figures(reconstruction, kl, mutual, float(log_p.mean()), jensen)
    programs = MixturePriorPrograms(means, weights=weights, spread=spread, noise=noise, gain=gain, scale=scale)
    asked: tuple[EstimatorName, ...] = ("surgery", "evidence", "prior_evidence")
    pair = Pair(programs.model, programs.guide)
    return Truth(f"mixture prior of {len(weights)}", pair, tensor(x), exact, asked, enough(len(x)))


class TwoLevelPrograms(Programs):
    """Pyro programs p(z2) p(z1|z2) p(x|z1) and q(z2|x) q(z1|x, z2), linear and Gaussian; the parameter is the slope."""

    def __init__(self, law: LinearGaussian) -> None:
        link = law.s[1, 0] / law.s[0, 0]
        super().__init__(
            law.v[1, 0],
            spread=math.sqrt(law.v[1, 1] - law.v[1, 0] ** 2),
            b=law.b,
            noise=law.noise,
            w=law.w[:, 1],
            link=link,
            g=[law.g[0], law.g[1] - link * law.g[0]],
            c=[law.c[0], law.c[1] - link * law.c[0]],
            scale=np.sqrt([law.s[0, 0], law.s[1, 1] - link**2 * law.s[0, 0]]),
        )

    def model(self, x: Tensor) -> None:
        """p(x, z1, z2)."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.learned.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.learned * z2, self.spread).to_event(1))
            pyro.sample("x", dist.Normal(z1 * self.w + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z2|x) q(z1|x, z2)."""
        loc = (x @ self.g.T + self.c)[..., None]
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(loc[..., 0, :], self.scale[0]).to_event(1))
            pyro.sample("z1", dist.Normal(loc[..., 1, :] + self.link * z2, self.scale[1]).to_event(1))


def hierarchy(w: FloatArray, slope: float, spread: float, noise: float, stretch: float, n: int, seed: int = 0) -> Truth:
    """z2 ~ N(0, 1), z1 ~ N(slope z2, spread^2), x ~ N(w z1, noise^2 I), all latents scalars; n rows of the model.

    The guide has the structure of the posterior, with `stretch` times its variances and slightly wrong means. Jointly
    it is one normal in (z2, z1), so every joint figure is that of a linear model with one latent of two coordinates.
    """
    v = np.array([[1.0, slope], [slope, slope**2 + spread**2]])
    wide = np.stack([np.zeros_like(w), w], 1)
    covariance = np.linalg.inv(np.linalg.inv(v) + wide.T @ wide / noise**2)
    g = covariance @ wide.T / noise**2
    law = LinearGaussian(wide, np.zeros(len(w)), noise, g, np.array([0.2, -0.1]), stretch * covariance, v)
    random = np.random.default_rng(seed)
    z = random.multivariate_normal(np.zeros(2), v, n)
    x = z @ wide.T + noise * random.standard_normal((n, len(w)))
    exact = law.bounds(x) | _of_levels(law, x)
    del exact["approximation_gap"], exact["amortisation_gap"]
    asked: tuple[EstimatorName, ...] = ("surgery", "evidence", "prior_evidence", "ais", "bracket")
    programs = TwoLevelPrograms(law)
    pair = Pair(programs.model, programs.guide)
    return Truth(f"two levels, n={n}", pair, tensor(x), exact, asked, enough(n), log_p=law.log_p)


def _of_levels(law: LinearGaussian, x: FloatArray) -> dict[str, float]:
    """Figures of both levels together, and of the upper level alone."""
    (means, covariance), _ = truth.coordinates(law.means(x), law.s)
    kl, upper = (
        float(truth.normal_kl(*part).mean()) for part in ((law.means(x), law.s, law.v), (means, covariance, np.eye(1)))
    )
    joint, own = information(law.means(x), law.s), information(means, covariance)
    return {
        "mutual_information": joint,
        "marginal_kl": kl - joint,
        "z2.kl": upper,
        "z2.mutual_information": own,
        "z2.marginal_kl": upper - own,
        "z1.kl": kl - upper,
    }
