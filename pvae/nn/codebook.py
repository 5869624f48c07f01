"""Codebooks of embedding vectors, learned by gradients or by moving averages of the vectors assigned to each code."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from pvae.graph.lifecycle import Moving

BLOCK_DISTANCES = 2**25
"""Largest number of vector-to-code distances in memory at a time."""
START_VECTORS = 50_000
"""Largest number of vectors to which the initial k-means is fitted."""


class Table(nn.Module):
    """Base of tables of the embedding vectors that stand for codes."""

    remedy: ClassVar[str] = "warmup"
    """Name of the advice on dead codes, in the template `pair.code_usage.revival`."""
    count = tables = 1
    """Number of codes that make one vector, along the last axis of their grid, and of the tables these take in turn."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """Embedding vectors of all codes, `(K, E)`; or `(T, K, E)` of T tables, which codes take in turn."""

    def place(self, z: Tensor) -> Tensor:
        """Return vectors `(..., E)` as they are compared with the table: by default themselves."""
        return z


class Codebook(Table):
    """Codebook of K embedding vectors of width E, learned by gradients."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, width))

    @property
    def table(self) -> Tensor:
        """Embedding vectors of all codes, `(K, E)`."""
        return self.weight


def closeness(z: Tensor, table: Tensor) -> Tensor:
    """Return 2 z.e_k - |e_k|^2 for vectors `(m, E)` and rows `(K, E)`, `(m, K)`; the largest is at the nearest row."""
    return torch.addmm(-table.square().sum(1), z, table.T, alpha=2)


