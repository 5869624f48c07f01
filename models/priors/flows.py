"""Normalising flows made of Pyro's transforms: N(0, I) pushed through learned bijections, as priors and as decoders."""

from abc import abstractmethod
from collections.abc import Mapping
from math import log, prod
from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import pyro.distributions.transforms as bijections
import torch
from pydantic import Field, WithJsonSchema, field_validator
from torch import Tensor, nn

from pvae.component import Ints, Shape
from pvae.distributions import Bijection, Coordinates, near_identity
from pvae.distributions.base import Batched, Size
from pvae.errors import DeclarationError, misdeclared
from pvae.graph.site import Link, Site, Space, Values
from pvae.models.priors.base import Prior
from pvae.nn.network import Network, NetworkModule, flatten


class FlowModule(nn.Module):
    """Normalising flow: bijections from u ~ N(0, I) to z, with the order of coordinates reversed after each.

    Arguments:
        steps: the bijections, in the order from u to z; with parents, Pyro's conditional ones.
        dim: number of coordinates, D.
        inward: True if the fast direction of each bijection is from z to u.
        parents: shapes of the parents' features, which together are the context that the bijections read.
    """

    def __init__(self, steps: list[nn.Module], dim: int, inward: bool, parents: Mapping[str, Shape]) -> None:
        super().__init__()
        self.parents = dict(parents)
        self.steps: Any = nn.ModuleList(Bijection(step) for step in steps)
        self.inward = inward
        self.loc = nn.Buffer(torch.zeros(dim), persistent=False)
        self.scale = nn.Buffer(torch.ones(dim), persistent=False)

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of z, with batch shape `()`, or that of the parents' features."""
        seen = [flatten(given[name], shape) for name, shape in self.parents.items()]
        shape = torch.broadcast_shapes(*(t.shape[:-1] for t in seen))  # of particles, which covariates lack
        return Flow(self, torch.cat([t.expand(*shape, -1) for t in seen], -1) if seen else None)

    def at(self, context: Tensor) -> Any:
        """Return the bijections for a context `(..., C)`; as they are without one."""
        return [step.given(context) for step in self.steps] if self.parents else self.steps

    def push(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """Return z for u, `(..., D)`, given a context `(..., C)` if there are parents: the direction of sampling."""
        for step in self.steps if context is None else self.at(context):
            u = (step.invert(u) if self.inward else step.call(u))[0].flip(-1)
        return u

    def pull(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return u for z, `(..., D)`, and log|det du/dz|, nats, `(...)`: the direction of density evaluation."""
        total = torch.zeros_like(z[..., 0])
        for step in reversed(self.steps if context is None else self.at(context)):
            z, log_det = step.call(z.flip(-1)) if self.inward else step.invert(z.flip(-1))
            total = total + (log_det if self.inward else -log_det)
        return z, total


class Flow(Batched):
    """Distribution p(z) of a normalising flow `FlowModule` for any batch shape, or p(z | context) for each context."""

    support = dist.constraints.real_vector

    def __init__(self, module: FlowModule, context: Tensor | None = None) -> None:
        self.module, self.context = module, context
        self.widened = () if context is None else ("context",)  # type: ignore[misc]
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, module.loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(z) = log N(u; 0, I) + log|det du/dz| of z `(..., D)`, nats, `(...)`; exact."""
        if self.context is not None:
            value = value.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape) + self.event_shape)
        u, log_det = self.module.pull(value, self.context)
        return log_det + dist.Normal(self.module.loc, self.module.scale, validate_args=False).log_prob(u).sum(-1)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples `sample_shape + batch_shape + (D,)`, pushed forward from u ~ N(0, I)."""
        shape, base = torch.Size(sample_shape) + self.batch_shape, self.module
        with torch.no_grad():
            u = torch.normal(base.loc.expand(*shape, -1), base.scale.expand(*shape, -1))
            return base.push(u, self.context)


class RelaxedFlowModule(nn.Module):
    """Flow prior of relaxed codes, over the K - 1 free coordinates of the relaxed one-hot at each position."""

    def __init__(self, flow: FlowModule, event: Shape) -> None:
        super().__init__()
        self.flow = flow
        free = torch.Size((*event[:-1], event[-1] - 1))
        self.steps = [bijections.ReshapeTransform(torch.Size([free.numel()]), free), Coordinates()]

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return a distribution of the logarithms of relaxed one-hots, with batch shape `()`."""
        return dist.TransformedDistribution(self.flow(given), self.steps, validate_args=False)


