"""Components of an aggregated posterior, the posteriors of n rows: in memory, counted, or recomputed by the guide."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet
from pvae.distributions import CertainCodes, Members, Product, product
from pvae.pair import Pair, Undrawn, densities, samples
from pvae.util import Record, group

TILE_ROWS, TILE_COLUMNS = 512, 2048
"""Largest number of values, and of components, in one tile of the matrix product that scores values."""
VALUES_CHECKED = 8
"""Number of values for which log densities from the matrix product are compared with densities computed directly."""
LOG_ZERO = -1e300
"""Finite stand-in for log 0, which can be subtracted from itself without giving NaN."""
GROUPS = 20
"""Largest number of random groups of components; each is left out once, for the error that components add to a
mean."""


class Groups(Record):
    """Division of the components into random groups of the same size."""

    of: Tensor
    """Group of every component, `(n,)`; `count` for those in none, which are never left out."""
    count: int
    """Number of groups."""
    size: int
    """Number of components in a group."""


class Components(ABC):
    """Abstract components of an aggregated posterior, q(z | x_1), ..., q(z | x_n): summed, scored and sampled."""

    dim: int
    """Number of coordinates of a flat value, D."""
    columns: int
    """Number of components that are scored at once."""
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of components, n."""

    @cached_property
    def order(self) -> Tensor:
        """Random order in which components are scored, `(n,)`: rows of one class may stand together."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).to(self.device)

    @cached_property
    def groups(self) -> Groups:
        """Random groups of components: slices of the same length of each part of `order` that is scored at once."""
        count = min(GROUPS, self.columns, len(self))
        of = torch.full((len(self),), count, device=self.device)
        for part in self.order.split(self.columns):
            each = len(part) // count
            of[part[: each * count]] = torch.arange(count, device=self.device).repeat_interleave(each)
        return Groups(of, count, int((of == 0).sum()))

    @abstractmethod
    def log_sums(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return log sum_j q(z_i | x_j) over every one of `groups` and, last, over the components in none.

        `(groups + 1, m)` for values `(m, D)`, without j = `skip[i]` unless that is negative; about `LOG_ZERO` for 0.
        """

    @torch.no_grad()
    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return log sum_j q(z_i | x_j) of values `(m, D)`, `(m,)`, without j = `skip[i]` unless that is negative."""
        return nothing_as_infinite(self.log_sums(value, skip).logsumexp(0))

    @abstractmethod
    def sample(self, index: Tensor) -> Tensor:
        """Return one sample of every chosen component, `(m, D)`."""


class Products(Components):
    """Components of an exponential family, scored by a matrix product and a logsumexp, tile by tile."""

    def __init__(self, dim: int, features: int, device: torch.device, memory: int) -> None:
        self.dim, self.device = dim, device
        most = max(16, memory // (8 * 8 * features))
        self.rows, self.columns = min(TILE_ROWS, most), min(TILE_COLUMNS, most)

    @abstractmethod
    def chunks(self, order: Tensor | None = None) -> Iterator[Members]:
        """Yield the components as members of an exponential family, at most `columns` at a time, float64.

        They come in the `order` of indices `(n,)`; default: as they are.
        """

    def log_sum(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        return nothing_as_infinite(self._sums(value, skip, 1, None)[0])

    def log_sums(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        place = None if skip is None else torch.where(skip < 0, -1, self.order.argsort()[skip])
        return self._sums(value, place, self.groups.count, self.order)

    @torch.no_grad()
    def _sums(self, value: Tensor, place: Tensor | None, groups: int, order: Tensor | None) -> Tensor:
        value, sums = value.to(self.device, torch.float64), LogSums(len(value), groups, self.device)
        tile, start = value.new_empty(self.rows, self.columns), 0
        for chunk in self.chunks(order):
            score = chunk.scorer()
            for at in sums.mine(range(0, len(value), self.rows)):
                rows = slice(at, at + self.rows)
                block = tile[: len(value[rows]), : len(chunk)]
                score(value[rows], block)
                if place is not None:
                    _leave_out(block, place[rows] - start)
                sums.add(block, rows)
            start += len(chunk)
        return sums.found()


def _leave_out(block: Tensor, column: Tensor) -> None:
    """Set one log density in every row of a tile to `LOG_ZERO`, in place, if its column lies in this tile."""
    inside = (column >= 0) & (column < block.shape[1])
    at = column.clamp(0, block.shape[1] - 1)[:, None]
    block.scatter_(1, at, torch.where(inside[:, None], LOG_ZERO, block.gather(1, at)))


class LogSums:
    """Log sums of densities of m values over groups of components, and over those in none; kept relative to maxima."""

    def __init__(self, m: int, groups: int, device: torch.device) -> None:
        self.groups = groups
        self.top = torch.full((m, groups + 1), LOG_ZERO, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.top)

    def add(self, block: Tensor, rows: slice) -> None:
        """Add exp of log densities `(rows, columns)`, which are overwritten: the groups stand one after another.

        exp is many times slower where its result underflows: what is clamped adds less than n * tiny to a sum above 1.
        """
        floor, each = math.log(torch.finfo(block.dtype).tiny) + 1, block.shape[1] // self.groups
        grouped, rest = block[:, : each * self.groups], block[:, each * self.groups :]
        parts = ((grouped.unflatten(1, (self.groups, each)), slice(self.groups)), (rest[:, None], slice(-1, None)))
        for part, column in parts:
            if part.shape[2]:
                top, total = self.top[rows, column], self.total[rows, column]
                higher = torch.maximum(top, part.amax(2))
                total.mul_((top - higher).exp_())
                total += part.sub_(higher[..., None]).clamp_(min=floor).exp_().sum(2)
                top.copy_(higher)

    def mine(self, starts: Sequence[int]) -> Iterator[int]:
        """Yield those of the first rows of tiles that are this process's work."""
        yield from (at for i, at in enumerate(starts) if group.is_mine(i))

    def found(self) -> Tensor:
        """Return the log sums, `(groups + 1, m)`."""
        if group.size() > 1:  # a row that has no sums is another process's
            self.top.mul_(self.total.sum(1, keepdim=True) > 0)
            group.add_up(self.top, self.total)
        return (self.top + self.total.log()).clamp_(min=LOG_ZERO).T


