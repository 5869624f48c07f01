"""The aggregated posterior q_agg(z) = 1/n sum_i q(z | x_i): density, leave-one-out, bounds from a subset, draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.analysis.decompose.draws import accept, flat_values, members, quiet
from pvae.analysis.decompose.pairwise import LOWEST, Guided, nothing_as_infinite
from pvae.distributions.exponential import Members
from pvae.distributions.exponential_codes import CertainCodes
from pvae.distributions.exponential_product import Product, product
from pvae.errors import DataError, DeclarationError
from pvae.pair.code_usage import Undrawn
from pvae.pair.pair import Pair
from pvae.pair.structure import ROWS_AT_ONCE
from pvae.util import seeds

ROWS, COLUMNS = 512, 2048
CHECKED = 8
"""Values on which the matrix product is compared with densities taken one by one."""
MEMORY = 2**29
"""Bytes that a q_agg may keep and work with, beside the data and the values that are scored."""
Size = torch.Size | list[int] | tuple[int, ...]


class Components(ABC):
    """Posteriors q(z | x_1) ... q(z | x_n) that can be summed over, whatever they are made of."""

    dim: int
    """D, the width of a flat value."""
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @abstractmethod
    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """log sum_j q(z | x_j) of `(m, D)`, without component `skip[i]` for row i where that is not negative."""

    @abstractmethod
    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """log q(z_i | x_index_i) of `(m, D)`, `(m,)`."""

    @abstractmethod
    def sample(self, index: Tensor) -> Tensor:
        """One draw of every chosen component, `(m, D)`."""


class Products(Components):
    """Exponential families: a matrix product and a logsumexp, tile by tile in preallocated memory."""

    def __init__(self, dim: int, features: int, device: torch.device, memory: int) -> None:
        self.dim, self.device = dim, device
        most = max(16, memory // (8 * 8 * features))
        self.rows, self.columns = min(ROWS, most), min(COLUMNS, most)

    @abstractmethod
    def chunks(self) -> Iterator[Members]:
        """The members in order, at most `columns` at a time, float64."""

    @torch.no_grad()
    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """See `Components.log_sum`."""
        value = value.to(self.device, torch.float64)
        top, total = value.new_full((len(value), 1), LOWEST), value.new_zeros(len(value), 1)
        tile, start = value.new_empty(self.rows, self.columns), 0
        for chunk in self.chunks():
            score = chunk.scorer()
            for at in range(0, len(value), self.rows):
                rows = slice(at, at + self.rows)
                block = tile[: len(value[rows]), : len(chunk)]
                score(value[rows], block)
                if skip is not None:
                    _leave_out(block, skip[rows] - start)
                _accumulate(block, top[rows], total[rows])
            start += len(chunk)
        return nothing_as_infinite((top + total.log_()).squeeze(1))


def _leave_out(block: Tensor, column: Tensor) -> None:
    """Give one column of every row no weight, where it stands in this tile; no synchronisation."""
    inside = (column >= 0) & (column < block.shape[1])
    at = column.clamp(0, block.shape[1] - 1)[:, None]
    block.scatter_(1, at, torch.where(inside[:, None], LOWEST, block.gather(1, at)))


def _accumulate(block: Tensor, top: Tensor, total: Tensor) -> None:
    """Add exp(block) to sums kept relative to their running maximum, in place.

    exp is many times slower where its result underflows: what is clamped adds less than n * tiny to a sum above 1.
    """
    floor = math.log(torch.finfo(block.dtype).tiny) + 1
    higher = torch.maximum(top, block.amax(1, keepdim=True))
    total.mul_((top - higher).exp_())
    total += block.sub_(higher).clamp_(min=floor).exp_().sum(1, keepdim=True)
    top.copy_(higher)


class Kept(Products):
    """Members held in memory."""

    def __init__(self, given: Members, memory: int) -> None:
        self.members = given.double()
        device = self.members.origin.device
        super().__init__(given.dim, given.features, device, memory)

    def __len__(self) -> int:
        return len(self.members)

    def chunks(self) -> Iterator[Members]:
        """See `Products.chunks`."""
        for start in range(0, len(self), self.columns):
            yield self.members.rows(slice(start, start + self.columns))

    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """See `Components.own`."""
        return self.members.rows(index).log_prob(value.to(self.device, torch.float64))

    def rounding(self, value: Tensor) -> float:
        """Largest error of `log_sum` on a few rows of `(m, D)`: it takes differences of z^2 / 2 s^2, `own` does not."""
        few = value[:: max(1, len(value) // CHECKED)].to(self.device, torch.float64)
        parts = [chunk.log_prob(few[:, None]).logsumexp(1) for chunk in self.chunks()]
        found = torch.stack(parts).logsumexp(0) - self.log_sum(few)
        return float(found.nan_to_num(nan=0.0).abs().max())

    def sample(self, index: Tensor) -> Tensor:
        """See `Components.sample`."""
        return self.members.rows(index).sample()


class Tallied(Components):
    """Codes known for certain, and what stands beside them: only rows of the same code have a part in a sum.

    Codes alone are counted: exact, in O(n log n) time and the memory of the codes. Rows of one code whose other latents
    have a density are summed over as `Kept` does.
    """

    def __init__(self, given: Members, memory: int) -> None:
        self.members, self.memory = given.double(), memory
        self.parts = given.parts if isinstance(given, Product) else (given,)
        others = [part for part in self.parts if not isinstance(part, CertainCodes)]
        self.rest = product(others).double() if others else None
        codes = torch.cat([part.index for part in self.parts if isinstance(part, CertainCodes)], 1)
        self.dim, self.device = given.dim, codes.device
        self.keys, self.group, self.counts, self.codes = self._grouped(codes)

    def _grouped(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sorted keys of the distinct codes, the number of each row's, how many rows have it, and the codes."""
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            self.odd = torch.randint(2**62, (codes.shape[1],), generator=generator).mul(2).add(1).to(codes.device)
            keys, group, counts = self._keys(codes).unique(return_inverse=True, return_counts=True)
            rows = torch.arange(len(codes), device=codes.device)
            distinct = codes[torch.zeros_like(keys).scatter_(0, group, rows)]
            parts = zip(codes.split(ROWS_AT_ONCE), group.split(ROWS_AT_ONCE), strict=True)
            if all(bool((part == distinct[at]).all()) for part, at in parts):
                return keys, group, counts, distinct
        raise RuntimeError("eight hashes of 64 bits collided")  # pragma: no cover - cannot be

    def _keys(self, codes: Tensor) -> Tensor:
        """A hash of 64 bits of every code; which codes are equal is then looked at."""
        return torch.cat([(part * self.odd).sum(1) for part in codes.split(ROWS_AT_ONCE)])

    def __len__(self) -> int:
        return len(self.group)

    def _split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Flat values as codes `(m, P)` and the rest."""
        pieces = list(zip(self.parts, value.to(self.device).split([part.dim for part in self.parts], 1), strict=True))
        codes = torch.cat([z.long() for part, z in pieces if isinstance(part, CertainCodes)], 1)
        rest = [z for part, z in pieces if not isinstance(part, CertainCodes)]
        return codes, torch.cat(rest, 1) if rest else codes[:, :0]

    def _found(self, codes: Tensor) -> Tensor:
        """Which of the distinct codes each is, -1 for none."""
        keys = self._keys(codes)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        parts = zip(codes.split(ROWS_AT_ONCE), at.split(ROWS_AT_ONCE), strict=True)
        same = torch.cat([(part == self.codes[i]).all(1) for part, i in parts])
        return torch.where(same & (self.keys[at] == keys), at, -1)

    @torch.no_grad()
    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """See `Components.log_sum`."""
        codes, rest = self._split(value)
        at = self._found(codes)
        if self.rest is not None:
            return self._within(rest, at, skip)
        count = torch.where(at >= 0, self.counts[at.clamp(min=0)], 0)
        if skip is not None:
            count = count - ((skip >= 0) & (self.group[skip.clamp(min=0)] == at)).long()
        return count.double().log()

    def _within(self, rest: Tensor, at: Tensor, skip: Tensor | None) -> Tensor:
        """The sum over the rows of each value's own code."""
        assert self.rest is not None  # noqa: S101 - asked above
        out = torch.full((len(rest),), -math.inf, dtype=torch.float64, device=self.device)
        place = torch.empty_like(self.group)  # of a row among those of its code
        for code in at[at >= 0].unique().tolist():
            mine, rows = (at == code).nonzero()[:, 0], (self.group == code).nonzero()[:, 0]
            place[rows] = torch.arange(len(rows), device=rows.device)
            left_out = None
            if skip is not None:
                chosen = skip[mine]
                here = (chosen >= 0) & (self.group[chosen.clamp(min=0)] == code)
                left_out = torch.where(here, place[chosen.clamp(min=0)], -1)
            out[mine] = Kept(self.rest.rows(rows), self.memory).log_sum(rest[mine], left_out)
        return out

    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """See `Components.own`."""
        return self.members.rows(index).log_prob(value.to(self.device, torch.float64))

    def sample(self, index: Tensor) -> Tensor:
        """See `Components.sample`."""
        return self.members.rows(index).sample()


