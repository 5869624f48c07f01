"""Pyro's flow transforms without caches, with stable log determinants, and inverses in any precision."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions.transforms as bijections
import torch
from pyro.nn import ConditionalAutoRegressiveNN, ConditionalDenseNN
from torch import Tensor, nn

from pvae.errors import NonFiniteError


class Bijection(nn.Module):
    """Wrapper of a Pyro flow transform that returns value and log determinant together, without its cache.

    A cached tensor could belong to another batch, and would prevent deep copies of the Module.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def given(self, context: Tensor) -> "Bijection":
        """Return the bijection that a transform of Pyro's conditional ones is for a context `(..., C)`."""
        return Bijection(self.transform.condition(context))  # type: ignore[operator]

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = T(x), `(..., D)`, and log|det dy/dx|, nats, `(...)`."""
        if isinstance(self.transform, bijections.NeuralAutoregressive):
            return mixed(self.transform, x)
        if isinstance(self.transform, bijections.BlockAutoregressive):
            return gated(self.transform, x)
        return self._read(self.transform._call(x))  # type: ignore[operator]

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x = T^-1(y), `(..., D)`, and log|det dy/dx|, `(...)`; x has no gradient where it is bisected."""
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
        """Return the value with the log determinant that the transform has cached, and clear its caches."""
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
    """Return the solution x of y = m(x) + s(x) x for an affine autoregressive transform, in D passes.

    Each pass makes one more coordinate exact, because m and s depend only on those before it. Pyro's own inverse starts
    in single precision, whatever the type of y.
    """
    x = torch.zeros_like(y)
    for _ in range(y.shape[-1]):
        mean, log_scale = transform.arn(x)
        limits = transform.log_scale_min_clip, transform.log_scale_max_clip
        clipped = bijections.utils.clamp_preserve_gradients(log_scale, *limits)
        x = (y - mean) * (-clipped).exp()
    return x


