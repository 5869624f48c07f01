"""Models whose every figure is known without drawing: what the estimators of this package are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, rel_entr
from scipy.stats import norm
from torch import Tensor, nn

from pvae.pair.pair import Pair

Array = NDArray[np.floating[Any]]
Estimator = Literal["surgery", "evidence", "prior_evidence", "ais", "bracket", "gap"]

DRAWS = 512
"""Importance samples per datum that evidence is asked with, where a truth says nothing else."""
STEP, REACH = 0.1, 11.0
"""Of the trapezoidal rule, in scales of the normals: on analytic integrands it converges faster than any power."""


@final
@dataclass(frozen=True, eq=False)
class Truth:
    """A pair, its data, and figures of the two that are known.

    None of the figures comes from an estimator of this package: they are closed forms, sums over all states, or
    trapezoidal sums (error below 1e-9) in NumPy's float64.

    Arguments:
        name: what it is, with its parameters.
        pair: model and guide, float64.
        x: data `(n, *event)`, float64.
        exact: nats per datum: `elbo`, `reconstruction`, `kl`, `mutual_information`, `marginal_kl`,
            `total_correlation`, `coordinate_kl`, `label_information`, `population_mutual_information`,
            `log_evidence`, `iwae_K`, `prior_jensen`, `inference_gap`, `approximation_gap`, `amortisation_gap`;
            of a level `z2` also `z2.kl` and so on. What is not known has no key.
        estimators: those that should find these figures. Others may apply and yet miss them: importance weights
            of a guide that is narrower than the posterior have no variance.
        samples: draws per datum that suffice for surgery.
        draws: importance samples per datum that suffice for evidence.
        labels: classes `(n,)` behind `label_information`.
        log_p: log p(x) of any rows `(m, *event)`, `(m,)`; for simulated data.
    """

    name: str
    pair: Pair
    x: Tensor
    exact: Mapping[str, float]
    estimators: tuple[Estimator, ...] = ("surgery",)
    samples: int = 20
    draws: int = DRAWS
    labels: Tensor | None = None
    log_p: Callable[[Array], Array] | None = None

    def to(self, device: str | torch.device) -> Truth:
        """The same with pair (in place) and data on a device."""
        return replace(self, pair=self.pair.adopt(self.x).to(device), x=self.x.to(device))


def enough(n: int) -> int:
    """Draws per datum after which the mean over n data is near normal, though single terms are squares of normals."""
    return min(200, max(10, 10_000 // n))


# ---------------------------------------------------------------------- integrals


def mixture_entropy(means: Array, covariance: Array) -> float:
    """Differential entropy of 1/n sum_i N(m_i, S) in one or two dimensions, nats, by the trapezoidal rule.

    In coordinates where S is the identity the density on a grid is one product of matrices.

    Arguments:
        means: `(n, D)`.
        covariance: S, `(D, D)`.
    """
    factor = np.linalg.cholesky(covariance)
    centres, counts = np.unique(np.linalg.solve(factor, means.T).T, axis=0, return_counts=True)
    kernels = [_kernel(column) for column in centres.T]
    operands: list[Any] = [counts / counts.sum(), [9]]
    for axis, kernel in enumerate(kernels):
        operands += [kernel, [axis, 9]]
    density = np.einsum(*operands, [*range(len(kernels))], optimize=True)
    terms = rel_entr(density, np.ones_like(density))
    return float(np.log(np.diag(factor)).sum() - STEP ** len(kernels) * terms.sum())


def _kernel(centres: Array) -> Array:
    """Standard normal densities around centres `(n,)` on a grid, `(points, n)`."""
    grid = np.arange(centres.min() - REACH, centres.max() + REACH, STEP)
    return np.exp(-0.5 * (grid[:, None] - centres) ** 2) / math.sqrt(2 * math.pi)


def normal_nodes(step: float = STEP / 2) -> tuple[Array, Array]:
    """Nodes and weights `(points,)` of an expectation under N(0, 1) by the trapezoidal rule."""
    nodes = np.arange(-REACH, REACH + step / 2, step)
    return nodes, step * norm.pdf(nodes)


def information(means: Array, covariance: Array) -> float:
    """I[x, z] of n equally likely N(m_i, S), nats: the entropy of the mixture less that of a component."""
    return mixture_entropy(means, covariance) - normal_entropy(covariance)


def normal_entropy(covariance: Array) -> float:
    """Differential entropy of N(., S), nats."""
    return 0.5 * float(np.linalg.slogdet(2 * math.pi * math.e * covariance)[1])


def _coordinates(means: Array, covariance: Array) -> Iterator[tuple[Array, Array]]:
    for axis in range(means.shape[1]):
        yield means[:, [axis]], covariance[axis : axis + 1, axis : axis + 1]


def _tensor(value: Any) -> Tensor:
    return torch.tensor(np.asarray(value, dtype=np.float64))


# ---------------------------------------------------------------------- linear and Gaussian, in closed form


@final
@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""p(z) = N(0, V), p(x|z) = N(W z + b, s^2 I), q(z|x) = N(G x + c, S): all expectations in closed form.

    Arguments:
        w: W, `(d, D)`.
        b: `(d,)`.
        noise: s.
        g: G, `(D, d)`.
        c: `(D,)`.
        s: S, `(D, D)`.
        v: V, `(D, D)`.
    """

    w: Array
    b: Array
    noise: float
    g: Array
    c: Array
    s: Array
    v: Array

    @property
    def precision(self) -> Array:
        """Of the true posterior, `(D, D)`."""
        return np.asarray(np.linalg.inv(self.v) + self.w.T @ self.w / self.noise**2)

    @property
    def is_diagonal(self) -> bool:
        """Whether the guide's coordinates are independent."""
        return not np.count_nonzero(self.s - np.diag(np.diag(self.s)))

    def means(self, x: Array) -> Array:
        """Posterior means of the guide, `(n, D)`."""
        return np.asarray(x @ self.g.T + self.c)

    def log_p(self, x: Array) -> Array:
        """log p(x), `(n,)`, nats."""
        covariance = self.w @ self.v @ self.w.T + self.noise**2 * np.eye(len(self.b))
        gap = x - self.b
        squares = np.einsum("nd,nd->n", gap, np.linalg.solve(covariance, gap.T).T)
        return np.asarray(-0.5 * (squares + np.linalg.slogdet(2 * math.pi * covariance)[1]))

    def reconstruction(self, x: Array) -> Array:
        """E_q log p(x|z), `(n,)`, nats."""
        return self._expected(x, self.means(x), self.s)

    def jensen(self, x: Array) -> Array:
        """E_p log p(x|z), `(n,)`, nats."""
        return self._expected(x, np.zeros((len(x), len(self.c))), self.v)

    def _expected(self, x: Array, mean: Array, covariance: Array) -> Array:
        """E log p(x|z) under normals."""
        squares = ((x - self.b - mean @ self.w.T) ** 2).sum(1) + np.trace(self.w @ covariance @ self.w.T)
        return np.asarray(-0.5 * (squares / self.noise**2 + len(self.b) * math.log(2 * math.pi * self.noise**2)))

    def kl(self, x: Array) -> Array:
        """KL(q(z|x) || p(z)), `(n,)`, nats."""
        return _kl(self.means(x), self.s, self.v)

    def approximation(self) -> float:
        """KL of the best member of the guide's family to the posterior, nats: a product matches its precisions."""
        p = self.precision
        return 0.5 * float(np.log(np.diag(p)).sum() - np.linalg.slogdet(p)[1]) if self.is_diagonal else 0.0

    def bounds(self, x: Array) -> dict[str, float]:
        """Figures of the ELBO and of log p(x), means over the data."""
        reconstruction, kl, log_p = (float(f(x).mean()) for f in (self.reconstruction, self.kl, self.log_p))
        return {
            "elbo": reconstruction - kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "log_evidence": log_p,
            "prior_jensen": float(self.jensen(x).mean()),
            "inference_gap": log_p - reconstruction + kl,
            "approximation_gap": self.approximation(),
            "amortisation_gap": log_p - reconstruction + kl - self.approximation(),
        }

    def informations(self, x: Array) -> dict[str, float]:
        """Figures of the aggregated posterior of one or two dimensions; V diagonal."""
        means = self.means(x)
        joint, kl = information(means, self.s), float(self.kl(x).mean())
        out = {"mutual_information": joint, "marginal_kl": kl - joint}
        if len(self.c) > 1:
            entropies = sum(mixture_entropy(*part) for part in _coordinates(means, self.s))
            total = entropies - mixture_entropy(means, self.s)
            out |= {"total_correlation": total, "coordinate_kl": kl - joint - total}
        return out

    def label_information(self, x: Array, labels: NDArray[Any]) -> float:
        """I[y, z] of classes `(n,)`: the entropy of q_agg less the mean one of the classes' own."""
        means = self.means(x)
        parts = [means[labels == label] for label in np.unique(labels)]
        within = sum(len(part) * mixture_entropy(part, self.s) for part in parts) / len(x)
        return mixture_entropy(means, self.s) - within