def nothing_as_infinite(log_sum: Tensor) -> Tensor:
    """Return log sums with -inf in place of those to which no component contributed (about `LOG_ZERO`)."""
    return torch.where(log_sum < LOG_ZERO / 2, -math.inf, log_sum)


class Held(Components):
    """Components of an exponential family whose parameters are in memory."""

    members: Members

    def __len__(self) -> int:
        return len(self.members)

    def sample(self, index: Tensor) -> Tensor:
        return self.members.rows(index).sample()


class Kept(Held, Products):
    """Components whose parameters are in memory, scored by a matrix product."""

    def __init__(self, given: Members, memory: int) -> None:
        self.members = given.double()
        super().__init__(given.dim, given.features, self.members.origin.device, memory)

    def chunks(self, order: Tensor | None = None) -> Iterator[Members]:
        for start in range(0, len(self), self.columns):
            part = slice(start, start + self.columns)
            yield self.members.rows(part if order is None else order[part])

    def rounding(self, value: Tensor) -> float:
        """Return the largest rounding error of `log_sum` found on a few of the values `(m, D)`, nats.

        The matrix product subtracts large terms such as z^2 / 2 s^2 from each other, unlike the direct densities of
        `own`.
        """
        few = value[:: max(1, len(value) // VALUES_CHECKED)].to(self.device, torch.float64)
        parts = [chunk.log_prob(few[:, None]).logsumexp(1) for chunk in self.chunks()]
        return float((torch.stack(parts).logsumexp(0) - self.log_sum(few)).nan_to_num(nan=0.0).abs().max())


class Tallied(Held):
    """Components with deterministic codes: only rows with the same code as a value contribute to its density.

    If all latents are deterministic codes, equal rows are counted: exact, in O(n log n) time and the memory of the
    codes. Densities of further latents are summed over the rows of one code, as in `Kept`.
    """

    def __init__(self, given: Members, memory: int) -> None:
        self.members, self.memory = given.double(), memory
        self.parts = given.parts if isinstance(given, Product) else (given,)
        others = [part for part in self.parts if not isinstance(part, CertainCodes)]
        self.rest = product(others).double() if others else None
        self.codes = torch.cat([part.index for part in self.parts if isinstance(part, CertainCodes)], 1)
        self.dim, self.device, self.columns = given.dim, self.codes.device, len(self.codes)

    @torch.no_grad()
    def log_sums(self, value: Tensor, skip: Tensor | None = None) -> Tensor:
        pieces = [*zip(self.parts, value.to(self.device).split([part.dim for part in self.parts], 1), strict=True)]
        codes = torch.cat([z.long() for part, z in pieces if isinstance(part, CertainCodes)], 1)
        number = torch.cat([self.codes, codes]).unique(dim=0, return_inverse=True)[1]
        (own, at), of = number.split([len(self), len(codes)]), self.groups.of
        if self.rest is not None:
            rest = torch.cat([z for part, z in pieces if not isinstance(part, CertainCodes)], 1)
            return self._within(self.rest, rest, own, at, skip)
        counts = torch.zeros(int(number.max()) + 1, self.groups.count + 1, dtype=torch.float64, device=self.device)
        count = counts.index_put_((own, of), counts.new_ones(len(of)), accumulate=True)[at]
        if skip is not None:
            same = (skip >= 0) & (own[skip.clamp(min=0)] == at)
            count.scatter_add_(1, of[skip.clamp(min=0)][:, None], -same[:, None].double())
        return count.log().clamp(min=LOG_ZERO).T

    def _within(self, others: Members, rest: Tensor, own: Tensor, at: Tensor, skip: Tensor | None) -> Tensor:
        """Return log sums of densities of values `rest` over the components (numbered `own`) that have the codes `at`.

        `others` are the posteriors of the latents that are no deterministic codes.
        """
        of, shape = self.groups.of, (self.groups.count + 1, len(rest))
        out = torch.full(shape, LOG_ZERO, dtype=torch.float64, device=self.device)
        place = torch.full_like(own, -1)  # position of a row among those summed
        for code in at.unique().tolist():
            mine, rows = ((numbers == code).nonzero()[:, 0] for numbers in (at, own))
            for number in of[rows].unique().tolist():
                chosen = rows[of[rows] == number]
                place[chosen] = torch.arange(len(chosen), device=rows.device)
                left_out = None if skip is None else torch.where(skip[mine] < 0, -1, place[skip[mine]])
                out[number, mine] = Kept(others.rows(chosen), self.memory).log_sum(rest[mine], left_out)
                place[chosen] = -1
        return out.clamp_(min=LOG_ZERO)


def held(given: Members, memory: int) -> Components:
    """Return components in memory: counted if some latents are deterministic codes, else scored by a matrix product."""
    parts = given.parts if isinstance(given, Product) else (given,)
    return (Tallied if any(isinstance(part, CertainCodes) for part in parts) else Kept)(given, memory)


class Reread(Products):
    """Components whose parameters the guide recomputes in every pass, so that memory does not grow with n."""

    def __init__(self, pair: Pair, x: Tensor, latents: Sequence[str], memory: int) -> None:
        self.pair, self.x, self.latents = pair, x, tuple(latents)
        first = self._read(x[:1])
        super().__init__(first.dim, first.features, x.device, memory)

    def _read(self, x: Tensor) -> Members:
        with quiet(self.pair, x, 0), Undrawn(self.latents):
            found = members_of(self.pair, x, self.latents)
        assert found is not None  # noqa: S101 - `AggregatedPosterior.of` has looked
        return found.double()

    def __len__(self) -> int:
        return len(self.x)

    def chunks(self, order: Tensor | None = None) -> Iterator[Members]:
        indices = torch.arange(len(self), device=self.device) if order is None else order
        for part in indices.split(self.columns):
            yield self._read(self.x[part])

    def sample(self, index: Tensor) -> Tensor:
        return torch.cat([self._read(self.x[i]).sample() for i in index.split(self.columns)])


def members_of(pair: Pair, x: Tensor, latents: Sequence[str]) -> Members | None:
    """Return the posteriors of some latents as members of an exponential family; None where one is of another kind.

    Call it inside `quiet`. A posterior that depends on other latents is taken at the guide's own sample of them.
    """
    nodes = samples(pair.guide_trace(x))
    found = [densities.members(nodes[name], pair.layout, len(x)) for name in latents]
    known = [f for f in found if f is not None]
    return product(known) if len(known) == len(found) else None
