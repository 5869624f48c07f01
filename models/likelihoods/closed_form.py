"""Closed forms of a maximisation step: what the objective `em` asks of a likelihood."""

from __future__ import annotations

from torch import Tensor

from pvae.models.likelihoods.base import LikelihoodModule


class ClosedForm(LikelihoodModule):
    """A likelihood whose weighted maximum is in closed form: an exponential family of the decoder's output.

    Statistics are float64 sums over data, so that they add up over batches; those of normal families are about
    `origin`, `(prod(x),)`, the mean of the data, against cancellation.
    """

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Sufficient statistics of data `(n, *x)`, `(n, F)`; here x itself."""
        return x.flatten(1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """The decoder's outputs under which weighted data are most likely; sets what the components share.

        Arguments:
            counts: sums of the weights, `(K,)`; none is zero.
            sums: weighted sums of `statistics`, `(K, F)`.
            origin: as in `statistics`.

        Returns:
            One output for each component, flattened, `(K, prod(inputs))`.

        Raises:
            DataError: there is no maximum: a covariance is singular.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Statistics of a component moved to data `(m, *x)`, `(m, F)`: half way from the mean over all data."""
        return (self.statistics(x, origin) + mean) / 2


class NormalForm(ClosedForm):
    """A normal family: its first statistics are x - origin, the others its second moments."""

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Located at `x`, and as spread out as all data are."""
        centre = mean[None, : len(origin)] + origin
        return self.statistics(x, origin) + mean - self.statistics(centre, origin)