def held(given: Members, memory: int) -> Components:
    """Members in memory: counted where codes are certain, else multiplied."""
    parts = given.parts if isinstance(given, Product) else (given,)
    return (Tallied if any(isinstance(part, CertainCodes) for part in parts) else Kept)(given, memory)


class Streamed(Products):
    """Members read off the guide again in every pass: memory does not grow with n."""

    def __init__(self, pair: Pair, x: Tensor, latents: Sequence[str], memory: int) -> None:
        self.pair, self.x, self.latents = pair, x, tuple(latents)
        first = self._read(x[:1])
        super().__init__(first.dim, first.features, x.device, memory)

    def _read(self, x: Tensor) -> Members:
        with quiet(self.pair, x, 0), Undrawn(self.latents):
            found = members(self.pair, x, self.latents)
        assert found is not None  # noqa: S101 - `AggregatedPosterior.of` has looked
        return found.double()

    def __len__(self) -> int:
        return len(self.x)

    def chunks(self) -> Iterator[Members]:
        """See `Products.chunks`."""
        for part in self.x.split(self.columns):
            yield self._read(part)

    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """See `Components.own`."""
        pairs = zip(value.to(torch.float64).split(self.columns), index.split(self.columns), strict=True)
        return torch.cat([self._read(self.x[i]).log_prob(z) for z, i in pairs])

    def sample(self, index: Tensor) -> Tensor:
        """See `Components.sample`."""
        return torch.cat([self._read(self.x[i]).sample() for i in index.split(self.columns)])


