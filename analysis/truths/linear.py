"""Linear Gaussian test models, whose ELBO terms and evidence have closed forms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import multivariate_normal

from pvae.analysis.truths import truth
from pvae.analysis.truths.truth import FloatArray, Programs, Truth
from pvae.util import Record


class LinearGaussian(Record, eq=False):
    r"""Linear Gaussian model and guide: p(z) = N(0, V), p(x|z) = N(W z + b, s^2 I), q(z|x) = N(G x + c, S).

    All expectations that the ELBO and the evidence need have closed forms.

    Arguments:
        w: slope W of the decoder, `(d, D)`.
        b: offset of the decoder, `(d,)`.
        noise: standard deviation s of x given z.
        g: slope G of the encoder, `(D, d)`.
        c: offset of the encoder, `(D,)`.
        s: covariance S of the guide, `(D, D)`.
        v: covariance V of the prior, `(D, D)`.
    """

    w: FloatArray
    b: FloatArray
    noise: float
    g: FloatArray
    c: FloatArray
    s: FloatArray
    v: FloatArray

    @property
    def precision(self) -> FloatArray:
        """Precision matrix of the true posterior p(z|x), `(D, D)`."""
        return np.asarray(np.linalg.inv(self.v) + self.w.T @ self.w / self.noise**2)

    @property
    def is_diagonal(self) -> bool:
        """True if the coordinates of z are independent under the guide."""
        return not np.count_nonzero(self.s - np.diag(np.diag(self.s)))

    def means(self, x: FloatArray) -> FloatArray:
        """Return the means of q(z|x) for data `(n, d)`, `(n, D)`."""
        return np.asarray(x @ self.g.T + self.c)

    def log_p(self, x: FloatArray) -> FloatArray:
        """Return log p(x) of data `(n, d)`, `(n,)`, nats; exact."""
        covariance = self.w @ self.v @ self.w.T + self.noise**2 * np.eye(len(self.b))
        return np.asarray(multivariate_normal(self.b, covariance).logpdf(x))

    def reconstruction(self, x: FloatArray) -> FloatArray:
        """Return the reconstruction term E_q log p(x|z) of data `(n, d)`, `(n,)`, nats; exact."""
        return self._expected(x, self.means(x), self.s)

    def jensen(self, x: FloatArray) -> FloatArray:
        """Return E_p log p(x|z), the expectation under the prior, of data `(n, d)`, `(n,)`, nats; exact."""
        return self._expected(x, np.zeros((len(x), len(self.c))), self.v)

    def _expected(self, x: FloatArray, mean: FloatArray, covariance: FloatArray) -> FloatArray:
        """Return E log p(x|z) for z ~ N(mean, covariance) with one mean for each datum, `(n,)`, nats."""
        squares = ((x - self.b - mean @ self.w.T) ** 2).sum(1) + np.trace(self.w @ covariance @ self.w.T)
        return np.asarray(-0.5 * (squares / self.noise**2 + len(self.b) * math.log(2 * math.pi * self.noise**2)))

    def kl(self, x: FloatArray) -> FloatArray:
        """Return KL(q(z|x) || p(z)) of data `(n, d)`, `(n,)`, nats; exact."""
        return truth.normal_kl(self.means(x), self.s, self.v)

    def approximation(self) -> float:
        """Return the approximation gap, nats: KL(q* || p(z|x)) of the best member q* of the guide's family; exact.

        The best diagonal normal has the diagonal of the posterior's precision matrix as its precisions; a normal of
        full rank equals the posterior.
        """
        p = self.precision
        return 0.5 * float(np.log(np.diag(p)).sum() - np.linalg.slogdet(p)[1]) if self.is_diagonal else 0.0

    def bounds(self, x: FloatArray) -> dict[str, float]:
        """Return the ELBO, its terms, log p(x) and the gaps between them, means over the data, nats; exact."""
        terms = [float(term(x).mean()) for term in (self.reconstruction, self.kl, self.log_p, self.jensen)]
        figures, approximation = truth.elbo_figures(*terms), self.approximation()
        amortisation = figures["inference_gap"] - approximation
        return {**figures, "approximation_gap": approximation, "amortisation_gap": amortisation}

    def informations(self, x: FloatArray) -> dict[str, float]:
        """Return the mutual information and the marginal KL of q_agg in one or two dimensions, nats; exact.

        In two dimensions also the total correlation and the KL of the coordinates; the prior covariance V must then be
        diagonal.
        """
        means = self.means(x)
        joint, kl = truth.information(means, self.s), float(self.kl(x).mean())
        out = truth.split_kl(kl, joint)
        if len(self.c) > 1:
            entropies = sum(truth.mixture_entropy(*part) for part in truth.coordinates(means, self.s))
            total = entropies - truth.mixture_entropy(means, self.s)
            out |= {"total_correlation": total, "coordinate_kl": kl - joint - total}
        return out

    def label_information(self, x: FloatArray, labels: np.ndarray) -> float:
        """Return the mutual information I[y, z] of z and labels `(n,)`, nats; exact.

        It is the entropy of q_agg minus the mean entropy of the aggregated posteriors of the classes.
        """
        means = self.means(x)
        parts = [means[labels == label] for label in np.unique(labels)]
        within = sum(len(part) * truth.mixture_entropy(part, self.s) for part in parts) / len(x)
        return truth.mixture_entropy(means, self.s) - within


class LinearPrograms(Programs):
    """Pyro model and guides of a `LinearGaussian` with prior covariance V = I; the parameter is W."""

    def __init__(self, law: LinearGaussian) -> None:
        super().__init__(law.w, b=law.b, noise=law.noise, g=law.g, c=law.c, tril=np.linalg.cholesky(law.s))
        self.is_diagonal = law.is_diagonal

    def model(self, x: torch.Tensor) -> None:
        """Sample z from the prior and observe x: the model p(x, z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.c), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.learned.T + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        """Sample z from the guide q(z|x), a diagonal normal if its covariance is diagonal."""
        loc = x @ self.g.T + self.c
        normal = dist.Normal(loc, self.tril.diagonal()).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal if self.is_diagonal else dist.MultivariateNormal(loc, scale_tril=self.tril))


