"""Densities by running the guide itself on pairs of a value and a row: for any posterior, and for hierarchies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pvae.pair.densities import certainty, log_prob, sum_over
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from pvae.pair.running import PARTICLES

PAIRS = 8192
"""Most guide rows of one block."""
COPIES = 8
"""Tensors of the size of a row that a guide is taken to keep for every pair."""
COMPONENTS = 256
"""Rows of data of one block, encoded once for all values of the block."""
LOWEST = -1e300
"""The logarithm of a weight of zero that can be subtracted from itself."""


def nothing_as_infinite(log_sum: Tensor) -> Tensor:
    """Sums to which nothing contributed as -inf."""
    return torch.where(log_sum < LOWEST / 2, -math.inf, log_sum)


class Guided:
    """log q(z_i | x_j) of flat values under rows of data; every level of a hierarchy sees the shared z.

    A block of values is a plate of particles over a block of rows, so that the encoder runs once for each row; a
    guide that cannot take such a plate gets every pair as a row of a larger batch. Call it inside `quiet`.

    Arguments:
        pair: any pair.
        x: data `(n, *event)`.
        latents: whose densities are multiplied.
        memory: bytes for the pairs of a block, with `COPIES` of x and of the value for each.
    """

    def __init__(self, pair: Pair, x: Tensor, latents: Sequence[str], memory: int) -> None:
        self.pair, self.x, self.latents = pair, x, tuple(latents)
        self.shapes = pair.structure.shapes
        self.widths = [self.shapes[name].numel for name in self.latents]
        self.dim = sum(self.widths)
        numbers = sum(pair.structure.parameters_per_row[name] for name in self.latents)
        self.pairs = min(PAIRS, max(16, memory // (COPIES * 8 * (max(self.dim, numbers) + x[0].numel()))))
        asked = f"a plate of particles over {', '.join(self.latents)} in the guide"
        self.dtypes, takes = pair.remember(asked, (x.dtype, str(x.device)), self._takes_particles)
        self.score = self._with_particles if takes else self._tiled

    def _takes_particles(self) -> tuple[dict[str, torch.dtype], bool]:
        """Return the type of each latent, and whether a plate of particles gives what repeated rows give."""
        trace = samples(self.pair.guide_trace(self.x[:3]))
        values = {name: trace[name]["value"] for name in self.latents}
        self.dtypes = {name: value.dtype for name, value in values.items()}
        flat = torch.cat([self.shapes[name].flatten(value).double() for name, value in values.items()], 1)
        return self.dtypes, self._agree(flat.repeat(3, 1)[: len(flat) + 1])  # another number of particles than rows

    def _agree(self, value: Tensor) -> bool:
        rows = len(self.x[:3])
        try:
            got = self._with_particles(value, self.x[:rows])
        except (ValueError, RuntimeError, IndexError):
            return False
        want = self._tiled(value, self.x[:rows])
        return got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)

    def _fixed(self, value: Tensor) -> dict[str, Tensor]:
        pieces = value.split(self.widths, -1)
        return {name: z.to(self.dtypes[name]) for name, z in zip(self.latents, pieces, strict=True)}

    def _with_particles(self, value: Tensor, x: Tensor) -> Tensor:
        """`(k, D)` values under `(c, *event)` rows, `(k, c)`."""
        k, c = len(value), len(x)
        nesting = self.pair.layout.nesting
        data = {
            name: self.shapes[name].spread(z[:, None].expand(k, c, -1), nesting)
            for name, z in self._fixed(value).items()
        }
        with self.pair.own_store(), pyro.plate(PARTICLES, k, dim=-1 - nesting):
            with TraceMessenger() as tracer, poutine.condition(data=data):
                self.pair.guide(x)
        return self._total(tracer.trace, k, k, c)

    def _tiled(self, value: Tensor, x: Tensor) -> Tensor:
        """The same with every pair as a row."""
        k, c = len(value), len(x)
        rows = value.repeat_interleave(c, 0)
        data = {name: self.shapes[name].spread(z, 0) for name, z in self._fixed(rows).items()}
        with self.pair.own_store(), TraceMessenger() as tracer, poutine.condition(data=data):
            self.pair.guide(x.repeat(k, *(1,) * (x.dim() - 1)))
        return self._total(tracer.trace, 0, k, c)

    def _total(self, trace: poutine.Trace, particles: int, k: int, c: int) -> Tensor:
        parts = [self._score(trace.nodes[name], particles) for name in self.latents]
        return sum_over(parts).reshape(k, c)

    def _score(self, node: Mapping[str, Any], particles: int) -> Tensor:
        """log q of a site's value, -inf where its code is another for certain."""
        found = certainty(node, self.pair.layout, particles)
        return (log_prob(node, self.pair.layout, particles) if found is None else found).double()

    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """log sum_j q(z_i | x_j) of `(m, D)`, without row `skip[i]` where that is not negative; `(m,)`, nats."""
        out = torch.full((len(value),), LOWEST, dtype=torch.float64, device=self.x.device)
        rows = min(COMPONENTS, self.pairs, len(self.x))
        for start in range(0, len(self.x), rows):
            x = self.x[start : start + rows]
            step = max(1, self.pairs // len(x))
            for at in range(0, len(value), step):
                block = slice(at, at + step)
                scores = self.score(value[block], x)
                scores = torch.where(scores < LOWEST, LOWEST, scores)
                if skip is not None:
                    column = torch.arange(start, start + len(x), device=x.device)
                    scores = scores.masked_fill(skip[block, None] == column, LOWEST)
                out[block] = torch.logaddexp(out[block], scores.logsumexp(1))
        return nothing_as_infinite(out)

    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """log q(z_i | x_index_i) of `(m, D)`, `(m,)`, nats."""
        parts = []
        for z, i in zip(value.split(self.pairs), index.split(self.pairs), strict=True):
            data = {name: self.shapes[name].spread(v, 0) for name, v in self._fixed(z).items()}
            with self.pair.own_store(), TraceMessenger() as tracer, poutine.condition(data=data):
                self.pair.guide(self.x[i])
            parts.append(self._total(tracer.trace, 0, len(z), 1)[:, 0])
        return torch.cat(parts)
