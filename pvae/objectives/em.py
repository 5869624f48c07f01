"""Expectation-maximisation of mixtures: exact responsibilities, closed-form maximisation; k-means is its hard limit."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from pvae.errors import DeclarationError, refuse
from pvae.graph.site import OBSERVED, Site, one_hot
from pvae.models.graph import GraphModel
from pvae.models.likelihoods.base import BLOCK_NUMBERS, ClosedForm
from pvae.models.priors.base import WeightsModule
from pvae.nn.network import TableModule
from pvae.objectives import base, elbo
from pvae.pair import Pair, Terms, read_joint_states, samples
from pvae.util import Record, seeds

MIN_COUNT = 1e-8
"""Smallest sum of responsibilities of a component that is not considered empty."""
START_ROWS = 10_000
"""Largest number of rows that k-means++ chooses its centres from."""


class EM(base.Objective):
    """Expectation-maximisation of a mixture: an epoch is one exact iteration, whatever the batch size.

    E-step: q(c | x) = p(c | x), exactly. M-step: prior weights and the decoder's table in closed form, at the end of
    the epoch, from sums over all batches. log p(x) of the training data never falls, unless an empty component is
    moved (or the floor of a `multivariate_normal` is added to its variances). Computed in float64; the optimiser and
    its schedules are not used.

    References:
        Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster, Laird, Rubin, 1977),
        https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
    """

    kind: Literal["em"] = "em"
    fixed: ClassVar[str] = "beta = 1 and free_bits = 0 with em: its steps maximise log p(x) itself; use trace_elbo"
    dtype: ClassVar[torch.dtype | None] = torch.float64
    engine: ClassVar[str | None] = "eager"
    refuses: ClassVar[tuple[str, ...]] = ("average", "alternate", "precision")
    hard: bool = False
    """Hard EM: assign each datum to its most probable code. The quantity that never falls is then log max_c p(x, c),
    the negative `loss`. With a uniform prior and a fixed scale this is k-means.

    References:
        Least squares quantization in PCM (Lloyd, 1982), https://doi.org/10.1109/TIT.1982.1056489
        A classification EM algorithm (Celeux, Govaert, 1992), https://doi.org/10.1016/0167-9473(92)90042-E
    """
    start: Literal["kmeans++", "rows", "weights"] = "kmeans++"
    """Initialisation: each component is fitted to the data nearest to its centre, chosen by k-means++ or, with `rows`,
    at random from the training rows; `weights` starts from the pair's weights as they are.

    References:
        k-means++: The Advantages of Careful Seeding (Arthur, Vassilvitskii, 2007),
        https://theory.stanford.edu/~sergei/papers/kMeansPP-soda.pdf
    """
    empty: Literal["restart", "stop"] = "restart"
    """Treatment of empty components: `restart` moves each to a datum of lowest log p(x), with a weight of 1 datum;
    `stop` raises an error."""

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        return pair.terms(x, rows=rows)

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Return the batch mean of -log p(x), nats per datum, for diagnosis; its gradient is not used."""
        return elbo.minus_elbo(terms, beta)

    def figure(self, epochs: int) -> str:
        return base.FITTED

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        try:
            codes = MixtureParts.of(pair).codes
        except DeclarationError as error:
            return error.problems
        return [] if codes <= rows else [f"codes: expected at most {rows}, one for each training row; got {codes}."]

    def stepper(self, fitting: base.Fitting) -> base.Stepper:
        return EMStepper(self, fitting)


class MixtureParts(Record):
    """Modules of a declared mixture whose parameters the M-step sets."""

    model: GraphModel
    site: Site
    prior: WeightsModule
    table: TableModule
    likelihood: ClosedForm

    @property
    def codes(self) -> int:
        """Number of mixture components, K."""
        return len(self.table.weight)

    @classmethod
    def of(cls, pair: Pair) -> Self:
        """Return the parts of a pair that is a declared mixture.

        Raises:
            DeclarationError: the pair is no mixture of components in closed form.
        """
        model = pair.model
        if isinstance(model, GraphModel) and len(model.sites) == 1 and model.sites[0].summed:
            site, decoder = model.sites[0], model.decoder
            prior, table, likelihood = model.priors[site.name], decoder.network, decoder.likelihood.closed_form()
            if isinstance(prior, WeightsModule) and isinstance(table, TableModule) and likelihood is not None:
                return cls(model, site, prior, table, likelihood)
        raise DeclarationError.of("objectives.em.mixture")