class FlowPrior(Prior):
    """Base of normalising-flow priors: declares the number of bijections and the widths of their networks.

    p(z | parents) is made of Pyro's conditional transforms, whose networks read the parents' features too.
    """

    values: ClassVar[tuple[Values, ...]] = ("real", "relaxed")
    reads_parents: ClassVar[bool] = True
    inward: ClassVar[bool] = False
    """True if the fast direction of the bijections is from z to u: fast densities and slow samples."""
    masked: ClassVar[bool] = False
    """True if the networks are masked by coordinate: each hidden layer then needs a unit for every coordinate."""
    layers: int = Field(default=4, gt=0, le=1000)
    """Number of bijections."""
    hidden: Ints = Field(default=(64, 64), min_length=1)
    """Hidden widths of the network of each bijection."""

    @abstractmethod
    def bijection(self, dim: int, context: int) -> nn.Module:
        """Return a new bijection over `dim` coordinates, one of Pyro's transforms; a conditional one with a context."""

    def named(self, name: str, dim: int, context: int, **options: Any) -> nn.Module:  # noqa: ANN401
        """Return Pyro's transform of a name, or its conditional counterpart if there is a context."""
        make, sizes = (f"conditional_{name}", (dim, context)) if context else (name, (dim,))
        transform: nn.Module = getattr(bijections, make)(*sizes, list(self.hidden), **options)
        return transform

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """Build the flow; for relaxed codes it acts on the K - 1 free coordinates of every position."""
        relaxed = site.space.values == "relaxed"
        dim = prod(site.event[:-1]) * (site.event[-1] - 1) if relaxed else site.event[0]
        misdeclared(dim < 2, f"latents.{site.name}.dim: expected at least 2 coordinates for a flow; got {dim}.")
        misdeclared(self.masked and min(self.hidden) < dim, "models.priors.narrow", dim=dim, hidden=self.hidden)
        context = sum(prod(shape) for shape in given.values())
        steps = [near_identity(self.bijection(dim, context)) for _ in range(self.layers)]
        flow = FlowModule(steps, dim, self.inward, given)
        return RelaxedFlowModule(flow, site.event) if relaxed else flow


class RealNVP(FlowPrior):
    """RealNVP flow prior of affine couplings: half of the coordinates shifts and scales the other; fast both ways.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2016), https://arxiv.org/abs/1605.08803
    """

    kind: Literal["realnvp"] = "realnvp"

    def bijection(self, dim: int, context: int) -> nn.Module:
        return self.named("affine_coupling", dim, context)


class MAF(FlowPrior):
    """Masked autoregressive flow prior, affine: densities are fast; a sample takes D passes through each bijection.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
        https://arxiv.org/abs/1705.07057
    """

    kind: Literal["maf"] = "maf"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True

    def bijection(self, dim: int, context: int) -> nn.Module:
        return self.named("affine_autoregressive", dim, context)


