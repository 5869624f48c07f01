"""Models that sum a component out: a mixture of normals, and a latent with a mixture as its prior."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from pvae.analysis.truths.truth import (
    EstimatorName,
    FloatArray,
    Programs,
    Truth,
    enough,
    information,
    normal_nodes,
    state_figures,
    tensor,
)
from pvae.pair.pair import Pair


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
    return Truth(f"mixture of {len(weights)}", pair, tensor(x), state_figures(q, weights, log_x), asked, enough(len(x)))


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
    nodes, measure = normal_nodes()
    z = gain * x[:, None] + scale * nodes
    log_prior = logsumexp(norm.logpdf(z[..., None], means, spread) + np.log(weights), axis=2)
    kl = float((-0.5 * math.log(2 * math.pi * math.e * scale**2) - log_prior @ measure).mean())
    reconstruction = float((norm.logpdf(x[:, None], z, noise) @ measure).mean())
    mutual = information(gain * x[:, None], np.array([[scale**2]]))
    wide = math.hypot(spread, noise)
    log_p = logsumexp(norm.logpdf(x[:, None], means, wide) + np.log(weights), axis=1)
    far = weights @ ((x[:, None] - means) ** 2).T + spread**2
    exact = {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "mutual_information": mutual,
        "marginal_kl": kl - mutual,
        "log_evidence": float(log_p.mean()),
        "prior_jensen": float((-0.5 * (far / noise**2 + math.log(2 * math.pi * noise**2))).mean()),
        "inference_gap": float(log_p.mean()) - reconstruction + kl,
    }
    programs = MixturePriorPrograms(means, weights=weights, spread=spread, noise=noise, gain=gain, scale=scale)
    asked: tuple[EstimatorName, ...] = ("surgery", "evidence", "prior_evidence")
    pair = Pair(programs.model, programs.guide)
    return Truth(f"mixture prior of {len(weights)}", pair, tensor(x), exact, asked, enough(len(x)))
