"""Test models with a code, a mixture as prior, or two levels of latents, whose exact values are sums or integrals."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
from scipy.special import logsumexp, rel_entr
from scipy.stats import norm
from torch import Tensor

from pvae.analysis.truths import linear, truth
from pvae.analysis.truths.truth import EstimatorName, FloatArray, Programs, Truth, normal_nodes

WITH_EVIDENCE: tuple[EstimatorName, ...] = ("surgery", "evidence", "prior_evidence")
"""Estimators that find the exact values of a test model whose importance weights have a small variance."""


class CodePrograms(Programs):
    """Pyro model and guide with a categorical code c of P independent positions: q(c | x = i) is entry i of a table.

    The model has a factorised prior p(c) and p(x | c) = N(sum of the positions of c, 1); the parameter scales this sum.
    """

    def __init__(self, table: FloatArray, prior: FloatArray) -> None:
        super().__init__(1.0, log_q=np.log(np.maximum(table, 1e-300)), log_p=np.log(prior))  # logits must be finite

    def model(self, x: Tensor) -> None:
        """Sample c from the prior and observe x: the model p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.log_p).to_event(1))
            pyro.sample("x", dist.Normal(self.learned * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample c from the guide q(c | x), the entry of the table for x."""
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.log_q[x[:, 0].long()]).to_event(1))


def code(
    name: str, table: FloatArray, prior: FloatArray, estimators: tuple[EstimatorName, ...] = WITH_EVIDENCE
) -> Truth:
    """Return a test model with a categorical code of P independent positions, see `CodePrograms`.

    Exact values are sums over all joint states of the code. Every input has 40 data rows.

    Arguments:
        name: name of the test model.
        table: posterior probabilities q(c_p | x = i), `(inputs, P, K)`; the inputs i are equally likely.
        prior: prior probabilities p(c_p), `(P, K)`.
        estimators: estimators that find the exact values.
    """
    inputs, positions, k = table.shape
    states = np.indices([k] * positions).reshape(positions, -1)
    tables = (table, prior[None], table.mean(0, keepdims=True))
    q, p, alone = (np.prod([t[:, i, column] for i, column in enumerate(states)], axis=0) for t in tables)
    log_x = norm.logpdf(np.arange(inputs)[:, None], states.sum(0), 1.0)
    total, single = (float(rel_entr(*pair).sum()) for pair in ((q.mean(0), alone[0]), (table.mean(0), prior)))
    exact = truth.state_figures(q, p[0], log_x) | {"total_correlation": total, "coordinate_kl": single}
    return CodePrograms(table, prior).truth(name, np.tile(np.arange(inputs), 40)[:, None], exact, estimators=estimators)


class MixturePriorPrograms(Programs):
    """Pyro model p(c) p(z | c) p(x | z), scalar z and x, c summed out, and guide q(z|x) = N(gain x, scale^2)."""

    def model(self, x: Tensor) -> None:
        """Sum out c, sample z and observe x: the model p(x, z, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.learned[c], self.spread))
            pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample z from the guide q(z|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gain * x, self.scale))


def mixture_prior(
    weights: FloatArray, means: FloatArray, spread: float, noise: float, x: FloatArray, gain: float, scale: float
) -> Truth:
    """Return a test model with x = z + noise, whose prior of z is a mixture of normals N(m_c, spread^2).

    The guide is q(z|x) = N(gain x, scale^2).

    Arguments:
        weights: weights of the mixture components of the prior, `(K,)`.
        means: means m_c of the components, `(K,)`.
        spread: standard deviation of every component.
        noise: standard deviation of x given z.
        x: data, `(n,)`.
        gain: factor of the guide's mean.
        scale: standard deviation of the guide; above `noise` its importance weights are bounded.
    """
    nodes, measure = normal_nodes()
    z = gain * x[:, None] + scale * nodes
    log_prior = logsumexp(norm.logpdf(z[..., None], means, spread) + np.log(weights), axis=2)
    kl = float((-0.5 * math.log(2 * math.pi * math.e * scale**2) - log_prior @ measure).mean())
    reconstruction = float((norm.logpdf(x[:, None], z, noise) @ measure).mean())
    mutual = truth.information(gain * x[:, None], np.array([[scale**2]]))
    log_p = logsumexp(norm.logpdf(x[:, None], means, math.hypot(spread, noise)) + np.log(weights), axis=1)
    far = weights @ ((x[:, None] - means) ** 2).T + spread**2
    jensen = float((-0.5 * (far / noise**2 + math.log(2 * math.pi * noise**2))).mean())
    exact = truth.elbo_figures(reconstruction, kl, float(log_p.mean()), jensen) | truth.split_kl(kl, mutual)
    programs = MixturePriorPrograms(means, weights=weights, spread=spread, noise=noise, gain=gain, scale=scale)
    return programs.truth(f"mixture prior of {len(weights)}", x, exact, estimators=WITH_EVIDENCE)


