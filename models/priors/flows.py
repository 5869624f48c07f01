"""Normalising flows as priors, made of Pyro's transforms: N(0, I) pushed through learned bijections."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import pyro.distributions.transforms as bijections
import torch
from pydantic import Field
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import linear, logsigmoid, softplus

from pvae.component import Ints, Shape
from pvae.distributions.codes import FreeCoordinates
from pvae.errors import DeclarationError, NonFiniteError
from pvae.graph.site import Link, Site, Values
from pvae.models.priors.base import Prior
from pvae.util.types import Size


class Bijection(nn.Module):
    """One of Pyro's transforms without its caches: value and log determinant come back together.

    A cached tensor would stand for another batch, and forbid copies of the Module.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = T(x) and log|det dy/dx|, `(..., D)` and `(...)`."""
        if isinstance(self.transform, bijections.NeuralAutoregressive):
            return mixed(self.transform, x)
        if isinstance(self.transform, bijections.BlockAutoregressive):
            return gated(self.transform, x)
        return self._read(self.transform._call(x))  # type: ignore[operator]

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x = T^-1(y) and log|det dy/dx|; found by bisection, x carries no gradient."""
        if isinstance(self.transform, bijections.AffineAutoregressive):
            x = solved(self.transform, y)
        elif isinstance(self.transform, bijections.NeuralAutoregressive):
            x = bisected(lambda v: self.call(v)[0], y, self.transform.arn.get_permutation().tolist())
        elif isinstance(self.transform, bijections.BlockAutoregressive):
            x = bisected(lambda v: self.call(v)[0], y, range(y.shape[-1]))
        else:
            return self._read(self.transform._inverse(y))  # type: ignore[operator]
        return x, self.call(x)[1]

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


