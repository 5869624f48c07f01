"""Test models: model-guide pairs whose ELBO terms, evidence and information are known exactly; and their integrals."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn

from pvae.pair.pair import Pair
from pvae.util import Record, replace

FloatArray = np.typing.NDArray[np.floating[Any]]
EstimatorName = Literal["surgery", "evidence", "prior_evidence", "ais", "bracket", "gap"]

EVIDENCE_SAMPLES = 512
"""Default number of importance samples per datum with which the evidence of a test model is estimated."""
GRID_STEP, GRID_REACH = 0.1, 11.0
"""Step and reach of the trapezoidal rule in standard deviations; for analytic integrands it converges exponentially."""


class Truth(Record, eq=False):
    """Test model: a model-guide pair and data, with their ELBO terms, evidence and information known exactly.

    No exact value comes from an estimator of this package: they are closed forms, sums over all states, or trapezoidal
    sums (error below 1e-9) in NumPy's float64.

    Arguments:
        name: name of the test model, with its parameters.
        pair: model and guide, float64.
        x: data `(n, *event)`, float64.
        exact: exact values, nats per datum, by name: `elbo`, `reconstruction`, `kl`, `mutual_information`,
            `marginal_kl`, `total_correlation`, `coordinate_kl`, `label_information`,
            `population_mutual_information` (under the data distribution), `log_evidence`, `iwae_K`,
            `prior_jensen` (E_p log p(x|z)), `inference_gap`, `approximation_gap`, `amortisation_gap`; for a latent `z2`
            of several also `z2.kl` and so on. Unknown quantities have no key.
        estimators: estimators that should find the exact values. Others may run and yet miss them: the importance
            weights of a guide that is narrower than the posterior may have infinite variance.
        samples: samples per datum for surgery.
        draws: importance samples per datum for evidence.
        labels: class labels `(n,)` that `label_information` refers to.
        log_p: exact log p(x), `(m,)`, of any rows `(m, *event)`, such as simulated data; None if unknown.
    """

    name: str
    pair: Pair
    x: Tensor
    exact: Mapping[str, float]
    estimators: tuple[EstimatorName, ...] = ("surgery",)
    samples: int = 20
    draws: int = EVIDENCE_SAMPLES
    labels: Tensor | None = None
    log_p: Callable[[FloatArray], FloatArray] | None = None

    def mean_log_p(self, x: Tensor) -> float | None:
        """Return the mean of the exact log p(x) over rows `(m, *event)`, nats; None if it is unknown."""
        return None if self.log_p is None else float(self.log_p(x.cpu().double().numpy()).mean())

    def to(self, device: str | torch.device) -> Self:
        """Return the test model with its data on a device; its pair is moved there in place."""
        return replace(self, pair=self.pair.adopt(self.x).to(device), x=self.x.to(device))


class Programs(nn.Module):
    """Base class of a Pyro `model` and `guide` whose constants are float64 buffers, with a single parameter.

    Arguments:
        learned: value of the parameter `learned`, as a pair that can be fitted needs one.
        constants: values of the buffers, by name.
    """

    def __init__(self, learned: Any, **constants: Any) -> None:
        super().__init__()
        self.learned = nn.Parameter(tensor(learned))
        for name, value in constants.items():
            self.register_buffer(name, tensor(value))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def truth(self, name: str, x: np.ndarray, exact: Mapping[str, float], **rest: Any) -> Truth:
        """Return the test model of these programs and the data x; `rest` are further fields of `Truth`.

        Surgery samples so often that the mean over the data is nearly normal, even of squared normals.
        """
        samples = min(200, max(10, 10_000 // len(x)))
        return Truth(name, Pair(self.model, self.guide), tensor(x), exact, **{"samples": samples, **rest})


def tensor(value: Any) -> Tensor:
    """Return numbers as a float64 tensor."""
    return torch.tensor(np.asarray(value, dtype=np.float64))


def mixture_entropy(means: FloatArray, covariance: FloatArray) -> float:
    """Return the differential entropy of 1/n sum_i N(m_i, S) in one or two dimensions, nats, by the trapezoidal rule.

    In coordinates where S is the identity, the density on a grid is one product of matrices.

    Arguments:
        means: m_i, `(n, D)`.
        covariance: S, `(D, D)`.
    """
    factor = np.linalg.cholesky(covariance)
    centres, counts = np.unique(np.linalg.solve(factor, means.T).T, axis=0, return_counts=True)
    first, *second = (_kernel(column) for column in centres.T)
    density = first * (counts / counts.sum()) @ (second[0].T if second else np.ones(len(centres)))
    terms = rel_entr(density, np.ones_like(density))
    return float(np.log(np.diag(factor)).sum() - GRID_STEP**density.ndim * terms.sum())


def _kernel(centres: FloatArray) -> FloatArray:
    """Return the densities of normals with unit variance around centres `(n,)` on a grid, `(points, n)`."""
    grid = np.arange(centres.min() - GRID_REACH, centres.max() + GRID_REACH, GRID_STEP)
    return np.exp(-0.5 * (grid[:, None] - centres) ** 2) / math.sqrt(2 * math.pi)


def normal_nodes(step: float = GRID_STEP / 2) -> tuple[FloatArray, FloatArray]:
    """Return nodes and weights `(points,)` of the trapezoidal rule for expectations under N(0, 1)."""
    nodes = np.arange(-GRID_REACH, GRID_REACH + step / 2, step)
    return nodes, step * norm.pdf(nodes)


def information(means: FloatArray, covariance: FloatArray) -> float:
    """Return the mutual information I[x, z] of n equally likely x_i with z ~ N(m_i, S), nats.

    It is the entropy of the mixture of the n normals minus the entropy of one of them.
    """
    return mixture_entropy(means, covariance) - float(multivariate_normal(cov=covariance).entropy())


def normal_kl(mean: FloatArray, covariance: FloatArray, prior: FloatArray) -> FloatArray:
    """Return KL(N(m_i, S) || N(0, V)) for every mean m_i, nats, `(n,)`."""
    inverse = np.linalg.inv(prior)
    squares = np.einsum("nd,de,ne->n", mean, inverse, mean)
    ratio = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(covariance)[1]
    return np.asarray(0.5 * (np.trace(inverse @ covariance) + squares - len(prior) + ratio))


def coordinates(means: FloatArray, covariance: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Yield for each coordinate of the normals N(m_i, S) its means `(n, 1)` and its variance `(1, 1)`."""
    for axis in range(means.shape[1]):
        yield means[:, [axis]], covariance[axis : axis + 1, axis : axis + 1]