def _kl(mean: Array, covariance: Array, prior: Array) -> Array:
    """KL(N(m_i, S) || N(0, V)), `(n,)`."""
    inverse = np.linalg.inv(prior)
    squares = np.einsum("nd,de,ne->n", mean, inverse, mean)
    ratio = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(covariance)[1]
    return np.asarray(0.5 * (np.trace(inverse @ covariance) + squares - len(prior) + ratio))


class Linear(nn.Module):
    """A `LinearGaussian` with V = I as Pyro programs."""

    b: Tensor
    noise: Tensor
    g: Tensor
    c: Tensor
    tril: Tensor

    def __init__(self, law: LinearGaussian) -> None:
        super().__init__()
        self.w = nn.Parameter(_tensor(law.w))
        for name in ("b", "noise", "g", "c"):
            self.register_buffer(name, _tensor(getattr(law, name)))
        self.register_buffer("tril", _tensor(np.linalg.cholesky(law.s)))

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.c), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b, self.noise).to_event(1), obs=x)

    def diagonal(self, x: Tensor) -> None:
        """q(z|x) with independent coordinates."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.g.T + self.c, self.tril.diagonal()).to_event(1))

    def full_rank(self, x: Tensor) -> None:
        """q(z|x) with any covariance."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ self.g.T + self.c, scale_tril=self.tril))

    def pair(self, law: LinearGaussian) -> Pair:
        """With the guide that the law's covariance asks for."""
        return Pair(self.model, self.diagonal if law.is_diagonal else self.full_rank)


