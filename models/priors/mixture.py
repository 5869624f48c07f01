"""Mixture priors: of learned normals, of the guide's posteriors at pseudo-inputs or training data; a VAE of the latent.

The last, an infinite mixture, is a variational autoencoder of the latent itself, real, codes or bits: a VAE on latents.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions import Batched, FullRankNormals, Members, Mixture, Normals, bits, code_grid, lattice, unwrapped
from pvae.distributions.base import Size
from pvae.distributions.codes import Enumerated
from pvae.errors import DeclarationError, misdeclared
from pvae.graph.lifecycle import Begun, FirstRows, MadeOfData
from pvae.graph.site import Link, Site, Values
from pvae.models.priors.base import Prior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NormalHead, diagonal_normal


class NormalMixtureModule(nn.Module):
    """Module of the mixture prior: learned weights, means and variances of K diagonal normals."""

    def __init__(self, components: int, dim: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(components, dim))
        self.log_variance = nn.Parameter(torch.zeros(components, dim))
        self.logits = nn.Parameter(torch.zeros(components))
        self.bounds = bounds

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the mixture, with batch shape `()`."""
        scale = self.log_variance.clamp(*self.bounds).mul(0.5).exp()
        return Mixture(Normals(self.loc, scale), self.logits.log_softmax(0))


class MixturePrior(Prior):
    """Mixture-of-normals prior sum_k w_k N(m_k, diag s_k^2), with learned weights, means and variances."""

    kind: Literal["mixture"] = "mixture"
    components: int = Field(default=500, gt=0)
    """Number of mixture components, K."""
    log_variance: LogVarianceBounds = (-6.0, 2.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return NormalMixtureModule(self.components, site.event[0], self.log_variance)


class VampModule(Begun):
    """Module of the VampPrior: learned pseudo-inputs, at each of which the guide's posterior is a mixture component.

    For data in [0, 1] pseudo-inputs start at random and are clamped to [0, 1]; for other data they are unconstrained
    and start at training data.
    """

    def __init__(self, components: int, name: str, link: Link) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(components, *link.frame.x))
        self.name, self.link = name, link
        unit = link.support in (dist.constraints.boolean, dist.constraints.unit_interval)
        self.bounded = unit or isinstance(link.support, lattice)

    @torch.no_grad()
    def begin(self, rows: FirstRows) -> None:
        """Initialise unconstrained pseudo-inputs at training data; those beyond the number of data stay random."""
        if not self.bounded:
            x = rows.observed(len(self.pseudo_inputs), stream=3)
            self.pseudo_inputs[: len(x)].copy_(x.nan_to_num(0.0))

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the mixture of posteriors, with batch shape `()`."""
        read = self.pseudo_inputs.clamp(0.0, 1.0) if self.bounded else self.pseudo_inputs
        return Mixture(posteriors_at(read, self.name, self.link))


class VampPrior(Prior):
    r"""VampPrior 1/K sum_k q(z | u_k): mixture of the guide's posteriors at learned pseudo-inputs u_k.

    Its gradient reaches the encoder too. The latent's posterior must depend on x alone. Pseudo-inputs for data in
    [0, 1] start at random and are clamped to it, as published; for other data they start at training rows.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120
    """

    kind: Literal["vamp"] = "vamp"
    reads_guide: ClassVar[bool] = True
    components: int = Field(default=500, gt=0)
    """Number of mixture components, K."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return VampModule(self.components, site.name, link)


class AggregatedPrior(Prior):
    r"""Aggregated posterior 1/n sum_i q(z | x_i) of the training data as prior: the best for their ELBO; overfits most.

    The marginal KL on the training data is 0. With `leave_one_out` the prior of a datum omits its own posterior in
    training. All n rows are encoded at every step unless `components` sets the size of a random subset; as a `refit`
    it has no parameters to learn. The latent's posterior must depend on x alone.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
    """

    kind: Literal["aggregated"] = "aggregated"
    reads_guide: ClassVar[bool] = True
    components: int | None = Field(default=None, gt=1)
    """Number of random training rows that are components in a training step; default: all. Evaluation uses all."""
    leave_one_out: bool = False
    """Omit a datum's own posterior from its prior during training."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return DataMixtureModule(site.name, link, self)


class ExemplarPrior(Prior):
    r"""Exemplar prior 1/M sum_m N(mu(x_m), s^2 I): posterior means of training data, with one learned scale s.

    Each training step takes M random rows and omits a datum's own; evaluation takes all training data. The latent's
    posterior must depend on x alone.

    References:
        Exemplar VAE (Norouzi, Fleet, Norouzi, 2020), https://arxiv.org/abs/2004.04795
    """

    kind: Literal["exemplar"] = "exemplar"
    reads_guide: ClassVar[bool] = True
    components: int = Field(default=1000, gt=1)
    """Number of exemplars M in each training step."""
    leave_one_out: bool = True
    """Omit a datum's own exemplar from its prior during training; otherwise the scale shrinks towards 0."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return ExemplarModule(site.name, link, self)