class TwoLevelPrograms(Programs):
    """Pyro model p(z2) p(z1|z2) p(x|z1) and guide q(z2|x) q(z1|x, z2), linear and Gaussian.

    The parameter is the slope of the mean of z1 given z2.
    """

    def __init__(self, law: linear.LinearGaussian) -> None:
        link = law.s[1, 0] / law.s[0, 0]
        g, c = ([part[0], part[1] - link * part[0]] for part in (law.g, law.c))
        spread = math.sqrt(law.v[1, 1] - law.v[1, 0] ** 2)
        scale = np.sqrt([law.s[0, 0], law.s[1, 1] - link**2 * law.s[0, 0]])
        known = {"b": law.b, "noise": law.noise, "w": law.w[:, 1]}
        super().__init__(law.v[1, 0], spread=spread, link=link, g=g, c=c, scale=scale, **known)

    def model(self, x: Tensor) -> None:
        """Sample z2 and z1 from the prior and observe x: the model p(x, z1, z2)."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.learned.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.learned * z2, self.spread).to_event(1))
            pyro.sample("x", dist.Normal(z1 * self.w + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample z2 and then z1 from the guide q(z2|x) q(z1|x, z2)."""
        loc = (x @ self.g.T + self.c)[..., None]
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(loc[..., 0, :], self.scale[0]).to_event(1))
            pyro.sample("z1", dist.Normal(loc[..., 1, :] + self.link * z2, self.scale[1]).to_event(1))


def hierarchy(w: FloatArray, slope: float, spread: float, noise: float, stretch: float, n: int, seed: int = 0) -> Truth:
    """Return a test model with two levels of scalar latents, and n data sampled from it.

    The model is z2 ~ N(0, 1), z1 ~ N(slope z2, spread^2), x ~ N(w z1, noise^2 I). The guide has the structure of the
    posterior, with `stretch` times its variances and slightly wrong means. Jointly it is one normal in (z2, z1), so the
    exact joint values are those of a linear Gaussian model with one latent of two coordinates.
    """
    v = np.array([[1.0, slope], [slope, slope**2 + spread**2]])
    wide = np.stack([np.zeros_like(w), w], 1)
    covariance = np.linalg.inv(np.linalg.inv(v) + wide.T @ wide / noise**2)
    g = covariance @ wide.T / noise**2
    law = linear.LinearGaussian(wide, np.zeros(len(w)), noise, g, np.array([0.2, -0.1]), stretch * covariance, v)
    random = np.random.default_rng(seed)
    x = random.multivariate_normal(np.zeros(2), v, n) @ wide.T + noise * random.standard_normal((n, len(w)))
    top, _ = truth.coordinates(law.means(x), law.s)
    kl, upper = float(law.kl(x).mean()), float(truth.normal_kl(*top, np.eye(1)).mean())
    exact = law.bounds(x) | truth.split_kl(kl, truth.information(law.means(x), law.s))
    exact |= {"z2.kl": upper, **truth.split_kl(upper, truth.information(*top), "z2."), "z1.kl": kl - upper}
    del exact["approximation_gap"], exact["amortisation_gap"]
    asked = (*WITH_EVIDENCE, "ais", "bracket")
    return TwoLevelPrograms(law).truth(f"two levels, n={n}", x, exact, estimators=asked, log_p=law.log_p)
