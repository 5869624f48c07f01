"""Test models with exactly known quantities that `pvae selfcheck` runs the estimators on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.analysis.truths import linear, structured
from pvae.analysis.truths.truth import FloatArray, Truth


def digits(n: int | None = 1000) -> tuple[FloatArray, NDArray[Any]]:
    """Return the first n (None: all) of scikit-learn's 8 x 8 digits in [0, 1], `(n, 64)`, and their labels `(n,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data[:n] / 16, found.target[:n]


def standard() -> tuple[Truth, ...]:
    """Return the test models of `pvae selfcheck`, on the CPU: members of every family of models at fixed parameters."""
    (images, labels), random = digits(), np.random.default_rng(0)
    w = np.array([[1.0, 0.7], [0.2, 0.8], [0.5, 0.4], [0.3, -0.2]])
    loading = np.array([[1.0], [-0.6]])
    line = np.linspace(-2.5, 2.5, 200)
    plane = random.standard_normal((200, 2)) * 1.5
    return (
        linear.linear_vae(images, 2, labels),
        linear.linear_vae(images, 10),
        linear.gaussian_channel(1, 0.25, 50),
        linear.gaussian_channel(2, 0.25, 100),
        linear.gaussian_channel(10, 0.1, 1000),
        linear.product_channel([np.linspace(-1.5, 1.5, 8), np.linspace(-1.2, 1.6, 8) ** 3], [0.4, 0.6]),
        *(linear.binary_input(a) for a in (0.5, 1.0, 2.0)),
        linear.disjoint(100),
        linear.blind(plane),
        structured.symmetric_channel(2, 0.1),
        structured.symmetric_channel(10, 0.1),
        structured.deterministic_code(np.array([[0, 1], [1, 1], [2, 0], [3, 4], [0, 1]]), 5),
        structured.random_code(5, 3, 4),
        linear.wrong_guide(linear.widened(loading, 0.8, 1.4, 0.2), random.standard_normal((20, 2))),
        linear.wrong_guide(linear.widened(w, 0.7, 1.2, 0.2), random.standard_normal((20, 4))),
        structured.mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [1.2, 0.0]]), 0.8, plane),
        structured.mixture_prior(np.array([0.4, 0.6]), np.array([-1.5, 1.0]), 0.6, 0.7, line, 0.6, 0.8),
        structured.hierarchy(np.array([0.9, -0.4]), 0.8, 0.6, 0.7, 1.3, 400),
    )
