"""Per-datum refinement of the variational posterior: the guide's normals with a shift and a scale for every row."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, distributions

from pvae.analysis.figures.estimate import text
from pvae.errors import DataError
from pvae.pair import Pair, samples

AnyNormal = distributions.Normal | distributions.MultivariateNormal


def rebuild(site: str, fn: Any, edit: Callable[[Any], dist.TorchDistribution]) -> Any:
    """Return the distribution `fn` of a site with its innermost normal replaced by `edit` of it.

    Raises:
        DataError: there is no normal, or it is transformed by a map that is not a bijection (HalfNormal).
    """
    if isinstance(fn, distributions.LowRankMultivariateNormal):
        fn = dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril)
    if isinstance(fn, AnyNormal):
        return edit(fn)
    if isinstance(fn, distributions.Independent):
        return dist.Independent(rebuild(site, fn.base_dist, edit), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(rebuild(site, fn.base_dist, edit), fn._mask)
    if isinstance(fn, distributions.TransformedDistribution) and all(t.bijective for t in fn.transforms):
        return dist.TransformedDistribution(rebuild(site, fn.base_dist, edit), fn.transforms)
    if isinstance(fn, dist.ExpandedDistribution):
        whole = fn.base_dist.expand(fn.batch_shape)
        if not isinstance(whole, dist.ExpandedDistribution):
            return rebuild(site, whole, edit)
        fn = whole.base_dist
    raise DataError(text("refused.no_normal", site=site, kind=type(fn).__name__))


class Pathwise(dist.TorchDistribution):
    """Distribution that scores its samples under a detached copy: a pathwise gradient without the score term.

    The expected score is zero, so the gradient of the ELBO stays unbiased; its variance vanishes as the distribution
    approaches the posterior.

    References:
        Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Arguments:
        live: distribution to sample from.
        fixed: the same distribution, detached, to score under.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, live: Any, fixed: Any) -> None:
        self.live, self.fixed = live, fixed
        super().__init__(live.batch_shape, live.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.live.support

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:
        return self.live.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.fixed.log_prob(value)


class RefinedNormal:
    """Shift and scale parameters per row that refine the normal posterior of one latent; initially the identity.

    N(m, s^2) becomes N(m + s a, (s exp b)^2), with a the shift and b the log ratio of the scales; N(m, L L^T) becomes
    N(m + L a, (L B)(L B)^T), with B lower triangular with a positive diagonal.

    Arguments:
        base: the guide's normal, for the rows of one batch.
        axis: dimension of the rows among those of the parameters.
    """

    def __init__(self, base: AnyNormal, axis: int) -> None:
        shape = (*base.batch_shape, *base.event_shape)
        self.axis = axis
        self.is_diagonal = isinstance(base, distributions.Normal)
        wide = shape if self.is_diagonal else (*shape, base.event_shape[0])
        self.free = [base.loc.new_zeros(shape), base.loc.new_zeros(wide)]

    def edit(self, base: Any, *, detach: bool = False) -> dist.TorchDistribution:
        """Return `base` with shift and scale applied, with or without gradient with respect to these parameters."""
        shift, ratio = (t.detach() if detach else t for t in self.free)
        if self.is_diagonal:
            return dist.Normal(base.loc + base.scale * shift, base.scale * ratio.exp())
        factor = ratio.tril(-1) + torch.diag_embed(ratio.diagonal(dim1=-2, dim2=-1).exp())
        loc = base.loc + (base.scale_tril @ shift[..., None])[..., 0]
        return dist.MultivariateNormal(loc, scale_tril=base.scale_tril @ factor)


class Refined(Messenger):
    """Pyro handler that replaces the guide's normal posteriors by refined ones, with parameters for every row.

    Arguments:
        members: refined normal of every latent of the guide, for the rows of one batch.
    """

    def __init__(self, members: Mapping[str, RefinedNormal]) -> None:
        super().__init__()
        self.members = members

    @property
    def free(self) -> list[Tensor]:
        """Shift and scale parameters of all latents; every tensor has a dimension for the rows."""
        return [t for member in self.members.values() for t in member.free]

    def _pyro_sample(self, msg: Any) -> None:
        # Model sites have the same names; replay, which acts before an outer handler, has already given them values.
        if msg["name"] in self.members and not msg["done"] and not msg["is_observed"]:
            name, fn, member = msg["name"], msg["fn"], self.members[msg["name"]]
            msg["fn"] = Pathwise(rebuild(name, fn, member.edit), rebuild(name, fn, partial(member.edit, detach=True)))

    def keep(self, rows: Tensor) -> None:
        """Reset the posteriors of all rows to the guide's, except where `rows` `(n,)` is true."""
        for member in self.members.values():
            for t in member.free:
                shape = [1] * t.dim()
                shape[member.axis] = len(rows)
                t.mul_(rows.reshape(shape))


def _keep(found: list[AnyNormal], base: AnyNormal) -> Any:
    """Append a normal distribution to a list, and return it unchanged."""
    found.append(base)
    return base


def refined(pair: Pair, x: Tensor) -> Refined:
    """Return a handler that refines the guide's posteriors of the rows `x`; it initially leaves them unchanged.

    Raises:
        DataError: a latent is not built on a normal.
    """
    sites, members = samples(pair.guide_trace(x)), {}
    unpacked = pair.structure.unpacked
    for name in (name for name in pair.layout.latents if name in sites):  # a batch may lack some
        found: list[AnyNormal] = []
        fn = sites[name]["fn"]
        rebuild(name, fn, partial(_keep, found))
        site = unpacked[name].auxiliary if name in unpacked else name
        members[site] = RefinedNormal(found[0], len(fn.batch_shape) + pair.layout.dim)
    return Refined(members)
