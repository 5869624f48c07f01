"""Posteriors of latents whose values are known in some rows: a point mass at the value there, unchanged elsewhere."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.distributions.base import Batched, Size
from pvae.distributions.codes import code_grid
from pvae.distributions.exponential_codes import IMPOSSIBLE


def observed(fn: dist.TorchDistribution, value: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
    """Return a posterior with the latent's value where that is known, and the log density that `fn` gives it.

    Arguments:
        fn: the posterior q(z | x): a categorical of one code `(batch,)`, or a distribution of vectors `(batch, D)`.
        value: codes `(batch,)` or vectors `(batch, D)`; NaN in rows where the value is unknown.

    Returns:
        The posterior, a point mass in rows with a known value, whose KL there is -log p(value | parents); and
        log q(value | x) before, nats, `(batch,)`, 0 where the value is unknown.

    Example:
        >>> q, log_q = observed(dist.Categorical(logits=torch.zeros(2, 4)), torch.tensor([3.0, torch.nan]))
        >>> q.probs.tolist(), [round(v, 4) for v in log_q.tolist()]
        ([[0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]], [-1.3863, 0.0])
    """
    known = ~value.isnan()
    value, known = value.nan_to_num(), known.all(-1) if fn.event_shape else known
    if fn.event_shape:
        found: dist.TorchDistribution = PartlyObserved(fn, value, known)
    else:
        hit = value.unsqueeze(-1) == torch.arange(fn.logits.shape[-1], device=value.device)
        found = code_grid(torch.where(known.unsqueeze(-1), torch.where(hit, 0.0, IMPOSSIBLE), fn.logits), 0)
        value = value.long()
    return found, torch.where(known, fn.log_prob(value), 0.0)


class PartlyObserved(Batched):
    """Distribution of vectors with a point mass at `value` in rows where that is known, of log density 0 for any value.

    Arguments:
        base: distribution of the other rows, `(..., D)`.
        value: known values `(..., D)`, of any numbers where they are unknown.
        known: True in rows whose value is known, `(...)`.
    """

    widened = ("base", "value", "known")
    has_rsample = True

    def __init__(self, base: dist.TorchDistribution, value: Tensor, known: Tensor) -> None:
        shape = torch.broadcast_shapes(base.batch_shape, known.shape)
        self.base = base.expand(shape)
        self.value, self.known = value.expand(shape + base.event_shape), known.expand(shape)
        super().__init__(shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> dist.constraints.Constraint:
        """Support of the distribution of the other rows."""
        return self.base.support

    def _chosen(self, value: Tensor) -> Tensor:
        return torch.where(self.known.unsqueeze(-1), self.value, value)

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples, `sample_shape + (..., D)`: the known values, and samples of the others."""
        return self._chosen(self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(..., D)`, nats; 0 in rows whose value is known."""
        return torch.where(self.known, 0.0, self.base.log_prob(value))

    @property
    def mean(self) -> Tensor:
        """Mean, `(..., D)`: the known values, and the means of the others."""
        return self._chosen(self.base.mean)


@torch.distributions.register_kl(PartlyObserved, torch.distributions.Distribution)
def _partly_observed_kl(q: PartlyObserved, p: torch.distributions.Distribution) -> Tensor:
    """Return KL(q || p), nats: -log p of the value where it is known."""
    return torch.where(q.known, -p.log_prob(q.value), torch.distributions.kl_divergence(q.base, p))
