"""The table of a code's embeddings: learned by gradients, or moved by averages of what was assigned to each code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pvae.graph.lifecycle import Moving

BLOCK_DISTANCES = 2**25
"""Largest number of distances held at a time."""
START_VECTORS = 50_000
"""Largest number of vectors that k-means starts from."""


class Codebook(nn.Module):
    """K rows of E numbers, learned by the gradient of whatever reads them."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, width))

    @property
    def table(self) -> Tensor:
        """The rows as they are read, `(K, E)`."""
        return self.weight


class NearestCodebook(Moving):
    """Rows that are looked up by their distance, kept alive, and moved by averages or by gradients.

    With `decay`, every row follows the mean of the vectors assigned to it: N <- decay N + (1 - decay) n and the sums
    likewise, row = sum / N (Laplace-smoothed N). Without, rows learn by the gradient of the codebook loss. Either way a
    row whose average number of vectors in a batch falls below `restart` of an even share, a batch's vectors over K, is
    put at a vector drawn from the batch, and counts as one of an even share: it has time to be found.

    A forward pass in training mode notes what was assigned; `after_step` moves. Nothing waits for the device.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937, appendix A.1
        Jukebox (Dhariwal et al., 2020), https://arxiv.org/abs/2005.00341 (restarts)

    Arguments:
        codes: K.
        width: E.
        decay: of the averages; None for gradients.
        restart: the share of an even use below which a row is dead; 0 never moves one.
        unit: keep rows, and compare vectors, on the unit sphere.
    """

    counts: Tensor
    sums: Tensor
    batch_counts: Tensor
    batch_sums: Tensor
    spare: Tensor

    def __init__(self, codes: int, width: int, decay: float | None, restart: float, unit: bool) -> None:
        super().__init__()
        self.decay, self.restart, self.unit = decay, restart, unit
        start = torch.empty(codes, width).uniform_(-1, 1) / (1 if unit else codes)
        if decay is None:
            self.weight = nn.Parameter(start)
        else:
            self.register_buffer("weight", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("batch_counts", torch.zeros(codes), persistent=False)
        self.register_buffer("batch_sums", torch.zeros(codes, width), persistent=False)
        self.register_buffer("spare", torch.zeros(codes, width), persistent=False)

    @property
    def table(self) -> Tensor:
        """The rows as they are read, `(K, E)`."""
        return normalize(self.weight, dim=-1) if self.unit else self.weight

    def place(self, z: Tensor) -> Tensor:
        """Vectors `(..., E)` as they are compared."""
        return normalize(z, dim=-1) if self.unit else z

    def scores(self, z: Tensor) -> Tensor:
        """2 z.e_k - |e_k|^2 of `(m, E)`, `(m, K)`: largest where the distance is least."""
        table = self.table.detach()
        return torch.addmm(-table.square().sum(1), z, table.T, alpha=2)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """The code nearest to each of `(..., E)`, `(...)`, int64; in training it is noted who is near whom."""
        flat = z.reshape(-1, z.shape[-1])
        rows = max(1, BLOCK_DISTANCES // len(self.counts))
        if len(flat) <= rows:
            index = self.scores(flat).argmax(1)
        else:
            index = torch.cat([self.scores(part).argmax(1) for part in flat.split(rows)])
        if self.training:
            self._note(flat, index)
        return index.reshape(z.shape[:-1])

    def _note(self, flat: Tensor, index: Tensor) -> None:
        flat = flat.to(self.counts)
        # A batch that is not finite counts for nothing.
        sound = flat.sum().isfinite().to(self.counts)
        self.batch_counts.zero_().index_add_(0, index, sound.expand(len(flat)))
        if self.decay is not None:
            self.batch_sums.zero_().index_add_(0, index, flat)
        if self.restart:
            self.spare.copy_(flat[torch.randint(len(flat), (len(self.counts),), device=flat.device)])

    @torch.no_grad()
    def after_step(self) -> None:
        """Averages and rows follow the batch; dead rows move to vectors of it. One that is not finite moves nothing."""
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
        """Put the rows at the centres that k-means finds of vectors `(m, E)`, as if `batch` of them came in a step."""
        from sklearn.cluster import KMeans  # here, because it takes a second to import

        z = self.place(z)[:START_VECTORS]
        codes, distinct = len(self.counts), len(z.unique(dim=0))
        if distinct < codes:  # fewer vectors than codes: the rest wait to be restarted
            return
        found = KMeans(codes, n_init=1, max_iter=20, random_state=seed).fit(z.double().cpu().numpy())
        centres = torch.from_numpy(found.cluster_centers_).to(self.weight)
        share = torch.from_numpy(found.labels_).bincount(minlength=codes).to(self.counts) / len(z)
        self.weight.copy_(self.place(centres))
        self.counts.copy_(share * batch)
        if self.decay is not None:
            self.sums.copy_(self.weight * self.counts[:, None])


SMOOTHING = 1e-5
"""Vectors that every row is given beside its own."""
USE_DECAY = 0.99
"""Decay of the average use of rows that gradients move."""