class GuideRuns(Components):
    """Any guide: its own `log_prob` on every pair of value and row, and its own draws."""

    def __init__(self, pair: Pair, x: Tensor, latents: Sequence[str], memory: int) -> None:
        self.pair, self.x, self.device = pair, x, x.device
        with quiet(pair, x, 0):
            self.guided = Guided(pair, x, latents, memory)
        self.dim = self.guided.dim

    def __len__(self) -> int:
        return len(self.x)

    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """See `Components.log_sum`."""
        with quiet(self.pair, self.x, 0):
            return self.guided.log_sum(value, skip)

    def own(self, value: Tensor, index: Tensor) -> Tensor:
        """See `Components.own`."""
        with quiet(self.pair, self.x, 0):
            return self.guided.own(value, index)

    def sample(self, index: Tensor) -> Tensor:
        """See `Components.sample`."""
        seed = int(torch.randint(2**31, ()))
        with quiet(self.pair, self.x, seed):
            size = self.pair.structure.rows_at_once()
            parts = [flat_values(self.pair, self.x[i], self.guided.latents) for i in index.split(size)]
        return torch.cat(parts)


@dataclass(frozen=True)
class Information:
    """log q(z_i | x_i) - log q_agg(z_i) of m draws, `(m,)`, nats; its mean is I_q[x, z]."""

    lower: Tensor
    """With x_i and the chosen components alone: in expectation at most the exact one."""
    upper: Tensor
    """With the chosen components standing for all others: in expectation at least the exact one, at most log n."""
    leave_one_out: Tensor
    """Against the others alone: in expectation at least the mutual information under the law of the data."""

    @property
    def bias(self) -> float:
        """A bound, in expectation, on what leaving components out does to I_q; 0 when all are there."""
        return float((self.upper - self.lower).mean())


