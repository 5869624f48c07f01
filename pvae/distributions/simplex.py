"""Log-simplex: logarithms of simplex points, their stick-breaking coordinates, and densities over these."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.nn.functional import logsigmoid, pad

from pvae.component import Shape
from pvae.util.types import Size


class LogSimplex(constraints.Constraint):
    """Constraint of logarithms of simplex points: exponentials sum to 1 within 1e-3."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return whether values `(..., K)` satisfy the constraint, `(...)` booleans."""
        return value.logsumexp(-1).abs() < 1e-3


log_simplex = LogSimplex()


def to_coordinates(log_c: Tensor) -> Tensor:
    r"""Return the K - 1 unconstrained stick-breaking coordinates u of logarithms of relaxed one-hots `(..., K)`.

    u_k = log(c_k / sum_{j>k} c_j) + log(K - k). The volume changes by |dc/du| = prod_{k<=K} c_k, so that a density of u
    equals the density of log c in the measure of `RelaxedCodes`, without a Jacobian factor.
    """
    k = log_c.shape[-1]
    rest = log_c.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return log_c[..., :-1] - rest + torch.arange(k - 1, 0, -1, device=log_c.device).to(log_c).log()


def from_coordinates(u: Tensor) -> Tensor:
    """Return log c `(..., K)` of stick-breaking coordinates u `(..., K - 1)`: the inverse of `to_coordinates`."""
    k = u.shape[-1] + 1
    shifted = u - torch.arange(k - 1, 0, -1, device=u.device).to(u).log()
    left = pad(logsigmoid(-shifted).cumsum(-1), (1, 0))  # of the stick, before each piece
    return left + pad(logsigmoid(shifted), (0, 1))  # the last piece is all that is left


class Coordinates(Transform):
    """Transform from stick-breaking coordinates u to log c; its Jacobian is 1 in the measure of `RelaxedCodes`."""

    domain = constraints.real_vector
    codomain = log_simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coordinates)

    def _call(self, x: Tensor) -> Tensor:
        return from_coordinates(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return to_coordinates(y)

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor) -> Tensor:
        """Return 0, `(...)`: the Jacobian is 1 in the measure of `RelaxedCodes`."""
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: Shape) -> Shape:
        """Return the shape `(..., K)` of log c from the shape `(..., K - 1)` of coordinates."""
        return *shape[:-1], shape[-1] + 1

    def inverse_shape(self, shape: Shape) -> Shape:
        """Return the shape `(..., K - 1)` of coordinates from the shape `(..., K)` of log c."""
        return *shape[:-1], shape[-1] - 1


@biject_to.register(type(log_simplex))
def _to_log_simplex(_constraint: constraints.Constraint) -> Coordinates:
    return Coordinates()


class FreeCoordinates(dist.TorchDistribution):
    """Distribution of relaxed codes `(..., *grid, K)`, given by a density of their coordinates `(..., P (K - 1))`.

    Arguments:
        base: distribution over the stick-breaking coordinates of all P positions, concatenated.
        event: event shape of a value, `(*grid, K)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, event: Shape) -> None:
        self.base = base
        super().__init__(base.batch_shape, torch.Size(event), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Support: logarithms of points of the simplex at every position of the grid."""
        return constraints.independent(log_simplex, len(self.event_shape) - 1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FreeCoordinates:
        """Return this distribution expanded to `batch_shape`."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return FreeCoordinates(self.base.expand(torch.Size(batch_shape)), tuple(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of log c in the measure of `RelaxedCodes`, nats, `(...)`; exact."""
        return self.base.log_prob(to_coordinates(value).flatten(value.dim() - len(self.event_shape)))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples of log c, `sample_shape + (..., *grid, K)`, without gradient."""
        with torch.no_grad():
            u = self.base.sample(torch.Size(sample_shape))
        return from_coordinates(u.unflatten(-1, (*self.event_shape[:-1], self.event_shape[-1] - 1)))
