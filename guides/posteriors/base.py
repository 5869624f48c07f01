"""Posteriors over one latent, `q(z | x, ...)`, and their heads: from features to a distribution's parameters.

Beside their bases these are normals (diagonal, of full rank, top-down in a hierarchy), points, the prior itself, and
Bayes' rule.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
from pydantic import Field, field_validator
from torch import Tensor, nn

from pvae.component import Component, Names, Shape
from pvae.distributions.base import Determined, Event, PlainNormal
from pvae.errors import misdeclared
from pvae.graph.site import OBSERVED, Link, Site, Space, Values
from pvae.nn.codebook import Codebook, Table
from pvae.nn.conv import Pointwise
from pvae.nn.network import MLP, Head, LogVarianceBounds, Network, NetworkModule, NormalHead, lower_factor


class Posterior(Component):
    """Declared posterior q(z | x, ...): variational distribution of one latent in the guide."""

    default: ClassVar[str] = "normal"
    values: ClassVar[Values] = "real"
    """Kind of latents that the posterior supports: real vectors (`dim`), codes, or bits."""
    carries: ClassVar[bool] = False
    """True if the codebook row of a code is sampled at a site of its own, because an index carries no gradient; its
    module then has the methods of `guides.posteriors.nearest.QuantisedModule`."""
    reads_features: ClassVar[bool] = True
    """True if the posterior reads the encoder's features, False if it reads x itself."""
    reads_prior: ClassVar[bool] = False
    """True if the posterior uses the model's p(z | parents); it is then conditioned on those parents too."""
    summed: ClassVar[bool] = False
    """True if the model sums the latent out exactly, so that the guide does not sample it."""
    infers: ClassVar[bool] = True
    """True if the posterior depends on x; False for the guide of a GAN."""
    determines: ClassVar[str | None] = None
    """Kind of the likelihood that this posterior requires, one under which z determines x; None if any will do."""
    given: Names = (OBSERVED,)
    """Names of the variables that the posterior is conditioned on: x and, in a hierarchy, other latents."""

    def sampled(self, space: Space) -> Space:
        """Return the space of the values that the posterior samples: `space`, a relaxation, or one of several codes."""
        return space

    def follows_prior(self, given: tuple[str, ...]) -> bool:
        """Return True if another prior changes this posterior, for a latent whose parents in the model are `given`."""
        return self.reads_prior or self.summed

    def codebook(self, space: Space) -> Table:
        """Return a new module with the table of the embeddings of codes, which the model holds."""
        return Codebook(space.states, space.features[0])

    @abstractmethod
    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return the module that computes the posterior distribution of a latent from its inputs.

        The module is called with the inputs, `name -> (..., *inputs[name])`, and with the features of all covariates
        and latents sampled so far, by name; it returns a distribution of event shape `site.event`.
        """


class PosteriorModule(nn.Module):
    """Base of posterior modules whose Pyro sites carry extra `infer` entries: an estimator, a baseline or penalties."""

    learns_baseline = False
    """True if the baseline of its score-function gradient is predicted by a network."""

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the `infer` dictionary of the latent's Pyro site, for the posterior's inputs; None for the default."""
        return None


class Linked(PosteriorModule):
    """Base of modules of posteriors that read the model of the pair.

    Arguments:
        site: the latent.
        link: access to the model.
        declared: the posterior as declared.
        network: network of the posterior; None if it has none.
    """

    def __init__(self, site: Site, link: Link, declared: Posterior, network: nn.Module | None = None) -> None:
        super().__init__()
        self.site, self.link, self.declared = site, link, declared
        self.network: Any = network


class Amortised(Posterior):
    """Base of posteriors whose parameters a network predicts."""

    network: Network | None = None
    """Network from the encoder's features to the parameters of the posterior; default: one linear map."""

    def head(self, inputs: Mapping[str, Shape], output: Shape) -> NetworkModule:
        """Return the network from the posterior's inputs to its parameters `(..., *output)`.

        The default is one linear map; if features lie on the same grid as the output, one shared by all positions.
        """
        if self.network is not None:
            return self.network.build(inputs, output)
        if len(output) == 3 and any(len(shape) == 3 and shape[1:] == output[1:] for shape in inputs.values()):
            return Pointwise(inputs, output)
        return MLP(hidden=()).build(inputs, output)