def linear(
    name: str,
    law: LinearGaussian,
    x: Array,
    labels: NDArray[Any] | None = None,
    known: Mapping[str, float] | None = None,
    **rest: Any,
) -> Truth:
    """Any linear model with a linear guide and V = I; figures of q_agg in at most two dimensions.

    Arguments:
        name: of the truth.
        law: the model and its guide.
        x: `(n, d)`.
        labels: classes `(n,)`.
        known: figures that are found in another way; they go first.
        rest: further fields of the truth.
    """
    exact = law.bounds(x)
    if len(law.c) <= 2:
        exact |= law.informations(x)
        if labels is not None:
            exact["label_information"] = law.label_information(x, labels)
    exact |= dict(known or {})
    classes = None if labels is None else torch.as_tensor(labels)
    fields = {"samples": enough(len(x)), "labels": classes, "log_p": law.log_p, **rest}
    return Truth(name, Linear(law).pair(law), _tensor(x), exact, **fields)


# ---------------------------------------------------------------------- families of the linear model


def probabilistic_pca(x: Array, q: int) -> LinearGaussian:
    r"""The linear VAE at its maximum likelihood, the guide its true posterior.

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


def rotated(law: LinearGaussian, rotation: Array) -> LinearGaussian:
    """The same model and guide in other coordinates z' = R z: the same figures but those of single coordinates."""
    r = rotation
    return replace(law, w=law.w @ r.T, g=r @ law.g, c=r @ law.c, s=r @ law.s @ r.T)


