"""Mixtures of one exponential family as a prior: learned normals, posteriors at pseudo-inputs or at training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.discretized_logistic import lattice
from pvae.distributions.exponential import FullRankNormals, Members, Normals
from pvae.distributions.mixture import Mixture
from pvae.errors import DeclarationError
from pvae.graph.lifecycle import Begun, FirstRows, MadeOfData
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.models.priors.base import Prior
from pvae.nn.heads import LogVarianceBounds


class NormalMixtureModule(nn.Module):
    """Weights, means and variances of K normals."""

    def __init__(self, components: int, dim: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(components, dim))
        self.log_variance = nn.Parameter(torch.zeros(components, dim))
        self.logits = nn.Parameter(torch.zeros(components))
        self.bounds = bounds

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The mixture, with batch shape `()`."""
        scale = self.log_variance.clamp(*self.bounds).mul(0.5).exp()
        return Mixture(Normals(self.loc, scale), self.logits.log_softmax(0))


@final
class MixturePrior(Prior):
    """sum_k w_k N(m_k, diag s_k^2): weights, means and variances are learned."""

    kind: Literal["mixture"] = "mixture"
    components: int = Field(default=500, gt=0)
    """K."""
    log_variance: LogVarianceBounds = (-6.0, 2.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return NormalMixtureModule(self.components, site.event[0], self.log_variance)


class VampModule(Begun):
    """Pseudo-inputs; the guide, reached through the link, gives its posterior at each.

    Where data lie in [0, 1], pseudo-inputs are read no further out, and begin at random; elsewhere they are free, and
    begin at training data.
    """

    def __init__(self, components: int, name: str, link: Link) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(components, *link.x))
        self.name, self.link = name, link
        self.bounded = link.support in (constraints.boolean, constraints.unit_interval) or isinstance(
            link.support, lattice
        )

    @torch.no_grad()
    def begin(self, rows: FirstRows) -> None:
        """Put unbounded pseudo-inputs at data; those beyond the number of data stay at random."""
        if not self.bounded:
            x = rows.observed(len(self.pseudo_inputs), stream=3)
            self.pseudo_inputs[: len(x)].copy_(x.nan_to_num(0.0))

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The mixture of posteriors, with batch shape `()`."""
        read = self.pseudo_inputs.clamp(0.0, 1.0) if self.bounded else self.pseudo_inputs
        return Mixture(as_members(self.link.guide.posterior(self.name, read), self.name))


@final
class VampPrior(Prior):
    r"""1/K sum_k q(z | u_k): the guide's own posterior at learned pseudo-inputs u_k.

    Its gradient reaches the encoder too. The latent's posterior must read x alone. Pseudo-inputs of pixels begin at
    random and stay in [0, 1], as published; of other data they begin at training rows.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120
    """

    kind: Literal["vamp"] = "vamp"
    reads_guide: ClassVar[bool] = True
    components: int = Field(default=500, gt=0)
    """K."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return VampModule(self.components, site.name, link)


