"""Normalising flows as priors, made of Pyro's transforms: N(0, I) pushed through learned bijections."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import pyro.distributions.transforms as bijections
import torch
from pydantic import Field
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Ints, Shape
from pvae.errors import DeclarationError
from pvae.models.priors import Prior
from pvae.site import Link, Site

Size = torch.Size | list[int] | tuple[int, ...]


class Bijection(nn.Module):
    """One of Pyro's transforms without its caches: value and log determinant come back together.

    A cached tensor would stand for another batch, and forbid copies of the Module.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = T(x) and log|det dy/dx|, `(..., D)` and `(...)`."""
        return self._read(self.transform._call(x))  # type: ignore[operator]

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x = T^-1(y) and log|det dy/dx|."""
        if isinstance(self.transform, bijections.AffineAutoregressive):
            x = solved(self.transform, y)
            return x, self.call(x)[1]
        return self._read(self.transform._inverse(y))  # type: ignore[operator]

    def _read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the transform noted of its determinant; then it forgets."""
        noted = [vars(self.transform).get(name) for name in CACHES]
        log_det = next(found for found in noted if found is not None).sum(-1)
        for module in self.transform.modules():
            for name in CACHES:
                if vars(module).get(name) is not None:
                    setattr(module, name, None)
            if "_cached_x_y" in vars(module):
                vars(module)["_cached_x_y"] = None, None
        return value, log_det


def solved(transform: bijections.AffineAutoregressive, y: Tensor) -> Tensor:
    """x of y = m(x) + s(x) x: every pass makes one more coordinate exact, because m and s read those before it.

    Pyro's own inverse starts from single precision, whatever y is.
    """
    x = torch.zeros_like(y)
    for _ in range(y.shape[-1]):
        mean, log_scale = transform.arn(x)
        clipped = clamp_preserve_gradients(log_scale, transform.log_scale_min_clip, transform.log_scale_max_clip)
        x = (y - mean) * (-clipped).exp()
    return x


CACHES = ("_cached_log_scale", "_cache_log_detJ")


class Flow(dist.TorchDistribution):
    """The density of `FlowModule`, over any batch shape."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, module: FlowModule, batch_shape: Size = ()) -> None:
        self.module = module
        super().__init__(torch.Size(batch_shape), module.loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of `(..., D)`, nats, `(...)`; exact."""
        return self.module.log_prob(value)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Draws `sample_shape + batch_shape + (D,)`."""
        with torch.no_grad():
            return self.module.sample(torch.Size(sample_shape) + self.batch_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Flow:
        """The same density over more batch dimensions."""
        return self if self.batch_shape == tuple(batch_shape) else Flow(self.module, batch_shape)


class FlowModule(nn.Module):
    """Bijections between u ~ N(0, I) and z, coordinates reversed between them.

    Arguments:
        steps: in the order from u to z.
        dim: D.
        inward: whether a step's fast direction leads from z to u.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, steps: list[nn.Module], dim: int, inward: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Bijection(step) for step in steps)
        self.inward = inward
        self.register_buffer("loc", torch.zeros(dim), persistent=False)
        self.register_buffer("scale", torch.ones(dim), persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The flow, with batch shape `()`."""
        return Flow(self)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log N(u; 0, I) + log|det du/dz|, nats."""
        total = torch.zeros_like(z[..., 0])
        for step in reversed(self.steps):
            assert isinstance(step, Bijection)  # noqa: S101 - narrows the type
            z, log_det = step.call(z.flip(-1)) if self.inward else step.invert(z.flip(-1))
            total = total + (log_det if self.inward else -log_det)
        return total + dist.Normal(self.loc, self.scale, validate_args=False).log_prob(z).sum(-1)

    def sample(self, shape: torch.Size) -> Tensor:
        """z of u ~ N(0, I), `shape + (D,)`."""
        z = torch.normal(self.loc.expand(*shape, -1), self.scale.expand(*shape, -1))
        for step in self.steps:
            assert isinstance(step, Bijection)  # noqa: S101 - narrows the type
            z = (step.invert(z) if self.inward else step.call(z))[0].flip(-1)
        return z


def near_identity(transform: nn.Module) -> nn.Module:
    """The transform with small last layers and free parameters: drawn at random, a few fold space into ridges."""
    small: list[Tensor] = []
    for module in transform.modules():
        if isinstance(module, AutoRegressiveNN | DenseNN):
            small += module.layers[-1].parameters()
        if isinstance(module, bijections.Spline):
            small += module.parameters()
    with torch.no_grad():
        for parameter in small:
            parameter.mul_(START)
    return transform


START = 0.1


class FlowPrior(Prior):
    """What flows share: how many bijections, and the networks inside them."""

    inward: ClassVar[bool] = False
    """Whether the fast direction leads from z to u: a fast density and slow draws."""
    layers: int = Field(default=4, gt=0)
    """Number of bijections."""
    hidden: Ints = (64, 64)
    """Hidden widths of the network of each."""

    @abstractmethod
    def bijection(self, dim: int) -> nn.Module:
        """One of Pyro's transforms over `dim` coordinates."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        dim = site.event[0]
        if dim < 2:
            raise DeclarationError(f"latents.{site.name}.dim: expected at least 2 coordinates for a flow; got {dim}.")
        return FlowModule([near_identity(self.bijection(dim)) for _ in range(self.layers)], dim, self.inward)


@final
class RealNVP(FlowPrior):
    """Affine couplings: half of the coordinates shifts and scales the other; fast both ways.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2016), https://arxiv.org/abs/1605.08803
    """

    kind: Literal["realnvp"] = "realnvp"

    def bijection(self, dim: int) -> nn.Module:
        """See `FlowPrior.bijection`."""
        return bijections.affine_coupling(dim, list(self.hidden))


@final
class MAF(FlowPrior):
    """Affine autoregressive from z to u: a fast density; a draw takes as many passes as there are coordinates.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
        https://arxiv.org/abs/1705.07057
    """

    kind: Literal["maf"] = "maf"
    inward: ClassVar[bool] = True

    def bijection(self, dim: int) -> nn.Module:
        """See `FlowPrior.bijection`."""
        return bijections.affine_autoregressive(dim, list(self.hidden))


@final
class IAF(FlowPrior):
    """Affine autoregressive from u to z: fast draws; a density takes as many passes as there are coordinates.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["iaf"] = "iaf"

    def bijection(self, dim: int) -> nn.Module:
        """See `FlowPrior.bijection`."""
        return bijections.affine_autoregressive(dim, list(self.hidden))


@final
class SplineCoupling(FlowPrior):
    """Rational splines in couplings, the identity outside [-bound, bound]; fast both ways.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), https://arxiv.org/abs/1906.04032
    """

    kind: Literal["spline_coupling"] = "spline_coupling"
    bins: int = Field(default=8, gt=1)
    bound: float = Field(default=5.0, gt=0)

    def bijection(self, dim: int) -> nn.Module:
        """See `FlowPrior.bijection`."""
        return bijections.spline_coupling(dim, dim // 2, list(self.hidden), count_bins=self.bins, bound=self.bound)


@final
class SplineAutoregressive(FlowPrior):
    """Rational splines, autoregressive from z to u: a fast density; draws take one pass for each coordinate.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), https://arxiv.org/abs/1906.04032
    """

    kind: Literal["spline_autoregressive"] = "spline_autoregressive"
    inward: ClassVar[bool] = True
    bins: int = Field(default=8, gt=1)
    bound: float = Field(default=5.0, gt=0)

    def bijection(self, dim: int) -> nn.Module:
        """See `FlowPrior.bijection`."""
        transform = bijections.spline_autoregressive(dim, list(self.hidden), count_bins=self.bins, bound=self.bound)
        del transform.arn  # its spline holds the same network: registered twice, it would be saved twice
        return transform