def linear_vae(x: Array, q: int, labels: NDArray[Any] | None = None) -> Truth:
    """The linear VAE of `probabilistic_pca`: all importance weights are equal, so IWAE_K = log p(x) for every K."""
    law = probabilistic_pca(x, q)
    log_p = float(law.log_p(x).mean())
    exact = {f"iwae_{k}": log_p for k in (2, 4, 8)}
    return linear(f"linear VAE, q={q}", law, x, labels, exact, estimators=("surgery", "evidence"), samples=20, draws=16)


def _identity(noises: Sequence[float]) -> LinearGaussian:
    """q(z|x) = N(x, diag(noises)^2), with p(x|z) = N(z, I)."""
    d = len(noises)
    return LinearGaussian(
        np.eye(d), np.zeros(d), 1.0, np.eye(d), np.zeros(d), np.diag(np.square(noises).astype(float)), np.eye(d)
    )


def gaussian_channel(dim: int, variance: float, n: int, seed: int = 0) -> Truth:
    """n means drawn from N(0, (1 - s^2) I), noise s^2 I: under the law of the means I = -dim/2 ln s^2.

    The information of these n means is known in one or two dimensions; the one under their law always, and lies
    between the estimate over the n rows and the leave-one-out one, in expectation over the means.
    """
    x = np.random.default_rng(seed).standard_normal((n, dim)) * math.sqrt(1 - variance)
    exact = {"population_mutual_information": -0.5 * dim * math.log(variance)}
    name = f"channel, d={dim}, n={n}"
    return linear(name, _identity([math.sqrt(variance)] * dim), x, known=exact)


