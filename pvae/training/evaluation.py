"""Evaluation on held-out data: mean ELBO, reconstruction term and KL terms, in nats per datum."""

from __future__ import annotations

from torch import Tensor

from pvae.data.streamed import Streamed
from pvae.distributions.relaxed import Discretised
from pvae.pair.pair import Pair
from pvae.pair.running import quiet
from pvae.util import seeds

ROWS_AT_ONCE = 1000
"""Largest number of rows in one evaluation batch."""
DECODED_AT_ONCE = 32_000
"""Largest number of decoder inputs in one evaluation batch: its rows times the joint states of the discrete latents
that are summed over."""


def evaluate(pair: Pair, x: Tensor | Streamed, seed: int, rows: int | None = None) -> dict[str, float]:
    """Return the mean ELBO terms of `x` with one sample of z per datum; changes no weight and no random state.

    Relaxed (Concrete) latents are replaced by categorical ones with the same logits; `relaxed_elbo` is the ELBO of the
    relaxed ones.

    Arguments:
        pair: a pair on the device of `x`.
        x: data `(n, *event)`, read piece by piece where they are streamed.
        seed: seed of the samples; the same seed gives the same values.
        rows: size of the data set over which the KL of global latents is divided, that of the training set; default:
            the number of rows of `x`.

    Returns:
        `elbo`, `reconstruction`, `kl` and `kl/<latent>`, estimates in nats per datum, and `penalty/<factor>` of the
        observed sites of a hand-written guide, which are no part of the ELBO.
    """
    with quiet(pair, x[:1]):
        with Discretised(pair.relaxed):
            row = _mean_terms(pair, x, seed, rows)
        if pair.layout.relaxed:
            row["relaxed_elbo"] = _mean_terms(pair, x, seed, rows)["elbo"]
    return row


def _mean_terms(pair: Pair, x: Tensor | Streamed, seed: int, rows: int | None) -> dict[str, float]:
    totals: dict[str, float] = {}
    chunk = max(1, min(ROWS_AT_ONCE, DECODED_AT_ONCE // pair.adopt(x[:2]).structure.states))
    for start in range(0, len(x), chunk):
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION, start), x.device)
        terms = pair.terms(pair.accept(x[start : start + chunk]), rows=rows or len(x), expected=True)
        kl = {f"kl/{name}": value.expand_as(terms.reconstruction) for name, value in terms.kl.items()}
        factors = {f"penalty/{name}": terms.penalties[name] for name in pair.layout.factors if name in terms.penalties}
        factors = {name: value.expand_as(terms.reconstruction) for name, value in factors.items()}
        for key, value in {"reconstruction": terms.reconstruction, **kl, **factors}.items():
            totals[key] = totals.get(key, 0.0) + float(value.double().sum())
    means = {key: value / len(x) for key, value in totals.items()}
    total_kl = sum(value for key, value in means.items() if key.startswith("kl/"))
    return {"elbo": means["reconstruction"] - total_kl, "kl": total_kl, **means}