class AggregatedPosterior(dist.TorchDistribution):
    r"""The mixture 1/n sum_i q(z | x_i) of a guide's posteriors over a data set.

    Posteriors of an exponential family (normal, full-rank normal, categorical and one-hot grids, Bernoulli, products
    of them) are scored by a matrix product and a logsumexp in float64: log q(z | x_i) = <T(z), eta_i> - A(eta_i).
    Codes known for certain (a nearest code) are counted: q_agg is then the share of rows with the very same joint code.
    Any other guide, and latents that read each other, are scored by the guide's own `log_prob` on every pair of
    value and row. Values are flat: the event dimensions of all latents in a row, in the guide's order.

    Memory: beside the data and the values, at most about `memory` bytes whatever n (and no less than a block of 16
    rows needs): parameters that would take more are read off the guide again in every pass.

    Arguments:
        components: an exponential family's members, or what `of` makes.
        total: how many rows the components stand for, when they are a random subset.
        index: which rows they are, `(M,)`, when they are a subset.
        memory: bytes.

    Example:
        >>> from pvae.distributions.exponential import Normals
        >>> q = AggregatedPosterior(Normals(torch.zeros(3, 2), torch.ones(3, 2)))
        >>> bool(torch.isclose(q.log_prob(torch.zeros(2)), torch.tensor(-math.log(2 * math.pi)).double()))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        components: Members | Components,
        total: int | None = None,
        index: Tensor | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.components = held(components, memory) if isinstance(components, Members) else components
        if not len(self.components):
            raise DeclarationError("AggregatedPosterior: expected at least one component; got none.")
        self.total = len(self.components) if total is None else total
        self.index = index
        super().__init__(torch.Size(), torch.Size((self.components.dim,)), validate_args=False)

    @classmethod
    def of(
        cls,
        pair: Pair,
        x: Tensor,
        *,
        latents: Sequence[str] | None = None,
        components: int | None = None,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> AggregatedPosterior:
        """Run a guide over a data set.

        Arguments:
            pair: any Pyro pair.
            x: data `(n, *event)`.
            latents: which of them; default: all of the guide's, together.
            components: use this many rows, drawn at random; default: all.
            seed: of that choice.
            memory: bytes.

        Returns:
            The mixture over the rows (or the chosen ones).

        Raises:
            DataError: a latent that the guide does not have, or a number of components out of range.
        """
        x = accept(pair, x)
        names = pair.layout.latents if latents is None else tuple(latents)
        if not names or not set(names) <= {*pair.layout.latents}:
            raise DataError(f"latents: expected some of {', '.join(pair.layout.latents)}; got {', '.join(names)}.")
        rows = choose(len(x), components, seed, x.device)
        chosen = x if rows is None else x[rows]
        alone = set(names) <= pair.dependencies(x).guide_roots
        with quiet(pair, x, 0):
            first = members(pair, chosen[:2], names) if alone else None
        made: Members | Components
        if first is None:
            made = GuideRuns(pair, chosen, names, memory)
        elif 8 * first.numbers * len(chosen) > memory // 2:
            made = Streamed(pair, chosen, names, memory)
        else:
            with quiet(pair, x, 0), Undrawn(names):
                parts = [members(pair, part, names) for part in chosen.split(pair.structure.rows_at_once())]
            made = parts[0].joined(parts[1:])  # type: ignore[union-attr]
        return cls(made, len(x), rows, memory)

    def __len__(self) -> int:
        return len(self.components)

    def _flat(self, value: Tensor) -> Tensor:
        return value.detach().reshape(-1, self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """log q_agg(z) of `(..., D)`, nats, `(...)`; exact over all components."""
        out = self.components.log_sum(self._flat(value)) - math.log(len(self))
        return out.reshape(value.shape[:-1])

    def component_log_prob(self, value: Tensor, index: Tensor | None = None) -> Tensor:
        """log q(z_i | x_index_i), nats, of `(m, D)`; row i under component i unless `index` says otherwise."""
        index = torch.arange(len(value), device=value.device) if index is None else index
        return self.components.own(value, index)

    def leave_one_out(self, value: Tensor, index: Tensor | None = None) -> Tensor:
        """log 1/(n-1) sum_{j != index_i} q(z_i | x_j) of `(m, D)`, nats; row i leaves out i unless `index` says."""
        index = torch.arange(len(value), device=value.device) if index is None else index
        others, count = self._others(value, index)
        return others - count.log()

    def _others(self, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """log of the sum over components that are not row `index_i`, and how many these are."""
        skip = index
        if self.index is not None:
            where = torch.full((self.total,), -1, device=index.device)
            where[self.index] = torch.arange(len(self), device=index.device)
            skip = where[index]
        count = len(self) - (skip >= 0).double()
        if float(count.min()) < 1:
            raise DataError("leave-one-out: expected at least two components; got one.")
        return self.components.log_sum(value, skip), count

    def information(self, value: Tensor, index: Tensor, own: Tensor) -> Information:
        r"""Pointwise I_q[x, z] of draws z_i ~ q(z | x_index_i), with bounds where components are a subset.

        With n rows, own density q_i and M others chosen at random,

        - upper: log q_i - log(q_i / n + (n-1)/n * mean of the others): the argument of the logarithm is unbiased
          for q_agg(z_i), so by Jensen the mean is at least I_q; no term exceeds log n.
        - lower: log q_i - log((q_i + sum of the others) / (M + 1)), the information within random subsets of rows,
          which mutual information, concave in the law of x, exceeds on average.

        They are equal, and exact, when every row is a component. Leave-one-out drops q_i from the mixture: for data
        drawn from a law it bounds the information under that law from above, while I_q bounds it from below.

        References:
            On Variational Bounds of Mutual Information (Poole et al., 2019), https://arxiv.org/abs/1905.06922

        Arguments:
            value: `(m, D)`.
            index: the row each value was drawn for, `(m,)`.
            own: log q(z_i | x_index_i), `(m,)`, float64.

        Returns:
            Information, nats, `(m,)` each.
        """
        if self.total == 1:
            zero = torch.zeros_like(own)
            return Information(zero, zero, zero + math.inf)
        others, count = self._others(value, index)
        n = self.total
        mean = others - count.log()
        lower = own - (torch.logaddexp(own, others) - (count + 1).log())
        upper = own - torch.logaddexp(own - math.log(n), mean + math.log((n - 1) / n))
        return Information(lower, lower if len(self) == n else upper, own - mean)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Ancestral draws `sample_shape + (D,)`."""
        index = torch.randint(len(self), (math.prod(sample_shape),), device=self.components.device)
        return self.components.sample(index).reshape(*sample_shape, *self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> dist.TorchDistribution:
        """The same mixture over more batch dimensions."""
        return dist.ExpandedDistribution(self, batch_shape)


def choose(n: int, count: int | None, seed: int, device: torch.device) -> Tensor | None:
    """`count` of n rows at random, in order; None for all of them."""
    if count is not None and count < 2:
        raise DataError(f"components: expected at least 2; got {count}.")
    if count is None or count >= n:
        return None
    return seeds.subset(n, count, seeds.mix(seed, seeds.ANALYSIS, 3)).to(device)