class IAF(FlowPrior):
    """Inverse autoregressive flow prior, affine: samples are fast; a density takes D passes through each bijection.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["iaf"] = "iaf"
    masked: ClassVar[bool] = True

    def bijection(self, dim: int, context: int) -> nn.Module:
        return self.named("affine_autoregressive", dim, context)


class SplineCoupling(FlowPrior):
    """Neural spline flow prior with couplings: rational splines, the identity outside [-bound, bound]; fast both ways.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), https://arxiv.org/abs/1906.04032
    """

    kind: Literal["spline_coupling"] = "spline_coupling"
    reads_parents: ClassVar[bool] = False  # Pyro has no conditional one
    bins: int = Field(default=8, gt=1)
    bound: float = Field(default=5.0, gt=0)

    def bijection(self, dim: int, context: int) -> nn.Module:
        return bijections.spline_coupling(dim, dim // 2, list(self.hidden), count_bins=self.bins, bound=self.bound)


class SplineAutoregressive(FlowPrior):
    """Autoregressive neural spline flow prior: densities are fast; a sample takes D passes through each bijection.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), https://arxiv.org/abs/1906.04032
    """

    kind: Literal["spline_autoregressive"] = "spline_autoregressive"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True
    bins: int = Field(default=8, gt=1)
    bound: float = Field(default=5.0, gt=0)

    def bijection(self, dim: int, context: int) -> nn.Module:
        transform = self.named("spline_autoregressive", dim, context, count_bins=self.bins, bound=self.bound)
        if not context:
            del transform.arn  # its spline holds the same network: registered twice, it would be saved twice
        return transform


class BlockAutoregressive(FlowPrior):
    """Block neural autoregressive flow prior: one monotone network per coordinate, averaged with the identity.

    The identity gives every real number an inverse. Densities are fast. The inverse, for sampling, has no closed form:
    each of the D coordinates takes, per bijection, 25 bisections (passes) in single precision or 54 in double, and a
    few passes to bracket the root.

    References:
        Block Neural Autoregressive Flow (De Cao, Titov, Aziz, 2019), https://arxiv.org/abs/1904.04676
    """

    kind: Literal["block_autoregressive"] = "block_autoregressive"
    reads_parents: ClassVar[bool] = False  # Pyro has no conditional one
    inward: ClassVar[bool] = True
    hidden: Ints = Field(default=(8, 8), min_length=1)
    """Number of hidden units of each coordinate, for every hidden layer."""

    def bijection(self, dim: int, context: int) -> nn.Module:
        return bijections.block_autoregressive(dim, hidden_factors=list(self.hidden), residual="gated")


class NeuralAutoregressive(FlowPrior):
    """Neural autoregressive flow prior: logits of mixtures of logistic units that depend on the coordinates before.

    Densities are fast. The inverse, for sampling, has no closed form: each of the D coordinates takes, per bijection,
    25 bisections (passes) in single precision or 54 in double, and a few passes to bracket the root.

    References:
        Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville, 2018), https://arxiv.org/abs/1804.00779
    """

    kind: Literal["neural_autoregressive"] = "neural_autoregressive"
    masked: ClassVar[bool] = True
    inward: ClassVar[bool] = True
    units: int = Field(default=16, gt=1)
    """Number of logistic units of each coordinate."""

    def bijection(self, dim: int, context: int) -> nn.Module:
        return self.named("neural_autoregressive", dim, context, width=self.units)


class BijectionModule(NetworkModule):
    """Invertible decoder x = g(z), made of a flow's bijections, with the log determinant of its inverse.

    With an `edge` x = (sigmoid(h) - edge) / (1 - 2 edge) of the flow's output h, a little wider than [0, 1].
    """

    def __init__(self, inputs: Mapping[str, Shape], output: Shape, flow: FlowModule, edge: float | None) -> None:
        super().__init__(inputs, output)
        self.name = next(iter(inputs))
        self.flow, self.edge = flow, edge

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return x = g(z), `(..., *output)`, for z `(..., D)` or of any event shape of D elements."""
        x = self.flow.push(flatten(inputs[self.name], self.inputs[self.name]))
        if self.edge is not None:
            x = (x.sigmoid() - self.edge) / (1 - 2 * self.edge)
        return x.unflatten(-1, self.output)

    def invert(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = g^-1(x), `(..., D)`, and log|det dz/dx|, nats, `(...)`."""
        x = x.flatten(x.dim() - len(self.output))
        outer = torch.zeros_like(x[..., 0])
        if self.edge is not None:
            s = self.edge + (1 - 2 * self.edge) * x
            slope = log(1 - 2 * self.edge) - s.log() - (-s).log1p()
            x, outer = torch.logit(s), slope.sum(-1)
        z, log_det = self.flow.pull(x)
        return z, outer + log_det


FLOW_SCHEMA = WithJsonSchema({"type": ["string", "object"], "description": "A flow: a prior such as realnvp."})
"""JSON schema of the field `flow`, not expanded, because priors contain networks and this network a prior."""


class BijectionNetwork(Network):
    """Invertible decoder made of a flow's bijections; the latent has as many coordinates as x has elements.

    With the likelihood `determined` and the posterior `inverse` the VAE is a normalising flow, with ELBO = log p(x).
    """

    kind: Literal["bijection"] = "bijection"
    flow: Annotated[Prior, FLOW_SCHEMA] = RealNVP(layers=8)
    """Flow that maps z to x: `realnvp`, `maf`, ..."""
    squash: Literal["none", "logit"] = "none"
    """`logit`: x in [0, 1] is a logistic function of the flow's output; `none`: x is the flow's output."""
    edge: float = Field(default=0.01, gt=0, lt=0.5)
    """Margin of `squash = "logit"`: x is mapped to [edge, 1 - edge] before the logit, so that 0 and 1 stay finite."""

    @property
    def support(self) -> dist.constraints.Constraint | None:
        return None if self.squash == "none" else dist.constraints.unit_interval

    @field_validator("flow")
    @classmethod
    def _is_flow(cls, flow: Prior) -> Prior:
        if not isinstance(flow, FlowPrior):
            kinds = ", ".join(k for k, member in Prior.members.items() if issubclass(member, FlowPrior))
            raise ValueError(f"a flow: one of {kinds}; got {flow.kind!r}")
        return flow

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Build the decoder module; the output must have as many elements as the only input."""
        sizes = {name: prod(shape) for name, shape in inputs.items()}
        if output is None or list(sizes.values()) != [prod(output)]:
            raise DeclarationError.of("models.priors.bijection", output=output, size=prod(output or ()), sizes=sizes)
        name, size = next(iter(sizes.items()))
        flow: Any = self.flow.build(Site(name, Space.real(size)), {}, Link())
        return BijectionModule(inputs, output, flow, self.edge if self.squash == "logit" else None)