class EMStepper(base.Stepper):
    """EM steps on one data set: each call does the E-step of a batch, the end of an epoch does the M-step.

    Arguments:
        objective: the declared objective.
        fitting: data and settings of the fit.
    """

    def __init__(self, objective: EM, fitting: base.Fitting) -> None:
        self.objective, self.loss, self.names = objective, fitting.loss, fitting.loss.names
        self.mixture = MixtureParts.of(fitting.loss.pair)
        self.data, self.steps, self.seed = fitting.data, fitting.steps, fitting.seed
        self.size = self._rows(slice(0, 1)).numel()
        self.gathered, self.tell = fitting.gathered, fitting.tell
        self.origin = torch.zeros(self.size, dtype=torch.float64, device=self.data.rows.device)
        for x in self._blocks():
            self.origin += x.sum(0) / len(self.data)

    def _blocks(self) -> Iterator[Tensor]:
        """Iterate over the training data `(rows, prod(x))`, float64, in pieces of limited size (`BLOCK_NUMBERS`)."""
        step = max(1, BLOCK_NUMBERS // max(self.mixture.codes, self.size))
        return (self._rows(slice(start, start + step)) for start in range(0, len(self.data), step))

    def _rows(self, index: slice | Tensor) -> Tensor:
        """Return the training data at some row indices, `(m, prod(x))`, float64."""
        return self.data.observed(self.data.rows[index]).flatten(1).double()

    @torch.no_grad()
    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Do the E-step of a batch `(n, *row)`; return metrics whose mean over batches is their mean over data."""
        figures, rows, weights, score = self._inferred(x)
        if bool(figures.isfinite().all()):
            self._gather(rows, weights, score)
        return figures * (len(x) * self.steps / len(self.data))

    @torch.no_grad()
    def sharded(self, batch: base.Parts, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        k, width = self.mixture.codes, self.mixture.likelihood.statistics(self.origin[None], self.origin).shape[1]
        shapes = [(k,), (k, width), (batch.count, k), (batch.count, k, self.size), (len(self.names),)]
        sizes = [math.prod(shape) for shape in shapes]
        pieces = batch.total(partial(self._part, batch.count), sum(sizes)).split(sizes)
        counts, sums, score, rows, figures = (p.view(shape) for p, shape in zip(pieces, shapes, strict=True))
        if bool(figures.isfinite().all()):
            self._add(counts, sums, score.flatten(), rows.flatten(0, 1))
        return figures

    def _part(self, shards: int, x: Tensor, share: float, shard: int) -> Tensor:
        """Return what a shard adds to counts, statistics and metrics, and its rows of lowest score in a place apart."""
        figures, rows, weights, score = self._inferred(x)
        k, own = len(weights), torch.arange(shards, device=x.device) == shard
        lowest, index = torch.cat([score, score.new_full((k,), math.inf)]).topk(k, largest=False)
        slots = torch.where(own[:, None], lowest, 0.0)
        kept = torch.where(own[:, None, None], torch.cat([rows, rows.new_zeros(k, rows.shape[1])])[index], 0.0)
        statistics = self.mixture.likelihood.sums(weights, rows, self.origin)
        figures = figures * (len(x) * self.steps / len(self.data))
        return torch.cat([v.flatten() for v in (weights.sum(1), statistics, slots, kept, figures)])

    def _inferred(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return batch means of the metrics, the data `(n, prod(x))`, responsibilities `(K, n)` and log p(x) `(n,)`."""
        pair = self.loss.pair
        table = read_joint_states(samples(pair.traces(x)[1]), pair.layout, 0)
        log_p = table.log_sum(table.joint)
        best, code = table.joint.max(0)
        hard = self.objective.hard
        weights = one_hot(code, self.mixture.codes, log_p).T if hard else table.weights
        figures = torch.stack([-best if hard else -log_p, table.expected(OBSERVED), *table.kl().values()]).mean(1)
        return figures, self.mixture.model.frame.split(x)[0].flatten(1), weights, log_p

    @torch.no_grad()
    def begin(self) -> None:
        """Fit every component to the data nearest to its initial centre; do nothing if `start` is "weights"."""
        if self.objective.start == "weights":
            return
        centres = self._centres() - self.origin
        for x in self._blocks():
            distance, code = torch.cdist(x - self.origin, centres).min(1)
            self._gather(x, one_hot(code, len(centres), x).T, -distance)
        self.end_epoch()

    def _centres(self) -> Tensor:
        """Return K rows of the training data as initial centres, `(K, prod(x))`."""
        k, n = self.mixture.codes, len(self.data)
        if self.objective.start == "rows":
            return self._rows(seeds.subset(n, k, self.seed).to(self.origin.device))
        from sklearn.cluster import kmeans_plusplus  # here, because it takes a second to import

        rows = self._rows(seeds.subset(n, max(k, START_ROWS), self.seed).to(self.origin.device))
        centres, _ = kmeans_plusplus(rows.cpu().numpy(), k, random_state=self.seed)
        return torch.from_numpy(centres).to(rows)

    # -------------------------------------------------------------- sums

    def _gather(self, x: Tensor, weights: Tensor, score: Tensor) -> None:
        """Add the statistics of data `(n, prod(x))` with responsibilities `(K, n)`; keep the K of lowest `score`."""
        self._add(weights.sum(1), self.mixture.likelihood.sums(weights, x, self.origin), score, x)

    def _add(self, counts: Tensor, statistics: Tensor, score: Tensor, rows: Tensor) -> None:
        """Add the sums of a batch to those of the epoch, and keep the K rows of lowest score."""
        if not self.gathered:
            self.gathered |= {"counts": torch.zeros_like(counts), "statistics": torch.zeros_like(statistics)}
            self.gathered["lowest"] = score.new_full((len(counts),), math.inf)
            self.gathered["rows"] = rows.new_zeros(len(counts), rows.shape[1])
        self.gathered["counts"] += counts
        self.gathered["statistics"] += statistics
        scores, rows = torch.cat([self.gathered["lowest"], score]), torch.cat([self.gathered["rows"], rows])
        self.gathered["lowest"], index = scores.topk(len(counts), largest=False)
        self.gathered["rows"] = rows[index]

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Do the M-step: set the prior weights and the decoder's table from the statistics of the epoch.

        Raises:
            DataError: a component is empty and `empty` is "stop", or a covariance is singular.
        """
        if not self.gathered:
            return
        counts, sums, mixture = self.gathered["counts"], self.gathered["statistics"], self.mixture
        self._refill(counts, sums)
        mixture.table.weight.copy_(mixture.likelihood.maximise(counts, sums, self.origin))
        mixture.prior.maximise(counts)
        self.gathered.clear()

    def _refill(self, counts: Tensor, sums: Tensor) -> None:
        """Move empty components to the data of lowest log p(x)."""
        empty = (counts < MIN_COUNT).nonzero().flatten()
        if not len(empty):
            return
        shown = ", ".join(map(str, empty[:8].tolist())) + (" ..." if len(empty) > 8 else "")
        refuse(self.objective.empty == "stop", "objectives.em.empty", mixture=self.mixture, counts=counts, shown=shown)
        rows, mean = self.gathered["rows"][: len(empty)], sums.sum(0) / counts.sum()
        sums[empty] = self.mixture.likelihood.around(rows, mean, self.origin)
        counts[empty] = 1.0
        self.tell("empty", f"{self.mixture.site.name}: component {shown} empty, moved to the least likely data")