def linear(
    name: str, law: LinearGaussian, x: FloatArray, labels: np.ndarray | None = None,
    known: Mapping[str, float] | None = None, **rest: Any,
) -> Truth:  # fmt: skip
    """Return the test model of a linear Gaussian model with V = I.

    Its mutual information and marginal KL are among the exact values if z has at most two coordinates.

    Arguments:
        name: name of the test model.
        law: model and guide.
        x: data `(n, d)`.
        labels: class labels `(n,)`.
        known: exact values that are known in another way, nats, by name; they take precedence.
        rest: further fields of `Truth`.
    """
    exact = law.bounds(x)
    if len(law.c) <= 2:
        exact |= law.informations(x)
        if labels is not None:
            exact["label_information"] = law.label_information(x, labels)
    classes = None if labels is None else torch.as_tensor(labels)
    return LinearPrograms(law).truth(name, x, exact | dict(known or {}), labels=classes, log_p=law.log_p, **rest)


def probabilistic_pca(x: FloatArray, q: int) -> LinearGaussian:
    r"""Return the linear VAE with q latents fitted to x `(n, d)` by maximum likelihood; its guide is the posterior.

    With eigenvalues l_1 >= ... >= l_d of the 1/n covariance, s^2 = mean(l_{q+1..d}): W = U_q (L_q - s^2 I)^(1/2),
    G = L_q^-1 W', S = s^2 L_q^-1.

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999), https://doi.org/10.1111/1467-9868.00196
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (Lucas et al., 2019),
        https://arxiv.org/abs/1911.02469
    """
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    s2 = float(values[q:].mean())
    w = vectors[:, :q] * np.sqrt(values[:q] - s2)
    g = (w / values[:q]).T
    return LinearGaussian(w, x.mean(0), math.sqrt(s2), g, -g @ x.mean(0), np.diag(s2 / values[:q]), np.eye(q))


def linear_vae(x: FloatArray, q: int, labels: np.ndarray | None = None) -> Truth:
    """Return a test model: the linear VAE of `probabilistic_pca` with q latents, fitted to the data x `(n, d)`.

    As its guide is the true posterior, all importance weights are equal, so IWAE_K = log p(x) for every K.
    """
    law = probabilistic_pca(x, q)
    exact = dict.fromkeys(("iwae_2", "iwae_4", "iwae_8"), float(law.log_p(x).mean()))
    return linear(f"linear VAE, q={q}", law, x, labels, exact, estimators=("surgery", "evidence"), samples=20, draws=16)


def identity_channel(noises: Sequence[float]) -> LinearGaussian:
    """Return the linear Gaussian model p(x|z) = N(z, I) with the guide q(z|x) = N(x, diag(noises)^2)."""
    eye, zero = np.eye(len(noises)), np.zeros(len(noises))
    return LinearGaussian(eye, zero, 1.0, eye, zero, np.diag(np.square(noises).astype(float)), eye)


def gaussian_channel(dim: int, variance: float, n: int, seed: int = 0) -> Truth:
    """Return a test model: n data from N(0, (1 - s^2) I) and q(z|x) = N(x, s^2 I), where s^2 is `variance`.

    Under the data distribution the mutual information is -dim/2 log s^2; in expectation over the data it lies between
    the estimate over the n rows and the leave-one-out estimate. The mutual information of the n rows themselves is
    known in one or two dimensions.
    """
    x = np.random.default_rng(seed).standard_normal((n, dim)) * math.sqrt(1 - variance)
    exact = {"population_mutual_information": -0.5 * dim * math.log(variance)}
    return linear(f"channel, d={dim}, n={n}", identity_channel([math.sqrt(variance)] * dim), x, known=exact)


def widened(w: FloatArray, noise: float, stretch: float, shift: float) -> LinearGaussian:
    """Return the linear model p(x|z) = N(W z, s^2 I) with a spherical guide that is wider than the true posterior.

    The guide's mean is 0.9 times the posterior mean plus `shift`.

    Arguments:
        w: W, `(d, D)`.
        noise: s.
        stretch: variance of the guide divided by the largest variance of the posterior in any direction, at least 1.
        shift: constant added to every coordinate of the guide's mean.
    """
    d, q = w.shape
    covariance = np.linalg.inv(np.eye(q) + w.T @ w / noise**2)
    g = 0.9 * covariance @ w.T / noise**2
    wide = np.asarray(stretch * float(np.linalg.eigvalsh(covariance)[-1]) * np.eye(q))
    return LinearGaussian(w, np.zeros(d), noise, g, np.full(q, shift), wide, np.eye(q))