def mixed(transform: bijections.NeuralAutoregressive, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = logit(sum_k w_k sigmoid(a_k x + b_k)) and log|det dy/dx|; w, a > 0 and b read earlier coordinates.

    Pyro's own takes the logit of a sum that rounds to 1 beyond a x + b = 16 in single precision, where y then stands
    still; from log-sums of both tails it stays exact.
    """
    slope, logits, shift = transform.arn(x)
    slope, log_weight = softplus(slope) + SLOPE, logits.log_softmax(-2)
    c = slope * x.unsqueeze(-2) + shift
    low, high = (log_weight + logsigmoid(c)).logsumexp(-2), (log_weight + logsigmoid(-c)).logsumexp(-2)
    log_density = (slope.log() + log_weight + logsigmoid(c) + logsigmoid(-c)).logsumexp(-2)
    return low - high, (log_density - low - high).sum(-1)


def gated(transform: bijections.BlockAutoregressive, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = g x + (1 - g) f(x), and log|det dy/dx|; f_d reads x_1 .. x_d, and is increasing in x_d and bounded.

    Pyro's own is NaN where the gate rounds to 1, and picks its weights by a mask, which no CUDA graph can hold.
    """
    h, log_slope = x, torch.zeros_like(x).unsqueeze(-1)  # of the units of each coordinate by x_d, (..., D, units)
    dim, layers = x.shape[-1], list[Any](transform.layers)
    for index, layer in enumerate(layers):
        if index > 0:
            log_slope = log_slope + 2 * (math.log(2) - h - softplus(-2 * h)).unflatten(-1, (dim, -1))
            h = h.tanh()
        weight = layer._weight.exp() * layer.mask_d + layer._weight * layer.mask_o
        norm = weight.norm(dim=-1, keepdim=True)
        h = linear(h, layer._diag_weight.exp() * weight / norm, layer.bias)
        log_weight = layer._diag_weight + layer._weight - norm.log()
        blocks = log_weight.view(dim, len(weight) // dim, dim, -1).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        log_slope = (blocks + log_slope.unsqueeze(-2)).logsumexp(-1)
    kept, changed = logsigmoid(transform.gate), logsigmoid(-transform.gate)
    log_det = torch.logaddexp(kept, changed + log_slope.squeeze(-1)).sum(-1)
    return kept.exp() * x + changed.exp() * h, log_det


SLOPE = 1e-6
"""Least slope of a logistic unit: without one a bijection could become flat."""


def bisected(call: Callable[[Tensor], Tensor], y: Tensor, order: Iterable[int]) -> Tensor:
    """x of y = T(x), each coordinate increasing in its own x and reading only those before it, to float precision.

    Coordinate after coordinate: brackets [-2^k, 2^k] are doubled until they hold the root, then halved once for every
    bit; every step is one pass over the batch.

    Arguments:
        call: T, `(..., D)` to `(..., D)`.
        y: `(..., D)`.
        order: the coordinates, each after those it reads.

    Raises:
        NonFiniteError: no bracket up to 2^DOUBLINGS: weights or y are not finite, or T is nearly flat.
    """
    x = torch.zeros_like(y)
    halvings = 2 - round(math.log2(torch.finfo(y.dtype).eps))

    def value(d: int, at: Tensor) -> Tensor:
        x[..., d] = at
        return call(x)[..., d]

    with torch.no_grad():
        for d in order:
            high = torch.ones_like(y[..., d])
            for _ in range(DOUBLINGS):
                inside = (value(d, -high) <= y[..., d]) & (y[..., d] <= value(d, high))
                if inside.all():
                    break
                high = torch.where(inside, high, 2 * high)
            else:
                raise NonFiniteError(
                    f"Expected a flow that takes every value; got none at {int((~inside).sum())} of {inside.numel()} "
                    f"within 2^{DOUBLINGS} of 0, in coordinate {d}. Look for weights that are not finite, and fit "
                    "again with a lower learning rate or train.clip_norm."
                )
            low = -high
            for _ in range(halvings):
                middle = low + (high - low) / 2
                below = value(d, middle) < y[..., d]
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            x[..., d] = low + (high - low) / 2
    return x


DOUBLINGS = 40
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

    def push(self, u: Tensor) -> Tensor:
        """z of u, in the direction of sampling."""
        for step in self.steps:
            assert isinstance(step, Bijection)  # noqa: S101 - narrows the type
            u = (step.invert(u) if self.inward else step.call(u))[0].flip(-1)
        return u

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u of z, in the direction of scoring, and log|det du/dz|, nats."""
        total = torch.zeros_like(z[..., 0])
        for step in reversed(self.steps):
            assert isinstance(step, Bijection)  # noqa: S101 - narrows the type
            z, log_det = step.call(z.flip(-1)) if self.inward else step.invert(z.flip(-1))
            total = total + (log_det if self.inward else -log_det)
        return z, total

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log N(u; 0, I) + log|det du/dz|, nats."""
        u, log_det = self.pull(z)
        return log_det + dist.Normal(self.loc, self.scale, validate_args=False).log_prob(u).sum(-1)

    def sample(self, shape: torch.Size) -> Tensor:
        """z of u ~ N(0, I), `shape + (D,)`."""
        return self.push(torch.normal(self.loc.expand(*shape, -1), self.scale.expand(*shape, -1)))


class RelaxedFlowModule(nn.Module):
    """A flow over the free coordinates of relaxed codes."""

    def __init__(self, flow: FlowModule, event: Shape) -> None:
        super().__init__()
        self.flow, self.event = flow, event

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """A density of log relaxed one-hots, with batch shape `()`."""
        return FreeCoordinates(self.flow(given), self.event)


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
        if isinstance(transform, bijections.NeuralAutoregressive):
            slope, _, shift = transform.arn.layers[-1].bias.view(3, transform.hidden_units, -1)
            slope += math.log(math.e - 1)
            shift += spread(transform.hidden_units)[:, None]
        if isinstance(transform, bijections.BlockAutoregressive):
            transform.gate.fill_(math.log(1 / START - 1))
            layers = list[Any](transform.layers)
            for layer in layers:
                layer._diag_weight.zero_()  # Pyro's log(uniform) may be -inf
            for layer in layers[:-1]:
                layer.bias.copy_(spread(layer.out_features // layer.dim).repeat(layer.dim))
    return transform


def spread(units: int) -> Tensor:
    """Shifts at the start of the units of one coordinate: around 0 all of them, they would learn alike, and slowly."""
    return torch.linspace(-SPREAD, SPREAD, units + 2)[1:-1]


START = 0.1
SPREAD = 2.5


class FlowPrior(Prior):
    """What flows share: how many bijections, and the networks inside them."""

    values: ClassVar[tuple[Values, ...]] = ("real", "relaxed")
    inward: ClassVar[bool] = False
    """Whether the fast direction leads from z to u: a fast density and slow draws."""
    masked: ClassVar[bool] = False
    """Whether every hidden unit stands for a coordinate: a layer then needs as many at least."""
    layers: int = Field(default=4, gt=0, le=1000)
    """Number of bijections."""
    hidden: Ints = Field(default=(64, 64), min_length=1)
    """Hidden widths of the network of each."""

    @abstractmethod
    def bijection(self, dim: int) -> nn.Module:
        """One of Pyro's transforms over `dim` coordinates."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`; over relaxed codes, of the K - 1 free coordinates of every position."""
        relaxed = site.values == "relaxed"
        dim = prod(site.event[:-1]) * (site.event[-1] - 1) if relaxed else site.event[0]
        if dim < 2:
            raise DeclarationError(f"latents.{site.name}.dim: expected at least 2 coordinates for a flow; got {dim}.")
        if self.masked and min(self.hidden) < dim:
            raise DeclarationError(
                f"hidden: expected layers at least as wide as the {dim} coordinates of the flow; got "
                f"{list(self.hidden)}. Widen them, or use realnvp."
            )
        flow = FlowModule([near_identity(self.bijection(dim)) for _ in range(self.layers)], dim, self.inward)
        return RelaxedFlowModule(flow, site.event) if relaxed else flow


@final
class RealNVP(FlowPrior):
    """Affine couplings: half of the coordinates shifts and scales the other; fast both ways.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2016), https://arxiv.org/abs/1605.08803
    """

    kind: Literal["realnvp"] = "realnvp"

    def bijection(self, dim: int) -> nn.Module:
        return bijections.affine_coupling(dim, list(self.hidden))


@final
class MAF(FlowPrior):
    """Affine autoregressive from z to u: a fast density; a draw takes as many passes as there are coordinates.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
        https://arxiv.org/abs/1705.07057
    """

    kind: Literal["maf"] = "maf"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True

    def bijection(self, dim: int) -> nn.Module:
        return bijections.affine_autoregressive(dim, list(self.hidden))


@final
class IAF(FlowPrior):
    """Affine autoregressive from u to z: fast draws; a density takes as many passes as there are coordinates.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["iaf"] = "iaf"
    masked: ClassVar[bool] = True

    def bijection(self, dim: int) -> nn.Module:
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
        return bijections.spline_coupling(dim, dim // 2, list(self.hidden), count_bins=self.bins, bound=self.bound)


@final
class SplineAutoregressive(FlowPrior):
    """Rational splines, autoregressive from z to u: a fast density; draws take one pass for each coordinate.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), https://arxiv.org/abs/1906.04032
    """

    kind: Literal["spline_autoregressive"] = "spline_autoregressive"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True
    bins: int = Field(default=8, gt=1)
    bound: float = Field(default=5.0, gt=0)

    def bijection(self, dim: int) -> nn.Module:
        transform = bijections.spline_autoregressive(dim, list(self.hidden), count_bins=self.bins, bound=self.bound)
        del transform.arn  # its spline holds the same network: registered twice, it would be saved twice
        return transform


@final
class BlockAutoregressive(FlowPrior):
    """One monotone network for each coordinate, in blocks, gated by the identity so that every value is taken.

    From z to u: a fast density. Its inverse has no closed form: a draw takes D x (bisections) passes through each
    bijection, 25 bisections in single precision and 54 in double, and the doublings of their brackets.

    References:
        Block Neural Autoregressive Flow (De Cao, Titov, Aziz, 2019), https://arxiv.org/abs/1904.04676
    """

    kind: Literal["block_autoregressive"] = "block_autoregressive"
    inward: ClassVar[bool] = True
    hidden: Ints = Field(default=(8, 8), min_length=1)
    """Hidden units of each coordinate, by layer."""

    def bijection(self, dim: int) -> nn.Module:
        return bijections.block_autoregressive(dim, hidden_factors=list(self.hidden), residual="gated")


@final
class NeuralAutoregressive(FlowPrior):
    """The logit of a mixture of logistic units, whose weights, slopes and shifts read the coordinates before.

    From z to u: a fast density. Its inverse has no closed form: a draw takes D x (bisections) passes through each
    bijection, 25 bisections in single precision and 54 in double, and the doublings of their brackets.

    References:
        Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville, 2018), https://arxiv.org/abs/1804.00779
    """

    kind: Literal["neural_autoregressive"] = "neural_autoregressive"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True
    units: int = Field(default=16, gt=1)
    """Logistic units of each coordinate."""

    def bijection(self, dim: int) -> nn.Module:
        return bijections.neural_autoregressive(dim, list(self.hidden), width=self.units)
