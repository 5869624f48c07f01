"""ELBO gain of a new prior with encoder and decoder unchanged, beside the interval for new data before the change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet
from pvae.analysis.decompose.new_data import Asked
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.result import Surgery, side_by_side
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, over_draws
from pvae.analysis.population.result import Population
from pvae.errors import DataError
from pvae.pair.pair import Pair
from pvae.util.files import plain

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Gain:
    """ELBO gain of a new prior: surgeries of one data set before and after the change; nats per datum."""

    before: Surgery
    after: Surgery
    gained: Estimate
    """ELBO after minus ELBO before on the same samples: E[log p_after(z) - log p_before(z)]."""

    @property
    def interval(self) -> Population | None:
        """Interval for what a better prior wins on new data, under the old prior; None where the surgery has none."""
        return self.before.population

    def sentence(self) -> str:
        """Return the gain as a sentence, beside the interval that new data had before the change."""
        won = f"gained {self.gained.value:.3f} +- {self.gained.standard_error:.3f} nats per datum"
        if self.interval is not None:
            return f"{won}; the interval on new data before the refit was {self.interval.interval}"
        seen = "the new prior was fitted on these rows, so that this is no gain on new data"
        return f"{won}; {seen if self.before.seen else 'there is no interval for new data'}"

    def to_dict(self) -> dict[str, Any]:
        """Return the gain, the interval before it and both surgeries as plain numbers and strings for JSON."""
        parts = ("gained", "interval", "before", "after")
        return dict(plain({"unit": "nats per datum", **{name: getattr(self, name) for name in parts}}))

    def __str__(self) -> str:
        return self.sentence()

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(side_by_side({"before": self.before, "after": self.after}), Text(self.sentence()))


def gain(
    before: Pair,
    after: Pair,
    x: Tensor,
    samples: int = 1,
    seed: int = 0,
    *,
    seen: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Gain:
    """Return the ELBO gain of a new prior, measured on the same samples, and the surgeries before and after.

    Arguments:
        before: the pair with the old prior.
        after: the pair with the new prior and the same encoder and decoder.
        x: data `(n, *event)`.
        samples: samples per row.
        seed: seed of the samples.
        seen: True for rows that either pair was fitted on; there is then no interval for new data.
        on_progress: called with (surgeries done, surgeries in all).

    Returns:
        Gain, nats per datum; `gained` is an estimate whose Monte Carlo error is that of paired differences.

    Raises:
        DataError: the two guides sample different latents.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> gain(pair, pair, torch.zeros(4, 1, 8, 8)).gained.value
        0.0
    """
    accept(after, x)
    x = accept(before, x)
    terms = []
    for pair in (before, after):
        with quiet(pair, x, seed):
            terms.append([_nats(pair, x) for _ in range(samples)])
    pairs = list(zip(*terms, strict=True))
    if not all(torch.equal(one[0], other[0]) for one, other in pairs):
        raise DataError("gain: expected one encoder under two priors; got guides that draw different latents.")
    gained = over_draws(torch.stack([other[1] - one[1] for one, other in pairs]))
    found = []
    for i, pair in enumerate((before, after)):
        asked: Asked | None = None if i else "rows"
        found.append(surgery(pair, x, samples=samples, seed=seed, seen=seen, population=asked))
        on_progress(i + 1, 2)
    return Gain(found[0], found[1], gained)


def _nats(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one sample of all latents, `(n, D)`, and its log p(x, z), `(n,)`, nats."""
    d = draw(pair, x)
    scores = [latent.log_p for latent in d.latents.values()]
    return d.flat(list(d.latents)), d.reconstruction + torch.stack(scores).sum(0)