def product_channel(centres: Sequence[Array], noises: Sequence[float]) -> Truth:
    """Every tuple of centres with independent noises: q_agg is a product, so its total correlation is 0.

    Labels are pairs of neighbouring centres of the first coordinate, which alone tells of them.
    """
    grids = np.meshgrid(*centres, indexing="ij")
    x = np.stack(grids, -1).reshape(-1, len(centres))
    parts = [information(c[:, None], np.array([[s * s]])) for c, s in zip(centres, noises, strict=True)]
    law = _identity(noises)
    labels = np.argsort(np.argsort(centres[0])).repeat(len(x) // len(centres[0])) // 2
    kl = float(law.kl(x).mean())
    exact = {"mutual_information": sum(parts), "marginal_kl": kl - sum(parts)}
    if len(centres) > 1:
        exact |= {"total_correlation": 0.0, "coordinate_kl": kl - sum(parts)}
    exact["label_information"] = _first(law).label_information(x[:, :1], labels)
    sizes = " x ".join(str(len(c)) for c in centres)
    return linear(f"product channel, {sizes}", law, x, labels, exact)


def _first(law: LinearGaussian) -> LinearGaussian:
    """The first coordinate of a channel alone."""
    return _identity([math.sqrt(law.s[0, 0])])


def binary_input(a: float, copies: int = 200) -> Truth:
    """Input +-a in unit noise: MI = ln 2 - E ln(1 + exp(-2a(a + eps))), mean KL to N(0, 1) = a^2/2."""
    nodes, weights = normal_nodes()
    mutual = math.log(2) - float(weights @ np.logaddexp(0, -2 * a * (a + nodes)))
    exact = {"kl": a * a / 2, "mutual_information": mutual, "marginal_kl": a * a / 2 - mutual}
    x = np.tile([[a], [-a]], (copies, 1))
    return linear(f"binary input, a={a:g}", _identity([1.0]), x, known=exact)


def disjoint(n: int) -> Truth:
    """Posteriors 20 scales apart: MI = log n."""
    x = np.arange(n)[:, None] - (n - 1) / 2
    exact = {"mutual_information": math.log(n)}
    return linear(f"disjoint, n={n}", _identity([0.05]), x, known=exact)


def blind(x: Array, loc: float = 0.3, scale: float = 0.7) -> Truth:
    """A guide that does not look at x: MI = 0."""
    d = x.shape[1]
    law = replace(_identity([scale] * d), g=np.zeros((d, d)), c=np.full(d, loc))
    exact = {"mutual_information": 0.0, "marginal_kl": float(law.kl(x).mean()), "total_correlation": 0.0}
    return linear(f"blind, d={d}", law, x, known=exact)


def wrong_guide(law: LinearGaussian, x: Array) -> Truth:
    """Any linear model whose guide is wider than the posterior: its importance weights are bounded.

    With one latent coordinate IWAE_2 is known too, by a double integral.
    """
    d, q = law.w.shape
    exact = {"iwae_2": float(iwae_2(law, x).mean())} if q == 1 else {}
    asked: tuple[Estimator, ...] = ("surgery", "evidence", "prior_evidence", "ais", "bracket", "gap")
    return linear(f"wrong guide, {q} in {d}", law, x, known=exact, estimators=asked)


def widened(w: Array, noise: float, stretch: float, shift: float) -> LinearGaussian:
    """The model N(W z, s^2 I) with a round guide, `stretch` times the widest variance of its posterior, off by `shift`.

    Arguments:
        w: W, `(d, D)`.
        noise: s.
        stretch: at least 1.
        shift: of the posterior mean, in every coordinate.
    """
    d, q = w.shape
    covariance = np.linalg.inv(np.eye(q) + w.T @ w / noise**2)
    widest = float(np.linalg.eigvalsh(covariance)[-1])
    g = 0.9 * covariance @ w.T / noise**2
    wide = np.asarray(stretch * widest * np.eye(q))
    return LinearGaussian(w, np.zeros(d), noise, g, np.full(q, shift), wide, np.eye(q))


def iwae_2(law: LinearGaussian, x: Array) -> Array:
    """E log (w_1 + w_2) / 2 of one latent coordinate, `(n,)`, nats."""
    nodes, weights = normal_nodes()
    scale = math.sqrt(law.s[0, 0])
    z = law.means(x) + scale * nodes
    log_q = norm.logpdf(nodes) - math.log(scale)
    log_x = norm.logpdf(x[:, None], law.b + z[..., None] * law.w[:, 0], law.noise).sum(2)
    log_w = norm.logpdf(z) + log_x - log_q
    both = np.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
    return np.asarray(np.einsum("nij,i,j->n", both, weights, weights, optimize=True))


# ---------------------------------------------------------------------- two levels


class Levels(nn.Module):
    """p(z2) p(z1|z2) p(x|z1) and q(z2|x) q(z1|x, z2), linear and Gaussian, as Pyro programs."""

    b: Tensor
    noise: Tensor
    spread: Tensor
    w: Tensor
    link: Tensor
    g: Tensor
    c: Tensor
    scale: Tensor

    def __init__(self, law: LinearGaussian) -> None:
        super().__init__()
        self.slope = nn.Parameter(_tensor(law.v[1, 0]))
        self.register_buffer("spread", _tensor(math.sqrt(law.v[1, 1] - law.v[1, 0] ** 2)))
        for name in ("b", "noise"):
            self.register_buffer(name, _tensor(getattr(law, name)))
        self.register_buffer("w", _tensor(law.w[:, 1]))
        link = law.s[1, 0] / law.s[0, 0]
        self.register_buffer("link", _tensor(link))
        self.register_buffer("g", _tensor([law.g[0], law.g[1] - link * law.g[0]]))
        self.register_buffer("c", _tensor([law.c[0], law.c[1] - link * law.c[0]]))
        self.register_buffer("scale", _tensor(np.sqrt([law.s[0, 0], law.s[1, 1] - link**2 * law.s[0, 0]])))

    def model(self, x: Tensor) -> None:
        """p(x, z1, z2)."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.slope.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.slope * z2, self.spread).to_event(1))
            pyro.sample("x", dist.Normal(z1 * self.w + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z2|x) q(z1|x, z2)."""
        loc = (x @ self.g.T + self.c)[..., None]
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(loc[..., 0, :], self.scale[0]).to_event(1))
            pyro.sample("z1", dist.Normal(loc[..., 1, :] + self.link * z2, self.scale[1]).to_event(1))