def mixed(transform: bijections.NeuralAutoregressive, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and log|det dy/dx| of the neural autoregressive flow, y = logit(sum_k w_k sigmoid(a_k x + b_k)).

    The parameters w, a > 0 and b depend on earlier coordinates. In single precision the sum in Pyro's version rounds to
    1 beyond a x + b = 16, so that y is constant there; log-sum-exps of both tails stay accurate.
    """
    slope, logits, shift = transform.arn(x)
    slope, log_weight = nn.functional.softplus(slope) + MIN_SLOPE, logits.log_softmax(-2)
    c = slope * x.unsqueeze(-2) + shift
    below, above = nn.functional.logsigmoid(c), nn.functional.logsigmoid(-c)
    low, high = (log_weight + below).logsumexp(-2), (log_weight + above).logsumexp(-2)
    log_density = (slope.log() + log_weight + below + above).logsumexp(-2)
    return low - high, (log_density - low - high).sum(-1)


def gated(transform: bijections.BlockAutoregressive, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = g x + (1 - g) f(x) and log|det dy/dx| of the block neural autoregressive flow with gate g.

    f_d depends on x_1 .. x_d, is increasing in x_d and bounded. Pyro's own version is NaN where the gate rounds to 1,
    and selects weights by a mask, which CUDA graphs cannot capture.
    """
    h, log_slope = x, torch.zeros_like(x).unsqueeze(-1)  # of the units of each coordinate by x_d, (..., D, units)
    dim, layers = x.shape[-1], list[Any](transform.layers)
    for index, layer in enumerate(layers):
        if index > 0:
            log_slope = log_slope + 2 * (math.log(2) - h - nn.functional.softplus(-2 * h)).unflatten(-1, (dim, -1))
            h = h.tanh()
        weight = layer._weight.exp() * layer.mask_d + layer._weight * layer.mask_o
        norm = weight.norm(dim=-1, keepdim=True)
        h = nn.functional.linear(h, layer._diag_weight.exp() * weight / norm, layer.bias)
        log_weight = layer._diag_weight + layer._weight - norm.log()
        blocks = log_weight.view(dim, len(weight) // dim, dim, -1).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        log_slope = (blocks + log_slope.unsqueeze(-2)).logsumexp(-1)
    kept, changed = nn.functional.logsigmoid(transform.gate), nn.functional.logsigmoid(-transform.gate)
    log_det = torch.logaddexp(kept, changed + log_slope.squeeze(-1)).sum(-1)
    return kept.exp() * x + changed.exp() * h, log_det


MIN_SLOPE = 1e-6
"""Minimum slope of a logistic unit, which keeps the flow invertible."""


def bisected(call: Callable[[Tensor], Tensor], y: Tensor, order: Iterable[int]) -> Tensor:
    """Return the solution x of y = T(x) for a monotone autoregressive transform T, by bisection to float precision.

    One coordinate at a time: a bracket [-2^k, 2^k] is doubled until it contains the root, then halved once for every
    bit; every step is one pass over the batch.

    Arguments:
        call: the transform T, `(..., D)` to `(..., D)`; each coordinate increases in its own x.
        y: values to invert, `(..., D)`.
        order: the coordinates, each after those on which it depends.

    Raises:
        NonFiniteError: no root within 2^MAX_DOUBLINGS of 0: weights or y are not finite, or T is nearly flat.
    """
    x = torch.zeros_like(y)
    halvings = 2 - round(math.log2(torch.finfo(y.dtype).eps))

    def value(d: int, at: Tensor) -> Tensor:
        x[..., d] = at
        return call(x)[..., d]

    with torch.no_grad():
        for d in order:
            high = torch.ones_like(y[..., d])
            for _ in range(MAX_DOUBLINGS):
                inside = (value(d, -high) <= y[..., d]) & (y[..., d] <= value(d, high))
                if inside.all():
                    break
                high = torch.where(inside, high, 2 * high)
            else:
                lost = {"outside": int((~inside).sum()), "size": inside.numel(), "coordinate": d}
                raise NonFiniteError.of("distributions.bijections.no_inverse", most=MAX_DOUBLINGS, **lost)
            low = -high
            for _ in range(halvings):
                middle = low + (high - low) / 2
                below = value(d, middle) < y[..., d]
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            x[..., d] = low + (high - low) / 2
    return x


MAX_DOUBLINGS = 40
"""Largest number of times that a bisection bracket is doubled."""
CACHES = ("_cached_log_scale", "_cache_log_detJ")
"""Names of the attributes in which Pyro's transforms cache their log determinant."""


def near_identity(transform: nn.Module) -> nn.Module:
    """Return the flow transform reinitialised in place near the identity, as random starts may distort space."""
    small: list[Tensor] = []
    for module in transform.modules():
        if isinstance(module, ConditionalAutoRegressiveNN | ConditionalDenseNN):  # and those without a context
            small += module.layers[-1].parameters()
        if isinstance(module, bijections.Spline):
            small += module.parameters()
    with torch.no_grad():
        for parameter in small:
            parameter.mul_(START_SCALE)
        if isinstance(transform, bijections.NeuralAutoregressive | bijections.ConditionalNeuralAutoregressive):
            network: Any = getattr(transform, "arn", None) or transform.nn
            slope, _, shift = network.layers[-1].bias.view(3, network.param_dims[0], -1)
            slope += math.log(math.e - 1)
            shift += spread(network.param_dims[0])[:, None]
        if isinstance(transform, bijections.BlockAutoregressive):
            transform.gate.fill_(math.log(1 / START_SCALE - 1))
            layers = list[Any](transform.layers)
            for layer in layers:
                layer._diag_weight.zero_()  # Pyro's log(uniform) may be -inf
            for layer in layers[:-1]:
                layer.bias.copy_(spread(layer.out_features // layer.dim).repeat(layer.dim))
    return transform


def spread(units: int) -> Tensor:
    """Return initial biases, evenly spread, for the units of one coordinate; equal units would learn alike, slowly."""
    return torch.linspace(-START_SPREAD, START_SPREAD, units + 2)[1:-1]


START_SCALE = 0.1
"""Factor on the initial last-layer weights of a flow transform, and initial 1 - gate of a block neural flow."""
START_SPREAD = 2.5
"""Bound of the initial biases, in absolute value, of the units of one coordinate."""