class LookedUp(Table):
    """Base of codebooks by whose nearest row a vector is replaced."""

    def scores(self, z: Tensor) -> Tensor:
        """Return the closeness of vectors `(m, E)` to all rows, `(m, K)`; it carries no gradient to the rows."""
        return closeness(z, self.table.detach())

    @torch.no_grad()
    def find(self, z: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector `(m, E)`, `(m,)`, int64."""
        table = self.table
        rows = max(1, BLOCK_DISTANCES // len(table))
        if torch.compiler.is_exporting() or len(z) <= rows:  # blocks would fix the batch size
            return closeness(z, table).argmax(1)
        return torch.cat([closeness(part, table).argmax(1) for part in z.split(rows)])


class NearestCodebook(LookedUp, Moving):
    """Codebook of a VQ latent: nearest-neighbour lookup, moving-average or gradient updates, restarts of dead codes.

    With `decay`, every row follows the mean of the vectors assigned to it: N <- decay N + (1 - decay) n and the sums
    likewise, row = sum / N (Laplace-smoothed N). Without, rows learn by the gradient of the codebook loss. Either way a
    row whose average number of vectors per batch falls below `restart` times the uniform share (a batch's vectors / K)
    is reset to a random vector of the batch, and its average number to the uniform share, so that it has time to be
    used.

    A forward pass in training mode records the assignments; `after_step` updates. There is no device synchronisation.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937, appendix A.1
        Jukebox (Dhariwal et al., 2020), https://arxiv.org/abs/2005.00341 (restarts)

    Arguments:
        codes: number of codes, K.
        width: width of an embedding, E.
        decay: decay of the moving averages; None to learn by gradients.
        restart: proportion of uniform use below which a code is dead and reset; 0 disables restarts.
        unit: True to normalise rows and vectors to the unit sphere (cosine similarity).
    """

    remedy = "restart"

    def __init__(self, codes: int, width: int, decay: float | None, restart: float, unit: bool) -> None:
        super().__init__()
        self.decay, self.restart, self.unit = decay, restart, unit
        start = torch.empty(codes, width).uniform_(-1, 1) / (1 if unit else codes)
        if decay is None:
            self.weight: Tensor = nn.Parameter(start)
        else:
            self.weight, self.sums = nn.Buffer(start), nn.Buffer(start.clone())
        self.counts = nn.Buffer(torch.ones(codes))
        self.batch_counts = nn.Buffer(torch.zeros(codes), persistent=False)
        self.batch_sums = nn.Buffer(torch.zeros(codes, width), persistent=False)
        self.spare = nn.Buffer(torch.zeros(codes, width), persistent=False)

    @property
    def table(self) -> Tensor:
        """Embedding vectors of all codes, `(K, E)`; normalised if the codebook is on the unit sphere."""
        return nn.functional.normalize(self.weight, dim=-1) if self.unit else self.weight

    def place(self, z: Tensor) -> Tensor:
        """Return vectors `(..., E)` as they are compared with the codebook: normalised if `unit`."""
        return nn.functional.normalize(z, dim=-1) if self.unit else z

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector `(..., E)`, `(...)`, int64; training mode records it."""
        flat = z.reshape(-1, z.shape[-1])
        index = self.find(flat)
        if self.training:
            self.note(flat, index)
        return index.reshape(z.shape[:-1])

    @torch.no_grad()
    def note(self, flat: Tensor, index: Tensor) -> None:
        """Record vectors of the batch `(m, E)` and their codes `(m,)`, for `after_step`."""
        flat = flat.to(self.counts)
        # A non-finite batch has weight 0.
        sound = flat.sum().isfinite().to(self.counts)
        self.batch_counts.zero_().index_add_(0, index, sound.expand(len(flat)))
        if self.decay is not None:
            self.batch_sums.zero_().index_add_(0, index, flat)
        if self.restart:
            self.spare.copy_(flat[torch.randint(len(flat), (len(self.counts),), device=flat.device)])

    def scratch(self) -> list[Tensor]:
        return [self.batch_counts, self.batch_sums, self.spare]

    def contribution(self, share: float, shard: int, shards: int) -> list[Tensor]:
        """Return counts and sums of one part of a batch, and the vectors that its share of the codes may be reset to.

        The parts take turns over the codes: code k may be reset to a vector of part k mod `shards`.
        """
        turn = torch.arange(len(self.counts), device=self.counts.device) % shards == shard
        return [self.batch_counts, self.batch_sums, self.spare * turn[:, None]]

    @torch.no_grad()
    def after_step(self) -> None:
        """Update averages and rows from the last batch, and reset dead rows; a non-finite batch changes nothing."""
        seen = self.batch_counts.sum() > 0
        decay = USE_DECAY if self.decay is None else self.decay
        self.counts.lerp_(torch.where(seen, self.batch_counts, self.counts), 1 - decay)
        weight = self.weight
        if self.decay is not None:
            self.sums.lerp_(torch.where(seen, self.batch_sums, self.sums), 1 - decay)
            total = self.counts.sum()
            smooth = (self.counts + SMOOTHING) * (total / (total + len(self.counts) * SMOOTHING))
            weight.copy_(torch.where(seen, self.place(self.sums / smooth[:, None]), weight))
        if self.restart:
            even = torch.maximum(self.batch_counts.mean(), self.counts.mean())  # the last batch may be a small one
            dead = (self.counts < self.restart * even) & seen
            weight.copy_(torch.where(dead[:, None], self.spare, weight))
            if self.decay is not None:
                self.sums.copy_(torch.where(dead[:, None], self.spare * even, self.sums))
            self.counts.copy_(torch.where(dead, even, self.counts))
        self.batch_counts.zero_()

    @torch.no_grad()
    def start(self, z: Tensor, seed: int, batch: float) -> None:
        """Initialise the rows at k-means centres of vectors `(m, E)`, and their average counts for `batch` per step.

        Does nothing if there are fewer distinct vectors than codes.
        """
        from sklearn.cluster import KMeans  # here, because it takes a second to import

        z = self.place(z)[:START_VECTORS]
        codes, distinct = len(self.counts), len(z.unique(dim=0))
        if distinct < codes:  # fewer vectors than codes: the rest wait to be restarted
            return
        found = KMeans(codes, n_init=1, max_iter=20, random_state=seed).fit(z.double().cpu().numpy())
        share = torch.from_numpy(found.labels_).bincount(minlength=codes).to(self.counts) / len(z)
        self.weight.copy_(self.place(torch.from_numpy(found.cluster_centers_).to(self.weight)))
        self.counts.copy_(share * batch)
        if self.decay is not None:
            self.sums.copy_(self.weight * self.counts[:, None])


SMOOTHING = 1e-5
"""Pseudo-count of the Laplace smoothing of the average counts."""
USE_DECAY = 0.99
"""Decay of the average counts if rows are learned by gradients (`decay` is None)."""
