"""Held-out data under a pair: the mean terms of its ELBO."""

from __future__ import annotations

from torch import Tensor

from pvae.data.streamed import Streamed
from pvae.distributions.relaxed import Discretised
from pvae.pair.pair import Pair
from pvae.pair.running import quiet
from pvae.util import seeds

CHUNK = 1000
"""Most rows at a time."""
DECODED = 32_000
"""Most rows that are decoded at a time where every joint state of a code is."""


def evaluate(pair: Pair, x: Tensor | Streamed, seed: int, rows: int | None = None) -> dict[str, float]:
    """Mean ELBO terms of `x` with one draw per datum, nats per datum; moves no weight and no random state.

    Relaxed latents are taken as the codes they stand for; the ELBO of the relaxed ones is `relaxed_elbo`.

    Arguments:
        pair: a pair on the device of `x`.
        x: data `(n, *event)`, read piece by piece where they are streamed.
        seed: of the draws; the same seed, the same number.
        rows: how many data share the KL of global latents: those they were fitted to; those of `x` unless said.
    """
    with quiet(pair, x[:1]):
        with Discretised():
            row = _mean_terms(pair, x, seed, rows)
        if pair.layout.relaxed:
            row["relaxed_elbo"] = _mean_terms(pair, x, seed, rows)["elbo"]
    return row


def _mean_terms(pair: Pair, x: Tensor | Streamed, seed: int, rows: int | None) -> dict[str, float]:
    totals: dict[str, float] = {}
    chunk = max(1, min(CHUNK, DECODED // pair.adopt(x[:2]).structure.states))
    for start in range(0, len(x), chunk):
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION, start), x.device)
        terms = pair.terms(pair.accept(x[start : start + chunk]), rows=rows or len(x), expected=True)
        kl = {f"kl/{name}": value.expand_as(terms.reconstruction) for name, value in terms.kl.items()}
        for key, value in {"reconstruction": terms.reconstruction, **kl}.items():
            totals[key] = totals.get(key, 0.0) + float(value.double().sum())
    means = {key: value / len(x) for key, value in totals.items()}
    total_kl = sum(value for key, value in means.items() if key.startswith("kl/"))
    return {"elbo": means["reconstruction"] - total_kl, "kl": total_kl, **means}
