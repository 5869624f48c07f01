"""Initialisation from training data: codebooks at cluster centres, pseudo-inputs at data rows, and the like."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pvae.data import Split
from pvae.graph.lifecycle import Begun
from pvae.pair import Pair, quiet
from pvae.training.evaluation import ROWS_AT_ONCE
from pvae.util import Record, seeds


class TrainingRows(Record):
    """Random subsets of the training data, and guide outputs on them, for modules that are initialised from data."""

    pair: Pair
    data: Split
    batch: int
    seed: int

    def observed(self, count: int, stream: int) -> Tensor:
        """Return a random subset of at most `count` training points without covariates, `(m, *x)`."""
        return self.data.observed(self.data.rows[self._subset(count, stream)])

    def inferred(self, site: str, count: int, stream: int) -> list[Mapping[str, Any]]:
        """Run the guide on at most `count` random training rows; return the `infer` dict of a site, one per batch."""
        with quiet(self.pair, self.data.rows[:1]):
            seeds.set_noise(seeds.mix(self.seed, seeds.ORDER, stream + 1), self.data.rows.device)
            batches = (self.data.draw(index) for index in self._subset(count, stream).split(ROWS_AT_ONCE))
            nodes = [self.pair.guide_trace(self.pair.accept(x)).nodes[site] for x in batches]
        return [node["infer"] or {} for node in nodes]

    def _subset(self, count: int, stream: int) -> Tensor:
        return seeds.subset(len(self.data), count, seeds.mix(self.seed, seeds.ORDER, stream)).to(self.data.rows.device)


def begin(pair: Pair, data: Split, batch: int, seed: int) -> None:
    """Initialise the trained modules that start from training data, in the order in which the pair holds them."""
    rows = TrainingRows(pair, data, batch, seed)
    for part in pair.modules():
        if isinstance(part, Begun) and part.training:
            part.begin(rows)
