"""Test models with exactly known quantities that `pvae selfcheck` runs the estimators on."""

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pvae.analysis.truths import linear, structured
from pvae.analysis.truths.truth import EstimatorName, FloatArray, Truth


def digits(n: int | None = 1000) -> tuple[FloatArray, NDArray[Any]]:
    """Return the first n (None: all) of scikit-learn's 8 x 8 digits in [0, 1], `(n, 64)`, and their labels `(n,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data[:n] / 16, found.target[:n]


def standard() -> tuple[Truth, ...]:
    """Return the test models of `pvae selfcheck`, on the CPU: one member of every family, at fixed parameters.

    Each figure of each estimator that is known exactly for any test model is known for one of these.
    """
    (images, labels), random = digits(), np.random.default_rng(0)
    table, prior = random.dirichlet([2.0] * 4, (5, 3)), random.dirichlet([2.0] * 4, 3)
    w = np.array([[1.0, 0.7], [0.2, 0.8], [0.5, 0.4], [0.3, -0.2]])
    wrong = linear.widened(w, 0.7, 1.2, 0.2), random.standard_normal((20, 4))
    line = np.linspace(-2.5, 2.5, 200)
    return (
        linear.linear_vae(images, 2, labels),
        linear.gaussian_channel(2, 0.25, 100),
        structured.code("random code, 3 x 4", table, prior),
        linear.linear("wrong guide, 2 in 4", *wrong, estimators=get_args(EstimatorName)),
        structured.mixture_prior(np.array([0.4, 0.6]), np.array([-1.5, 1.0]), 0.6, 0.7, line, 0.6, 0.8),
        structured.hierarchy(np.array([0.9, -0.4]), 0.8, 0.6, 0.7, 1.3, 400),
    )