class DataMixtureModule(MadeOfData):
    """Mixture prior with one component per training row, made of the guide's posterior there by `components_of`.

    `attend` sets the training data. In training a random subset of rows (or all) are components, and with
    `leave_one_out` a datum's own row is omitted from its mixture; `start` gives the rows of the batch. In evaluation
    all rows are components: constants, encoded once, and again after `eval()` or a change of a weight.
    """

    def __init__(self, name: str, link: Link, declared: AggregatedPrior | ExemplarPrior) -> None:
        super().__init__()
        self.name, self.link, self.declared = name, link, declared
        self.rows: Tensor = nn.Buffer(torch.zeros(2, *link.frame.x), persistent=False)
        self.index: Tensor = nn.Buffer(torch.zeros(0, dtype=torch.int64), persistent=False)
        self.count, self.attended = 0, False
        self._kept: tuple[list[int], Normals | FullRankNormals] | None = None

    def attend(self, x: Tensor) -> None:
        """Set the training data `(n, *event)`, at which the posteriors are taken."""
        self.rows = x.detach().to(self.rows)
        self.attended, self._kept = True, None

    def start(self, index: Tensor) -> None:
        """Set the row indices `(batch,)` of the next training batch, in place: a compiled step reads the buffer."""
        if len(self.index) < len(index):
            self.index = index.clone()
        self.count = len(index)
        self.index[: self.count].copy_(index)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, and discard the cached posteriors at the training data."""
        self._kept, self.count = None, 0
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Convert all tensors (type or device), as torch does, and discard the cached posteriors at training data."""
        self._kept = None
        return super()._apply(*arguments, **options)

    def components_of(self, q: Normals | FullRankNormals) -> Members:
        """Return the mixture components for the posteriors `q` at training rows, one for each; here `q` itself."""
        return q

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the mixture, with batch shape `()`."""
        misdeclared(not self.attended and not self.link.building, "models.priors.no_data", name=self.name)
        if not self.training:
            return Mixture(self.components_of(self._kept_encodings()))
        components, x = self.declared.components, self.rows
        if components is None or components >= len(x):
            chosen = torch.arange(len(x), device=x.device)
        else:
            chosen = torch.randperm(len(x), device=x.device)[:components]
            x = x[chosen]
        left_out = self.index[: self.count, None] == chosen if self.declared.leave_one_out and self.count else None
        return Mixture(self.components_of(posteriors_at(x, self.name, self.link)), left_out=left_out)

    def _kept_encodings(self) -> Normals | FullRankNormals:
        """Return the posteriors at all training rows, without gradient, cached until a weight of the guide changes."""
        versions = [p._version for p in self.link.guide.parameters()]
        if self._kept is None or self._kept[0] != versions:
            with torch.no_grad():
                parts = [posteriors_at(x, self.name, self.link) for x in self.rows.split(ENCODED_ROWS)]
            self._kept = versions, parts[0].joined(parts[1:])
        return self._kept[1]


ENCODED_ROWS = 5000
"""Number of training rows that the guide encodes at a time in evaluation."""


class ExemplarModule(DataMixtureModule):
    """Module of the exemplar prior: normals around the posterior means of training rows, with one learned scale."""

    def __init__(self, name: str, link: Link, declared: ExemplarPrior) -> None:
        super().__init__(name, link, declared)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def components_of(self, q: Normals | FullRankNormals) -> Members:
        return Normals(q.loc, self.log_scale.exp().expand_as(q.loc))


def posteriors_at(x: Tensor, name: str, link: Link) -> Normals | FullRankNormals:
    """Return the guide's normal posteriors of a latent at data `(K, *event)` as components of a mixture."""
    fn = unwrapped(link.guide.posterior(name, x))
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return FullRankNormals(fn.loc, fn.scale_tril)
    if isinstance(fn, torch.distributions.Normal):
        return Normals(fn.loc, fn.scale)
    raise DeclarationError.of("models.priors.no_normal", name=name, found=fn)


U = "u"
"""Name of the inner latent among the inputs of the decoder's network."""


