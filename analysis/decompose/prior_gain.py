"""ELBO gain of a new prior with encoder and decoder unchanged, and the marginal KL, which is its upper bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.result import Surgery, side_by_side
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, over_draws
from pvae.errors import DataError
from pvae.pair.pair import Pair

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
    def promised(self) -> Estimate | None:
        """Marginal KL under the old prior: an upper bound of the gain on these data; None for deterministic codes."""
        return self.before.marginal_kl

    def sentence(self) -> str:
        """Return the gain and its upper bound as a sentence."""
        won = f"gained {self.gained.value:.3f} +- {self.gained.standard_error:.3f} nats per datum"
        if self.promised is None:
            return f"{won}; for a deterministic code no marginal KL says how much there was to win"
        share = f" ({100 * self.gained.value / self.promised.value:.0f} %)" if self.promised.value > 0 else ""
        return f"{won} of the {self.promised.value:.3f} that the marginal KL had promised{share}"

    def to_dict(self) -> dict[str, Any]:
        """Return the gain, its upper bound and both surgeries as plain numbers and strings for JSON."""
        return {
            "unit": "nats per datum",
            "gained": self.gained.to_dict(),
            "promised": None if self.promised is None else self.promised.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

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
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Gain:
    """Return the ELBO gain of a new prior, measured on the same samples, and the surgeries before and after.

    Arguments:
        before: the pair with the old prior.
        after: the pair with the new prior and the same encoder and decoder.
        x: data `(n, *event)`.
        samples: samples per row.
        seed: seed of the samples.
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
    differences = []
    terms = []
    for pair in (before, after):
        with quiet(pair, x, seed):
            terms.append([_nats(pair, x) for _ in range(samples)])
    for (z_before, one), (z_after, other) in zip(*terms, strict=True):
        if not torch.equal(z_before, z_after):
            raise DataError("gain: expected one encoder under two priors; got guides that draw different latents.")
        differences.append(other - one)
    gained = over_draws(torch.stack(differences))
    found = []
    for i, pair in enumerate((before, after)):
        found.append(surgery(pair, x, samples=samples, seed=seed, population=None if i else "rows"))
        on_progress(i + 1, 2)
    return Gain(found[0], found[1], gained)


def _nats(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one sample of all latents, `(n, D)`, and its log p(x, z), `(n,)`, nats."""
    d = draw(pair, x)
    scores = [latent.log_p for latent in d.latents.values()]
    return d.flat(list(d.latents)), d.reconstruction + torch.stack(scores).sum(0)