def elbo_figures(reconstruction: float, kl: float, log_p: float, jensen: float) -> dict[str, float]:
    """Return the exact values of a `Truth` that follow from these terms, means over the data, nats.

    Arguments:
        reconstruction: E_q log p(x|z).
        kl: KL(q(z|x) || p(z)).
        log_p: log p(x).
        jensen: E_p log p(x|z).
    """
    others = {"log_evidence": log_p, "prior_jensen": jensen, "inference_gap": log_p - reconstruction + kl}
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl, **others}


def split_kl(kl: float, mutual: float, prefix: str = "") -> dict[str, float]:
    """Return the two parts of a KL, nats: the mutual information of x and z under q, and the marginal KL of q_agg."""
    return {f"{prefix}mutual_information": mutual, f"{prefix}marginal_kl": kl - mutual}


def state_figures(q: FloatArray, p: FloatArray, log_x: FloatArray) -> dict[str, float]:
    """Return the exact values of a `Truth` with one discrete latent, by sums over its states, nats.

    Arguments:
        q: posterior probabilities, `(inputs, states)`; inputs are equally likely.
        p: prior probabilities, `(states,)`.
        log_x: log p(x | state), `(inputs, states)`.
    """
    kl = float(rel_entr(q, p).sum(1).mean())
    log_p = float(np.logaddexp.reduce(log_x + np.log(p), axis=1).mean())
    terms = elbo_figures(float((q * log_x).sum(1).mean()), kl, log_p, float((log_x @ p).mean()))
    return terms | split_kl(kl, float(rel_entr(q, q.mean(0)).sum(1).mean()))