def channels_last(h: Tensor, grid: int) -> Tensor:
    """Return a tensor `(..., C, *grid)` as `(..., *grid, C)`, for a grid of `grid` dimensions."""
    return h.movedim(-1 - grid, -1) if grid else h


class NormalPosterior(Amortised):
    """Amortised mean-field normal posterior N(mu(x), diag sigma^2(x)).

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["normal"] = "normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return NormalHead(self.head(inputs, (2 * site.event[0],)), self.log_variance)


def full_rank_normal(parameters: Tensor, dim: int, bounds: tuple[float, float]) -> dist.TorchDistribution:
    """Return N(loc, L L^T) of `dim` coordinates, given its mean, log-variances and unit lower triangle `(..., P)`."""
    loc, log_variance, below = parameters.split([dim, dim, dim * (dim - 1) // 2], -1)
    scale = log_variance.clamp(*bounds).mul(0.5).exp()
    return dist.MultivariateNormal(loc, scale_tril=lower_factor(scale, below), validate_args=False)


class FullRankNormalPosterior(Amortised):
    r"""Normal posterior N(mu(x), L(x) L(x)^T) of full covariance, with L = diag(s) (I + strictly lower triangle).

    References:
        An Introduction to Variational Autoencoders (Kingma, Welling, 2019), https://arxiv.org/abs/1906.02691, 2.5.1
    """

    kind: Literal["full_rank_normal"] = "full_rank_normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    """Bounds of the log-variance of a coordinate given those before it."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        d = site.event[0]
        network = self.head(inputs, (2 * d + d * (d - 1) // 2,))
        return Head(network, partial(full_rank_normal, dim=d, bounds=self.log_variance))


class DeltaPosterior(Amortised):
    """Deterministic posterior z = mu(x) of an autoencoder; it has no density, and its "ELBO" log p(x, z) is no bound.

    With `objective.beta = 0` the loss does not depend on the prior; `refit` then fits a prior to the latents.
    """

    kind: Literal["delta"] = "delta"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return Head(self.head(inputs, site.event), Determined)


TOP_DOWN = "top_down"
"""Name of the features of the prior's network among the inputs of a posterior."""


def normal_of(prior: Any) -> Any:
    """Return the `Normal` inside wrappers such as `Independent`; None if there is none."""
    while prior is not None and not isinstance(prior, dist.Normal):
        prior = getattr(prior, "base_dist", None)
    return prior


def require_normal(site: Site, link: Link) -> None:
    """Check that the prior of a latent is a diagonal normal, whose location and scale the posterior can read.

    Raises:
        DeclarationError: the prior is no diagonal normal, or is made of this very posterior.
    """
    prior = link.model.priors[site.name]
    is_normal = isinstance(prior, NormalHead) or not (site.given or hasattr(prior, "link")) and normal_of(prior({}))
    misdeclared(not is_normal, "guides.posteriors.prior", name=site.name, found=prior)


def without(inputs: Mapping[str, Shape], site: Site, link: Link) -> dict[str, Shape]:
    """Return a posterior's inputs without the latent's parents in the model, which it reads through the prior.

    Raises:
        DeclarationError: no input is left, or a parent is summed out by the model, so that the guide has no sample.
    """
    summed = [above.name for above in link.model.sites if above.summed and above.name in site.given]
    misdeclared(summed, "guides.posteriors.summed", name=site.name, summed=summed)
    read = {name: shape for name, shape in inputs.items() if name not in site.given}
    misdeclared(not read, "guides.posteriors.given", name=site.name, inputs=inputs)
    return read


class LadderModule(nn.Module):
    """Module of the posterior `ladder`: product of a normal given x and the model's normal p(z_l | z_above)."""

    def __init__(self, head: NormalHead, site: Site, link: Link) -> None:
        super().__init__()
        self.head, self.site, self.link = head, site, link

    def forward(self, inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the product of the two normals, given named inputs `(..., *shape)`."""
        upward = self.head(inputs)
        if not self.site.given:
            return upward
        q, prior = normal_of(upward), normal_of(self.link.model.prior(self.site.name, seen))
        precision, prior_precision = q.scale**-2, prior.scale**-2
        total = precision + prior_precision
        return Event(PlainNormal((q.loc * precision + prior.loc * prior_precision) / total, total.rsqrt()), 1)


class LadderPosterior(Amortised):
    r"""Ladder posterior q(z_l | z_above, x) = N(m, s^2), proportional to N(mu(x), sigma^2(x)) p(z_l | z_above).

    With p(z_l | z_above) = N(mu_p, sigma_p^2) precisions add, s^-2 = sigma^-2 + sigma_p^-2, and m is the mean of mu and
    mu_p weighted by them. The top level, without parents, is N(mu(x), sigma^2(x)). Use the encoder `bottom_up`.

    References:
        Ladder Variational Autoencoders (Sonderby et al., 2016), https://arxiv.org/abs/1602.02282
    """

    kind: Literal["ladder"] = "ladder"
    reads_prior: ClassVar[bool] = True
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def follows_prior(self, given: tuple[str, ...]) -> bool:
        """Return True if the latent has parents: at the top level the posterior does not depend on the prior."""
        return bool(given)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        read = without(inputs, site, link)
        if site.given:
            require_normal(site, link)
        return LadderModule(NormalHead(self.head(read, (2 * site.event[0],)), self.log_variance), site, link)


class BidirectionalPosterior(Amortised):
    r"""Residual posterior q(z_l | z_above, x) = N(mu_p + sigma_p d, sigma_p^2 e^2), for a prior N(mu_p, sigma_p^2).

    The prior is p(z_l | z_above). d and log e are computed from the features of x and those of the prior's network:
    guide and model share one top-down pass. The KL is 0 for d = 0, e = 1. Use the encoder `bottom_up`.

    References:
        NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat, Kautz, 2020), https://arxiv.org/abs/2007.03898
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["bidirectional"] = "bidirectional"
    reads_prior: ClassVar[bool] = True
    bound: float = Field(default=6.0, gt=0)
    """Largest absolute value of log e (a clamp)."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        read = without(inputs, site, link)
        require_normal(site, link)
        prior = link.model.priors[site.name]
        if isinstance(prior, NormalHead):
            misdeclared(not prior.network.width, "guides.posteriors.network", name=site.name, found=prior.network)
            read[TOP_DOWN] = (prior.network.width,)
        return BidirectionalModule(site, link, self, self.head(read, (2 * site.event[0],)))


class BidirectionalModule(Linked):
    """Module of the posterior `bidirectional`: shifts and scales the model's normal p(z_l | z_above), given x."""

    declared: BidirectionalPosterior

    def forward(self, inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the shifted and scaled normal, given named inputs `(..., *shape)`."""
        prior = normal_of(self.link.model.prior(self.site.name, seen))
        read, module, bound = dict(inputs), self.link.model.priors[self.site.name], self.declared.bound
        if isinstance(module, NormalHead):
            read[TOP_DOWN] = module.network.features(seen)
        shift, log_scale = self.network(read).chunk(2, -1)
        scale = prior.scale * log_scale.clamp(-bound, bound).exp()
        return Event(PlainNormal(prior.loc + prior.scale * shift, scale), 1)


class UninferredModule(Linked):
    """Module of the posterior `prior`: the model's own p(z | parents)."""

    def forward(self, _inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return p(z | parents), given the features of the covariates and latents sampled so far, by name."""
        return self.link.model.prior(self.site.name, seen)


class PriorPosterior(Posterior):
    """Posterior equal to the prior, q(z | x) = p(z | parents): nothing is inferred from x. For objective `gan` only.

    The guide has no parameters of its own. It makes a model that can only be sampled a Pyro model/guide pair.
    """

    kind: Literal["prior"] = "prior"
    reads_features: ClassVar[bool] = False
    reads_prior: ClassVar[bool] = True
    infers: ClassVar[bool] = False
    given: Names = ()
    """Variables that the posterior is conditioned on: none, since the parents reach it through the model's prior."""

    @field_validator("given")
    @classmethod
    def _given_nothing(cls, given: Names) -> Names:
        if given:
            raise ValueError(f"nothing, because the posterior prior infers nothing; got {list(given)}")
        return given

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return UninferredModule(site, link, self)


class ExactPosterior(Posterior):
    """Exact posterior p(c | x) by Bayes' rule: the model sums over all codes, and the ELBO is log p(x) (exact E-step).

    Its gradient is that of Pyro's `TraceEnum_ELBO`; with the objective `em` both steps are in closed form.
    """

    kind: Literal["exact"] = "exact"
    values: ClassVar[Values] = "index"
    reads_features: ClassVar[bool] = False
    summed: ClassVar[bool] = True

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return an empty module: the guide does not sample this latent."""
        return nn.Identity()
