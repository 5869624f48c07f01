"""Linear Gaussian model with two levels of latents."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor

from pvae.analysis.truths.linear import LinearGaussian
from pvae.analysis.truths.truth import (
    EstimatorName,
    FloatArray,
    Programs,
    Truth,
    coordinates,
    enough,
    information,
    normal_kl,
    tensor,
)
from pvae.pair.pair import Pair


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
    (means, covariance), _ = coordinates(law.means(x), law.s)
    kl, upper = (
        float(normal_kl(*part).mean()) for part in ((law.means(x), law.s, law.v), (means, covariance, np.eye(1)))
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
