"""Densities of data with missing elements (NaN): the observed ones are scored exactly, and which are missing.

`partly_missing` makes them of any distribution of independent elements, so that a likelihood need not know about NaN.
"""

from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pvae.distributions.base import HALF_LOG_2PI, Event, FactoredNormal, unwrapped
from pvae.errors import DeclarationError


class ObservedElements:
    """Mixin of elementwise distributions: the log density of a missing element (NaN) is 0, and so is its gradient."""

    support: Any

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of every element, nats, `(...)`; exact, 0 for a missing one."""
        missing = value.isnan()
        filled = value.masked_fill(missing, 0.0 if self.support.is_discrete else 0.5)  # of finite density
        return torch.where(missing, 0.0, super().log_prob(filled))  # type: ignore[misc]


class ObservedNormal(FactoredNormal):
    """Multivariate normal whose missing elements (NaN) are integrated out: the marginal density of the others.

    Every row has a covariance of its own, `(..., D, D)`: that of the observed elements, and 1 for each missing one.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.flatten(value.dim() - len(self.event_shape))
        missing = flat.isnan()
        apart = missing.unsqueeze(-1) | missing.unsqueeze(-2)
        gone = missing.to(self.loc)
        covariance = torch.where(apart, 0.0, self.scale_tril @ self.scale_tril.mT) + gone.diag_embed()
        normal = torch.distributions.MultivariateNormal(self.loc, covariance, validate_args=False)
        score = normal.log_prob(torch.where(missing, self.loc, flat)) + HALF_LOG_2PI * gone.sum(-1)
        return score.expand(torch.broadcast_shapes(score.shape, self.batch_shape))


class Absence:
    """Mixin of distributions of rows: the log probability of which elements are missing is added to their density.

    p(x_observed, m | z) = p(x_observed | z) prod_j Bernoulli(m_j), m_j = 1 where element j is missing. Samples are
    complete rows.
    """

    absence: Tensor
    """Logits of the probability of each element to be missing, `(..., *x)`."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the observed elements and of which are missing, nats, `(...)`; exact."""
        score: Tensor = super().log_prob(value)  # type: ignore[misc]
        return score + self.absence_log_prob(value).flatten(-len(self.event_shape)).sum(-1)  # type: ignore[attr-defined]

    def absence_log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of every element to be missing or observed, as it is, nats, `(..., *x)`."""
        return torch.nn.functional.logsigmoid(torch.where(value.isnan(), self.absence, -self.absence))

    def hidden(self, value: Tensor) -> Tensor:
        """Return complete rows with NaN for the elements that are missing in a sample of the mask."""
        return value.masked_fill(torch.rand_like(value) < self.absence.sigmoid(), torch.nan)


@cache
def _mixed(mixin: Any, kind: Any) -> Any:
    """Return the class of a distribution with a mixin before it."""
    return type(kind)(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def _remade(fn: Any, kind: type, **more: Any) -> Any:
    """Return a copy of a distribution as an instance of a subclass, with further attributes."""
    made = copy(fn)
    made.__class__ = kind
    made.__dict__.update(more)
    return made


def partly_missing(fn: Any, absence: Tensor | None = None) -> Any:
    """Return a distribution of rows that takes missing elements (NaN), and scores the observed ones exactly.

    Arguments:
        fn: distribution of complete rows, of independent elements or a `FactoredNormal`; that of a table as it is.
        absence: logits of the probability of each element to be missing, `(..., *x)`, whose log probability is added;
            None where elements are missing at random.

    Raises:
        DeclarationError: the elements are not independent, so that no marginal density is known.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = partly_missing(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> fn.log_prob(torch.tensor([[0.0, torch.nan], [torch.nan, torch.nan]]))
        tensor([-0.9189,  0.0000])
    """
    base, event = unwrapped(fn), fn.event_shape
    if isinstance(fn, FactoredNormal):
        made = _remade(fn, ObservedNormal)
    elif not base.event_shape:
        full = base if base.batch_shape == fn.batch_shape + event else base.expand(fn.batch_shape + event)
        made = Event(_remade(full, _mixed(ObservedElements, full.__class__)), len(event))
    elif has_columns(fn):
        made = fn
    else:
        raise DeclarationError.of("distributions.missing.dependent", kind=type(base).__name__)
    return made if absence is None else _remade(made, _mixed(Absence, made.__class__), absence=absence)


def takes_missing(fn: Any) -> bool:
    """Return True for a distribution of rows that scores missing elements (NaN) as absent."""
    return has_columns(fn) or isinstance(unwrapped(fn), ObservedElements | ObservedNormal)


def has_columns(fn: Any) -> bool:
    """Return True for the distribution of rows of a table, which has another family for each element."""
    return hasattr(unwrapped(fn), "element_log_prob")