class VAEPrior(Prior):
    """Prior p(z) = int p(z | u) N(u; 0, I) du of a VAE over z, with an encoder q(u | z); fitted by `refit` or jointly.

    log p(z) is a lower bound: in training the ELBO of one sample of u, elsewhere that of `samples` importance weights.
    The KL of z and its marginal KL are therefore upper bounds, ELBO and evidence remain lower bounds. The weights are
    unbiased: the mean of exp log p(z) over the draws of u is p(z).

    References:
        Diagnosing and Enhancing VAE Models (Dai, Wipf, 2019), https://arxiv.org/abs/1903.05789
        Importance Weighted Autoencoders (Burda et al., 2015), https://arxiv.org/abs/1509.00519
    """

    kind: Literal["vae"] = "vae"
    values: ClassVar[tuple[Values, ...]] = ("real", "index", "binary")
    dim: int = Field(default=16, gt=0, le=10_000)
    """Number of coordinates of u."""
    encoder: Network = MLP()
    """Network from the features of z to mean and log-variance of q(u | z)."""
    network: Network = MLP()
    """Network from u to the parameters of p(z | u): mean and log-variance, or the logits of every code or bit."""
    samples: int = Field(default=16, gt=0, le=10_000)
    """Number of importance weights of the bound on log p(z), outside training."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return VAEModule(site, self)


class VAEModule(nn.Module):
    """Encoder q(u | z) and decoder p(z | u) of the prior `vae` of a latent z."""

    def __init__(self, site: Site, declared: VAEPrior) -> None:
        super().__init__()
        self.space, self.dim, self.samples = site.space, declared.dim, declared.samples
        self.bounds = declared.log_variance
        per = {"real": 2, "binary": 1}.get(site.space.values, site.space.states)
        # Codes are read as one-hots: the codebook belongs to the model, which may not be trained with the prior.
        seen = (per, *site.space.grid) if site.space.is_code else site.event
        self.encoder = NormalHead(declared.encoder.build({site.name: seen}, (2 * self.dim,)), self.bounds)
        self.decoder = declared.network.build({U: (self.dim,)}, (per * math.prod(site.event),))
        self.name = site.name
        self.zero = nn.Buffer(torch.zeros(self.dim), persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of z, with batch shape `()`."""
        return VAEDensity(self) if self.space.values == "real" else CodesVAEDensity(self)

    def decode(self, u: Tensor) -> dist.TorchDistribution:
        """Return p(z | u) of u `(..., dim)`, of batch shape `(...)`."""
        h = self.decoder({U: u})
        if self.space.values == "real":
            return diagonal_normal(h, self.bounds)
        grid = self.space.grid
        return code_grid(h.unflatten(-1, (*grid, -1)), len(grid)) if self.space.is_code else bits(h)

    @property
    def inner(self) -> dist.TorchDistribution:
        """Standard normal distribution of u, event shape `(dim,)`."""
        return dist.Normal(self.zero, torch.ones_like(self.zero), validate_args=False).to_event(1)


class VAEDensity(Batched):
    """Distribution p(z) of the prior `vae`, for any batch shape; its density is a bound."""

    is_bound = True
    """Marks a distribution whose `log_prob` is a lower bound on the log density, by samples of its own."""

    def __init__(self, module: VAEModule) -> None:
        self.module = module
        super().__init__(torch.Size(), torch.Size(module.space.event), validate_args=False)

    @cached_property
    def support(self) -> dist.constraints.Constraint | None:
        """Support of p(z | u), the same for every u."""
        return self.module.decode(self.module.zero).support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the bound on log p(z) of z `(..., *event)`, nats, `(...)`, by fresh samples of u."""
        module, space = self.module, self.module.space
        lead = torch.broadcast_shapes(value.shape[: value.dim() - len(space.event)], self.batch_shape)
        value = value.expand(lead + self.event_shape)
        q = module.encoder({module.name: space.see(value, module.zero)})
        u = q.rsample(torch.Size([1 if module.training else module.samples]))
        log_w = module.inner.log_prob(u) + module.decode(u).log_prob(value) - q.log_prob(u)
        return log_w.logsumexp(0) - math.log(len(u))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples `sample_shape + batch_shape + event`: u ~ N(0, I), then z ~ p(z | u)."""
        with torch.no_grad():
            u = self.module.inner.sample(torch.Size(sample_shape) + self.batch_shape)
            return self.module.decode(u).sample()


class CodesVAEDensity(Enumerated, VAEDensity):  # type: ignore[override]
    """Distribution p(z) of the prior `vae` over codes or bits, whose joint states can be enumerated if few."""

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values of one element, `(K,)`: the codes 0 .. K - 1, or 0 and 1."""
        states = torch.arange(self.module.space.states, device=self.module.zero.device)
        return states if self.module.space.is_code else states.to(self.module.zero)
