"""Log densities of any posterior, hierarchies included, by running the guide on pairs of a latent value and a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.analysis.aggregate.components import LOG_ZERO, Components, LogSums
from pvae.analysis.aggregate.entry import quiet
from pvae.pair import PARTICLES, Pair, certainty, log_prob, rows_first, samples, sum_over
from pvae.util import seeds

PAIRS_AT_ONCE = 8192
"""Largest number of pairs of a latent value and a row that the guide scores at once."""
TENSORS_PER_PAIR = 8
"""Number of row-sized tensors that a guide is assumed to keep in memory for every pair of a value and a row."""
COMPONENTS_AT_ONCE = 256
"""Largest number of rows of data in one block; each is encoded once for all values that are scored in it."""


class GuideRuns(Components):
    """Components of an aggregated posterior for any guide, which is run to score every pair of a value and a row.

    Every level of a hierarchy is evaluated at the same z. A block of values is a plate of particles over a block of
    rows, so that the encoder runs once for each row; a guide that cannot take such a plate gets every pair as a row of
    a larger batch.

    Arguments:
        pair: any pair.
        x: data `(n, *event)`.
        latents: names of the latents whose densities are multiplied.
        memory: bytes that the pairs of a block may take, at `TENSORS_PER_PAIR` tensors of x and z for each.
    """

    def __init__(self, pair: Pair, x: Tensor, latents: Sequence[str], memory: int) -> None:
        self.pair, self.x, self.latents, self.device = pair, x, tuple(latents), x.device
        self.shapes = pair.structure.shapes
        self.widths = [self.shapes[name].numel for name in self.latents]
        self.dim = sum(self.widths)
        numbers = sum(pair.structure.parameters_per_row[name] for name in self.latents)
        per_pair = TENSORS_PER_PAIR * 8 * (max(self.dim, numbers) + x[0].numel())
        self.pairs = min(PAIRS_AT_ONCE, max(16, memory // per_pair))
        self.columns = min(COMPONENTS_AT_ONCE, self.pairs)
        asked = f"a plate of particles over {', '.join(self.latents)} in the guide"
        with quiet(pair, x, 0):
            self.dtypes, self.stacked = pair.remember(asked, (x.dtype, str(x.device)), self._takes_particles)

    def _takes_particles(self) -> tuple[dict[str, torch.dtype], bool]:
        """Return the dtype of every latent, and True if a plate of particles gives the densities of repeated rows."""
        x = self.pair.structure.few(self.x, 3)
        trace = samples(self.pair.guide_trace(x))
        self.dtypes = {name: trace[name]["value"].dtype for name in self.latents}
        flat = torch.cat([self.shapes[name].flatten(trace[name]["value"]).double() for name in self.latents], 1)
        flat = flat.repeat(3, 1)[: len(x) + 1]  # another number of particles than rows
        try:
            got = self.score(flat, x, stacked=True)
        except Exception:  # whatever a program raises under a further plate
            return self.dtypes, False
        want = self.score(flat, x, stacked=False)
        same = got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
        return self.dtypes, same

    def __len__(self) -> int:
        return len(self.x)

    def score(self, value: Tensor, x: Tensor, *, stacked: bool) -> Tensor:
        """Return log q of `(k, D)` values under `(c, *event)` rows, `(k, c)`.

        The values are particles if `stacked`; else every pair is a row of one batch.
        """
        k, c, nesting = len(value), len(x), self.pair.layout.nesting
        if not stacked:
            return self._scores(value.repeat_interleave(c, 0), x.repeat(k, *(1,) * (x.dim() - 1))).reshape(k, c)
        with pyro.plate(PARTICLES, k, dim=-1 - nesting):
            return self._scores(value[:, None].expand(k, c, -1), x, k, nesting).reshape(k, c)

    def _scores(self, value: Tensor, x: Tensor, particles: int = 0, nesting: int = 0) -> Tensor:
        """Return the sum of log q of all latents per row, with the guide conditioned on flat values `(..., D)`."""
        pieces = dict(zip(self.latents, value.split(self.widths, -1), strict=True))
        data = {name: self.shapes[name].spread(z.to(self.dtypes[name]), nesting) for name, z in pieces.items()}
        trace = self.pair.guide_trace(x, data)
        return sum_over([self._score(trace.nodes[name], particles) for name in self.latents])

    def _score(self, node: Mapping[str, Any], particles: int) -> Tensor:
        """Return log q of a site's value; under a deterministic code, 0 for that code and -inf for any other."""
        found = certainty(node, self.pair.layout, particles)
        return (log_prob(node, self.pair.layout, particles) if found is None else found).double()

    @torch.no_grad()
    def log_sums(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        sums = LogSums(len(value), self.groups.count, self.device)
        with quiet(self.pair, self.x, 0):
            for part in self.order.split(self.columns):
                x, step = self.x[part], max(1, self.pairs // len(part))
                for at in sums.mine(range(0, len(value), step)):
                    block = slice(at, at + step)
                    scores = self.score(value[block], x, stacked=self.stacked).clamp(min=LOG_ZERO)
                    if skip is not None:
                        scores = scores.masked_fill(skip[block, None] == part, LOG_ZERO)
                    sums.add(scores, block)
        return sums.found()

    def sample(self, index: Tensor) -> Tensor:
        with quiet(self.pair, self.x, seeds.drawn()):
            return torch.cat([self._drawn(self.x[i]) for i in index.split(self.pair.structure.rows_at_once())])

    def _drawn(self, x: Tensor) -> Tensor:
        """Return one sample of the latents for every row, concatenated to flat values `(n, D)`, float64."""
        nodes = samples(self.pair.guide_trace(x))
        flat = [rows_first(nodes[z]["value"], nodes[z], self.pair.layout, len(x)).double() for z in self.latents]
        return torch.cat(flat, 1)