class DataMixtureModule(MadeOfData):
    """A mixture over training rows, which `attend` hands in; `components_of` makes them of their posteriors.

    In training a random subset of rows stands for all, and (where asked) a datum's own row is left out of its
    mixture: `start` says which rows the batch holds. In evaluation all rows are components, constants that are
    encoded once, and anew after every `eval()` or change of a weight.
    """

    rows: Tensor
    index: Tensor

    def __init__(self, name: str, link: Link, components: int | None, leave_one_out: bool) -> None:
        super().__init__()
        self.name, self.link = name, link
        self.components, self.leave_one_out = components, leave_one_out
        self.register_buffer("rows", torch.zeros(2, *link.x), persistent=False)
        self.register_buffer("index", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.count = 0
        self.attended = False
        self._kept: tuple[list[int], Members] | None = None

    def attend(self, x: Tensor) -> None:
        """Take the training data `(n, *event)`."""
        self.rows = x.detach().to(self.rows)
        self.attended, self._kept = True, None

    def start(self, index: Tensor) -> None:
        """The training rows of the batch to come, `(batch,)`; filled in place, since a compiled step holds them."""
        if len(self.index) < len(index):
            self.index = index.clone()
        self.count = len(index)
        self.index[: self.count].copy_(index)

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`; what was encoded is forgotten."""
        self._kept, self.count = None, 0
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """See `torch.nn.Module._apply`: what was encoded has another type or device."""
        self._kept = None
        return super()._apply(*arguments, **options)

    def components_of(self, q: Members) -> Members:
        """One component for each posterior."""
        return q

    def _encoded(self, x: Tensor) -> Members:
        """The posteriors at some rows."""
        return as_members(self.link.guide.posterior(self.name, x), self.name)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The mixture, with batch shape `()`."""
        if not self.attended and not self.link.building:
            raise DeclarationError(
                f"latents.{self.name}.prior: expected the training data, of which it is made; got none. "
                f"Call pair.attend(data.train.data)."
            )
        if not self.training:
            return Mixture(self.components_of(self._kept_encodings()))
        if self.components is None or self.components >= len(self.rows):
            chosen, x = torch.arange(len(self.rows), device=self.rows.device), self.rows
        else:
            chosen = torch.randperm(len(self.rows), device=self.rows.device)[: self.components]
            x = self.rows[chosen]
        left_out = None
        if self.leave_one_out and self.count:
            left_out = self.index[: self.count, None] == chosen
        return Mixture(self.components_of(self._encoded(x)), left_out=left_out)

    def _kept_encodings(self) -> Members:
        """The posteriors at all training rows, as constants."""
        versions = [p._version for p in self.link.guide.parameters()]
        if self._kept is None or self._kept[0] != versions:
            with torch.no_grad():
                parts = [self._encoded(x) for x in self.rows.split(ENCODED_ROWS)]
            self._kept = versions, parts[0].joined(parts[1:])
        return self._kept[1]


ENCODED_ROWS = 5000
"""Rows encoded at a time."""


@final
class AggregatedPrior(Prior):
    r"""1/n sum_i q(z | x_i) over the training data: the best prior of their ELBO, and the one that overfits most.

    Its marginal KL on the training data is 0. With `leave_one_out` a datum is scored without its own posterior while
    it trains. All n rows are encoded at every step unless `components` takes a random subset; as a `refit` it has
    nothing to learn. The latent's posterior must read x alone.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
    """

    kind: Literal["aggregated"] = "aggregated"
    reads_guide: ClassVar[bool] = True
    components: int | None = Field(default=None, gt=1)
    """Rows of each training step, at random; all unless said. Evaluation takes all."""
    leave_one_out: bool = False
    """Leave a datum's own posterior out while it trains."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return DataMixtureModule(site.name, link, self.components, self.leave_one_out)


class ExemplarModule(DataMixtureModule):
    """Normals of one learned scale around the encoder's means."""

    def __init__(self, name: str, link: Link, components: int, leave_one_out: bool) -> None:
        super().__init__(name, link, components, leave_one_out)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def components_of(self, q: Members) -> Members:
        assert isinstance(q, Normals | FullRankNormals)  # noqa: S101 - `as_members` makes no others
        return Normals(q.loc, self.log_scale.exp().expand_as(q.loc))


@final
class ExemplarPrior(Prior):
    r"""1/M sum_m N(mu(x_m), s^2 I): the encoder's means of training data, one learned scale s.

    While it trains M rows are drawn at every step and a datum's own is left out; evaluation takes all training data.
    The latent's posterior must read x alone.

    References:
        Exemplar VAE (Norouzi, Fleet, Norouzi, 2020), https://arxiv.org/abs/2004.04795
    """

    kind: Literal["exemplar"] = "exemplar"
    reads_guide: ClassVar[bool] = True
    components: int = Field(default=1000, gt=1)
    """M, exemplars of each training step."""
    leave_one_out: bool = True
    """Leave a datum's own exemplar out while it trains: without, the scale shrinks to nothing."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return ExemplarModule(site.name, link, self.components, self.leave_one_out)


def as_members(fn: Any, name: str) -> Members:
    """The distributions of a batch `(K,)` of a latent as members, differentiable."""
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return FullRankNormals(fn.loc, fn.scale_tril)
    if isinstance(fn, torch.distributions.Normal):
        return Normals(fn.loc, fn.scale)
    raise DeclarationError(
        f"latents.{name}.posterior: expected normal or full_rank_normal, of which its prior makes a mixture; got "
        f"{type(fn).__name__}. Or use the prior mixture."
    )
