"""Latent class models of joint codes, mixtures of products over positions, fitted by EM; weights of a mixture by EM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 40
"""Number of EM steps of a latent class model."""
ROWS = 4000
"""Largest number of rows that a latent class model is fitted to."""
CLASSES = (2, 4, 8, 16, 32, 64)
"""Numbers of classes that are tried, until one does no better on held-out rows than the one before."""
WEIGHT_STEPS = 200
"""Number of EM steps of the weights of a mixture."""


@dataclass(frozen=True)
class LatentClasses:
    """Mixture of products over positions, r(c) = sum_k w_k prod_p theta_k[p, c_p]."""

    log_weights: Tensor
    """Log weights of the classes, `(C,)`."""
    log_theta: Tensor
    """Log probabilities of the S codes of all positions by class, `(S, C)`."""

    def joint(self, flat: Tensor) -> Tensor:
        """Return log w_k + log theta_k(c) of codes `(m, P)`, given as rows of `log_theta`, `(m, C)`, nats."""
        return self.log_weights + torch.nn.functional.embedding_bag(flat, self.log_theta, mode="sum")

    def log_prob(self, flat: Tensor) -> Tensor:
        """Return the log probability of codes `(m, P)`, given as rows of `log_theta`, `(m,)`, nats."""
        return self.joint(flat).logsumexp(1)


def latent_classes(flat: Tensor, shares: Tensor, classes: int) -> LatentClasses:
    """Return the latent class model of codes fitted by EM, from classes that start at random rows.

    A class takes one pseudo-count at every position, spread as all rows are there.

    Arguments:
        flat: codes of the rows, `(m, P)`: the number of a code among the S codes of all positions.
        shares: proportion of each of these codes at its position, `(S,)`.
        classes: number of classes.
    """
    generator = torch.Generator().manual_seed(0)
    flat = flat[torch.randperm(len(flat), generator=generator)[:ROWS].to(flat.device)]
    near = (flat[:, None] == flat[None, :classes]).double().mean(2)  # rows of a class resemble its first row
    posterior = (flat.shape[1] * near).softmax(1) if classes > 1 else torch.ones_like(near)
    for step in range(STEPS):
        weights = posterior.sum(0) + 1 / classes
        theta = shares.double()[:, None].repeat(1, classes)
        for column in flat.T:
            theta.index_add_(0, column, posterior)
        model = LatentClasses((weights / weights.sum()).log(), (theta / (posterior.sum(0) + 1)).log())
        if step < STEPS - 1:
            posterior = model.joint(flat).softmax(1)
    return model


def mixture_weights(terms: Tensor, prior: Tensor) -> Tensor:
    """Return the log weights of a mixture by EM, `(k,)`, from log densities of its components.

    Arguments:
        terms: log densities under the k components, `(m, k)`, nats.
        prior: pseudo-counts of the components, `(k,)`.
    """
    log_weights = terms.new_zeros(terms.shape[1])
    for _ in range(WEIGHT_STEPS):
        mass = (terms + log_weights).softmax(1).sum(0) + prior
        log_weights = (mass / mass.sum()).log()
    return log_weights
