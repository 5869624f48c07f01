"""Codebooks without lookup (levels, signs), of mapped frozen rows, and stacks whose codes make one vector together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pvae.nn.codebook import LookedUp, NearestCodebook, Table

OPEN_ENDS = 1e-3
"""Proportion by which the bound of a scalar lies beyond the last level, so that it can be reached."""


class LevelCodebook(Table):
    """Fixed table of all combinations of L_i equidistant levels of E scalars, the first one changing fastest.

    Arguments:
        levels: number of levels of every scalar, L_i.
    """

    remedy = "levels"

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        count = torch.tensor(levels)
        half, shift = (count - 1) * (1 + OPEN_ENDS) / 2, torch.where(count % 2 == 0, 0.5, 0.0)
        self.reach, self.shift = nn.Buffer(half, persistent=False), nn.Buffer(shift, persistent=False)
        self.start = nn.Buffer((shift / half).atanh(), persistent=False)
        self.middle = nn.Buffer(count // 2, persistent=False)
        self.strides = nn.Buffer(count.cumprod(0) // count, persistent=False)
        level = torch.arange(int(count.prod())).unsqueeze(1) // self.strides % count - self.middle
        self.rows = nn.Buffer(level / self.middle, persistent=False)

    @property
    def table(self) -> Tensor:
        """Vectors of all codes, `(K, E)`: levels between -1 and 1."""
        return self.rows

    def place(self, z: Tensor) -> Tensor:
        """Return vectors `(..., E)` bounded to the range of the levels, where the distance to the next is even."""
        return ((z + self.start).tanh() * self.reach - self.shift) / self.middle

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the code of the levels nearest to bounded vectors `(..., E)`, `(...)`, int64."""
        return (((z * self.middle).round().long() + self.middle) * self.strides).sum(-1)


class SignCodebook(Table):
    """Fixed table of all 2^E vectors of signs; the first sign is the highest bit of the code.

    Arguments:
        bits: number of signs, E.
    """

    remedy = "entropy"

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.powers = nn.Buffer(2 ** torch.arange(bits - 1, -1, -1), persistent=False)
        self.rows = nn.Buffer(2.0 * (torch.arange(2**bits).unsqueeze(1) // self.powers % 2) - 1, persistent=False)

    @property
    def table(self) -> Tensor:
        """Vectors of all codes, `(K, E)`: -1 or 1."""
        return self.rows

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the code of the signs of vectors `(..., E)`, `(...)`, int64."""
        return ((z > 0) * self.powers).sum(-1)


class MappedCodebook(LookedUp):
    """Codebook of frozen random rows, all of which one learned linear map moves.

    Arguments:
        codes: number of codes, K.
        width: width of an embedding, E.
    """

    remedy = "map"

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.frozen = nn.Buffer(torch.randn(codes, width) * width**-0.5)
        self.map = nn.Linear(width, width, bias=False)

    @property
    def table(self) -> Tensor:
        """Embedding vectors of all codes, `(K, E)`: the mapped rows."""
        return self.map(self.frozen)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector `(..., E)`, `(...)`, int64."""
        return self.find(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])


class CodebookStack(Table):
    """Codebooks of several codes that make one vector: each of the residual before it, or of its part of the vector.

    Arguments:
        books: one codebook for every code, or a single one that all codes share.
        count: number of codes.
        residual: True if rows are added, each code quantising what those before leave; else rows lie side by side.
    """

    remedy = "restart"

    def __init__(self, books: Sequence[NearestCodebook], count: int, residual: bool) -> None:
        super().__init__()
        self.books, self.residual = nn.ModuleList(books), residual
        self.count, self.tables = count, len(books)

    @property
    def table(self) -> Tensor:
        """Embedding vectors of all codes, `(T, K, E)`, of T tables; of parts of a vector, E is the width of a part."""
        return torch.stack([book.table for book in self.books])  # type: ignore[misc]

    def walk(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what every code quantises, `(m, E)`, and its index, `(m,)`, for vectors `(m, E)`."""
        parts = None if self.residual else z.chunk(self.count, 1)
        for i in range(self.count):
            book, part = self.books[i % self.tables], z if parts is None else parts[i]
            index = book.find(part)  # type: ignore[operator]
            yield part, index
            if parts is None:
                z = z - nn.functional.embedding(index, book.table)  # type: ignore[arg-type]

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the codes of vectors `(..., E)`, `(..., count)`, int64; training mode records them."""
        parts, found = zip(*self.walk(z.reshape(-1, z.shape[-1])), strict=True)
        if self.training:
            for i, book in enumerate(self.books):
                every = slice(i, None, self.tables)
                book.note(torch.cat(parts[every]), torch.cat(found[every]))  # type: ignore[operator]
        return torch.stack(found, -1).reshape(*z.shape[:-1], self.count)

    @torch.no_grad()
    def start(self, z: Tensor, seed: int, batch: float) -> None:
        """Initialise the codebooks in turn at k-means centres of what they quantise, for vectors `(m, E)`.

        `batch` is the number of vectors in a step. A shared codebook of residuals has them after a first round.
        """
        rounds = 2 if self.residual and self.tables < self.count else 1
        for i in [*range(self.tables)] * rounds:
            parts = [part for part, _ in self.walk(z)][i :: self.tables]
            self.books[i].start(torch.stack(parts, 1).flatten(0, 1), seed, batch * len(parts))