def hierarchy(w: Array, slope: float, spread: float, noise: float, stretch: float, n: int, seed: int = 0) -> Truth:
    """z2 ~ N(0, 1), z1 ~ N(slope z2, spread^2), x ~ N(w z1, noise^2 I), all latents scalars; n rows of the model.

    The guide has the posterior's structure, with variances `stretch` times as wide and means a little off; jointly
    it is one normal in (z2, z1), so that every joint figure is that of a linear model with one latent of two
    coordinates.
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
    asked: tuple[Estimator, ...] = ("surgery", "evidence", "prior_evidence", "ais", "bracket")
    programs = Levels(law)
    pair = Pair(programs.model, programs.guide)
    return Truth(f"two levels, n={n}", pair, _tensor(x), exact, asked, enough(n), log_p=law.log_p)


def _of_levels(law: LinearGaussian, x: Array) -> dict[str, float]:
    """Figures of both levels together, and of the upper one alone."""
    (means, covariance), _ = _coordinates(law.means(x), law.s)
    kl, upper = (float(_kl(*part).mean()) for part in ((law.means(x), law.s, law.v), (means, covariance, np.eye(1))))
    joint, own = information(law.means(x), law.s), information(means, covariance)
    return {
        "mutual_information": joint,
        "marginal_kl": kl - joint,
        "z2.kl": upper,
        "z2.mutual_information": own,
        "z2.marginal_kl": upper - own,
        "z1.kl": kl - upper,
    }


# ---------------------------------------------------------------------- codes


class Code(nn.Module):
    """q(c | x = i) = table[i], a factorised prior and x = sum of the positions + noise, as Pyro programs."""

    log_q: Tensor
    log_p: Tensor

    def __init__(self, table: Array, prior: Array) -> None:
        super().__init__()
        self.gain = nn.Parameter(_tensor(1.0))
        # Categorical wants finite logits
        self.register_buffer("log_q", _tensor(np.log(np.maximum(table, 1e-300))))
        self.register_buffer("log_p", _tensor(np.log(prior)))

    def model(self, x: Tensor) -> None:
        """p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.log_p).to_event(1))
            pyro.sample("x", dist.Normal(self.gain * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(c|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.log_q[x[:, 0].long()]).to_event(1))


def code(name: str, table: Array, prior: Array, copies: int = 40) -> Truth:
    """Any table of independent positions, by the sum over every joint state.

    Evidence is asked of it where the variance of its importance weights, known by the same sum, is small enough.

    Arguments:
        name: of the truth.
        table: q(c_p | x = i), `(inputs, P, K)`; inputs are equally likely.
        prior: `(P, K)`.
        copies: rows of every input.
    """
    inputs, positions, k = table.shape
    states = np.stack(np.meshgrid(*[np.arange(k)] * positions, indexing="ij"), -1).reshape(-1, positions)
    q, p, alone = (_joint(t, states) for t in (table, prior[None], table.mean(0, keepdims=True)))
    log_x = norm.logpdf(np.arange(inputs)[:, None], states.sum(1), 1.0)
    asked: list[Estimator] = ["surgery", "prior_evidence"]
    if _relative_square(log_x + np.log(p), q) < DRAWS / 20:
        asked.append("evidence")
    exact = _of_code(q, p, alone, log_x) | {"coordinate_kl": float(rel_entr(table.mean(0), prior).sum())}
    programs = Code(table, prior)
    x = np.tile(np.arange(inputs), copies)[:, None]
    return Truth(name, Pair(programs.model, programs.guide), _tensor(x), exact, tuple(asked), enough(len(x)))


def _joint(table: Array, states: NDArray[np.intp]) -> Array:
    """Probabilities `(inputs, states)` of joint states whose positions are independent."""
    return np.asarray(np.prod([table[:, i, column] for i, column in enumerate(states.T)], axis=0))


def _relative_square(log_joint: Array, q: Array) -> float:
    """The largest E_q w^2 / (E_q w)^2 of the inputs; infinite where q misses a state."""
    missed = (q == 0).any(1)
    squares = logsumexp(2 * log_joint - np.log(np.where(q == 0, 1.0, q)), axis=1) - 2 * logsumexp(log_joint, axis=1)
    return float(np.where(missed, math.inf, np.exp(squares)).max())


def _of_code(q: Array, p: Array, alone: Array, log_x: Array) -> dict[str, float]:
    """Figures by the sum over states; `alone` is the product of the pooled positions."""
    reconstruction, kl = float((q * log_x).sum(1).mean()), float(rel_entr(q, p).sum(1).mean())
    return {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "mutual_information": float(rel_entr(q, q.mean(0)).sum(1).mean()),
        "marginal_kl": float(rel_entr(q.mean(0), p[0]).sum()),
        "total_correlation": float(rel_entr(q.mean(0), alone[0]).sum()),
        "log_evidence": float(logsumexp(log_x + np.log(p), axis=1).mean()),
        "prior_jensen": float((p * log_x).sum(1).mean()),
    }


def symmetric_channel(k: int, error: float) -> Truth:
    """One of k symbols, another in its place with probability `error`, under the uniform prior."""
    table = np.full((k, 1, k), error / (k - 1)) + np.eye(k)[:, None] * (1 - error - error / (k - 1))
    return code(f"{k}-ary symmetric, {error:g}", table, np.full((1, k), 1 / k))


def deterministic_code(symbols: NDArray[np.intp], k: int) -> Truth:
    """Input i always has the symbols `symbols[i]`, `(inputs, P)`: MI is the entropy of the inputs' joint code."""
    table = np.eye(k)[symbols]
    positions = symbols.shape[1]
    name = f"deterministic code, {positions} x {k}"
    return code(name, table, np.full((positions, k), 1 / k))


def random_code(inputs: int, positions: int, k: int, seed: int = 0) -> Truth:
    """A random table and a random prior."""
    random = np.random.default_rng(seed)
    even = np.full(k, 2.0)
    table, prior = random.dirichlet(even, (inputs, positions)), random.dirichlet(even, positions)
    return code(f"random code, {positions} x {k}", table, prior)


# ---------------------------------------------------------------------- a site that the model sums out


class Mixture(nn.Module):
    """p(c) p(x | c) with c of the model alone, summed over, as Pyro programs."""

    weights: Tensor
    scale: Tensor

    def __init__(self, weights: Array, means: Array, scale: float) -> None:
        super().__init__()
        self.means = nn.Parameter(_tensor(means))
        self.register_buffer("weights", _tensor(weights))
        self.register_buffer("scale", _tensor(scale))

    def model(self, x: Tensor) -> None:
        """p(x, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.means[c], self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing: p(c|x) comes from Bayes' rule."""


def mixture(weights: Array, means: Array, scale: float, x: Array) -> Truth:
    """A mixture of normals, weights `(K,)` and means `(K, d)`: its posterior is the true one, its ELBO log p(x)."""
    log_x = norm.logpdf(x[:, None], means, scale).sum(2)
    log_p = logsumexp(log_x + np.log(weights), axis=1)
    q = np.exp(log_x + np.log(weights) - log_p[:, None])
    kl = float(rel_entr(q, weights).sum(1).mean())
    exact = {
        "elbo": float(log_p.mean()),
        "reconstruction": float(log_p.mean()) + kl,
        "kl": kl,
        "mutual_information": float(rel_entr(q, q.mean(0)).sum(1).mean()),
        "marginal_kl": float(rel_entr(q.mean(0), weights).sum()),
        "log_evidence": float(log_p.mean()),
        "prior_jensen": float((log_x @ weights).mean()),
    }
    programs = Mixture(weights, means, scale)
    asked: tuple[Estimator, ...] = ("surgery", "evidence", "prior_evidence")
    pair = Pair(programs.model, programs.guide)
    return Truth(f"mixture of {len(weights)}", pair, _tensor(x), exact, asked, enough(len(x)))


class MixturePrior(nn.Module):
    """p(c) p(z | c) p(x | z) with c summed over, z and x scalars, and q(z|x) = N(gain x, scale^2)."""

    weights: Tensor
    spread: Tensor
    noise: Tensor
    gain: Tensor
    scale: Tensor

    def __init__(self, weights: Array, means: Array, spread: float, noise: float, gain: float, scale: float) -> None:
        super().__init__()
        self.means = nn.Parameter(_tensor(means))
        values = {"weights": weights, "spread": spread, "noise": noise, "gain": gain, "scale": scale}
        for name, value in values.items():
            self.register_buffer(name, _tensor(value))

    def model(self, x: Tensor) -> None:
        """p(x, z, c)."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.means[c], self.spread))
            pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gain * x, self.scale))


def mixture_prior(
    weights: Array, means: Array, spread: float, noise: float, x: Array, gain: float, scale: float
) -> Truth:
    """x = z + noise under a mixture of normals N(m_c, spread^2) as the prior; a normal guide N(gain x, scale^2).

    Arguments:
        weights: of the components, `(K,)`.
        means: `(K,)`.
        spread: scale of every component.
        noise: scale of x given z.
        x: `(n,)`.
        gain: of the guide.
        scale: of the guide; above `noise` its importance weights are bounded.
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
    programs = MixturePrior(weights, means, spread, noise, gain, scale)
    asked: tuple[Estimator, ...] = ("surgery", "evidence", "prior_evidence")
    pair = Pair(programs.model, programs.guide)
    return Truth(f"mixture prior of {len(weights)}", pair, _tensor(x), exact, asked, enough(len(x)))


# ---------------------------------------------------------------------- one of each


@dataclass(frozen=True)
class Digits:
    """The data of the linear VAEs."""

    x: Array = field(repr=False)
    labels: NDArray[np.intp] = field(repr=False)

    @classmethod
    def first(cls, n: int | None = 1000) -> Digits:
        """The first n (None: all) of scikit-learn's 8 x 8 digits, in [0, 1]."""
        from sklearn.datasets import load_digits

        found = load_digits()
        return cls(found.data[:n] / 16, found.target[:n])


def standard() -> tuple[Truth, ...]:
    """Members of every family at fixed parameters, on the CPU."""
    digits, random = Digits.first(), np.random.default_rng(0)
    w = np.array([[1.0, 0.7], [0.2, 0.8], [0.5, 0.4], [0.3, -0.2]])
    loading = np.array([[1.0], [-0.6]])
    plane = random.standard_normal((200, 2)) * 1.5
    return (
        linear_vae(digits.x, 2, digits.labels),
        linear_vae(digits.x, 10),
        gaussian_channel(1, 0.25, 50),
        gaussian_channel(2, 0.25, 100),
        gaussian_channel(10, 0.1, 1000),
        product_channel([np.linspace(-1.5, 1.5, 8), np.linspace(-1.2, 1.6, 8) ** 3], [0.4, 0.6]),
        *(binary_input(a) for a in (0.5, 1.0, 2.0)),
        disjoint(100),
        blind(plane),
        symmetric_channel(2, 0.1),
        symmetric_channel(10, 0.1),
        deterministic_code(np.array([[0, 1], [1, 1], [2, 0], [3, 4], [0, 1]]), 5),
        random_code(5, 3, 4),
        wrong_guide(widened(loading, 0.8, 1.4, 0.2), random.standard_normal((20, 2))),
        wrong_guide(widened(w, 0.7, 1.2, 0.2), random.standard_normal((20, 4))),
        mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [1.2, 0.0]]), 0.8, plane),
        mixture_prior(np.array([0.4, 0.6]), np.array([-1.5, 1.0]), 0.6, 0.7, np.linspace(-2.5, 2.5, 200), 0.6, 0.8),
        hierarchy(np.array([0.9, -0.4]), 0.8, 0.6, 0.7, 1.3, 400),
    )
