"""Logarithms of points of the simplex, their free coordinates, and densities over these."""

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
    """Logarithms of points of the simplex, whose sum is 1 to rounding."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Membership of `(..., K)`, `(...)`."""
        return value.logsumexp(-1).abs() < 1e-3


log_simplex = LogSimplex()


def to_coordinates(log_c: Tensor) -> Tensor:
    r"""Logarithms of relaxed one-hots `(..., K)` as K - 1 free numbers u, by breaking a stick.

    u_k = log(c_k / sum_{j>k} c_j) + log(K - k). The volume changes by |dc/du| = prod_{k<=K} c_k, so that a density of u
    is the density of log c in the measure of `RelaxedCodes`: no Jacobian is left.
    """
    k = log_c.shape[-1]
    rest = log_c.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return log_c[..., :-1] - rest + torch.arange(k - 1, 0, -1, device=log_c.device).to(log_c).log()


def from_coordinates(u: Tensor) -> Tensor:
    """The inverse of `to_coordinates`, `(..., K - 1)` to `(..., K)`."""
    k = u.shape[-1] + 1
    shifted = u - torch.arange(k - 1, 0, -1, device=u.device).to(u).log()
    left = pad(logsigmoid(-shifted).cumsum(-1), (1, 0))  # of the stick, before each piece
    return left + pad(logsigmoid(shifted), (0, 1))  # the last piece is all that is left


class Coordinates(Transform):
    """u to log c, as `from_coordinates`; its Jacobian is 1 in the measure in which `RelaxedCodes` has its density."""

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
        """0, `(...)`."""
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: Shape) -> Shape:
        """`(..., K - 1)` to `(..., K)`."""
        return *shape[:-1], shape[-1] + 1

    def inverse_shape(self, shape: Shape) -> Shape:
        """`(..., K)` to `(..., K - 1)`."""
        return *shape[:-1], shape[-1] - 1


@biject_to.register(type(log_simplex))
def _to_log_simplex(_constraint: constraints.Constraint) -> Coordinates:
    return Coordinates()


class FreeCoordinates(dist.TorchDistribution):
    """A density over free coordinates `(..., P (K - 1))` as one of relaxed codes `(..., *grid, K)`.

    Arguments:
        base: over the coordinates of all positions in a row.
        event: `(*grid, K)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, event: Shape) -> None:
        self.base = base
        super().__init__(base.batch_shape, torch.Size(event), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """As that of `RelaxedCodes`."""
        return constraints.independent(log_simplex, len(self.event_shape) - 1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FreeCoordinates:
        """The same density over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return FreeCoordinates(self.base.expand(torch.Size(batch_shape)), tuple(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of log c, nats, `(...)`; exact."""
        return self.base.log_prob(to_coordinates(value).flatten(value.dim() - len(self.event_shape)))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Draws of log c."""
        with torch.no_grad():
            u = self.base.sample(torch.Size(sample_shape))
        return from_coordinates(u.unflatten(-1, (*self.event_shape[:-1], self.event_shape[-1] - 1)))
