"""Codebooks without lookup, of levels and of signs; and of frozen rows that a learned map moves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvae.nn.codebook import LookedUp, Table

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
        on = torch.arange(2**bits).unsqueeze(1) // self.powers % 2
        self.rows = nn.Buffer(2.0 * on - 1, persistent=False)

    @property
    def table(self) -> Tensor:
        """Vectors of all codes, `(K, E)`: -1 or 1."""
        return self.rows

    def place(self, z: Tensor) -> Tensor:
        """Return the vectors themselves."""
        return z

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

    def place(self, z: Tensor) -> Tensor:
        """Return the vectors themselves."""
        return z

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector `(..., E)`, `(...)`, int64."""
        return self.find(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])
