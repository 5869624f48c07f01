"""Draws of a pair over a data set, chunk by chunk: what surgery, evidence and the report read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pvae import seeds
from pvae.analysis.aggregated import normal_parameters
from pvae.errors import DeclarationError
from pvae.pair import Pair
from pvae.pair import quiet as quiet_pair
from pvae.traces import Layout, closed_kl, log_prob, rows_first, samples

CHUNK = 1000


def accept(pair: Pair, x: Any) -> Tensor:
    """`Pair.accept`, with a word for whoever passes something else than a pair."""
    if not isinstance(pair, Pair):
        hint = " Pass its .pair." if isinstance(getattr(pair, "pair", None), Pair) else ""
        raise DeclarationError(f"pair: expected a pvae.Pair; got {type(pair).__name__}.{hint}")
    return pair.accept(x)


@contextmanager
def quiet(pair: Pair, x: Tensor, seed: int) -> Iterator[None]:
    """`pvae.pair.quiet` with the draws of an analysis seeded."""
    with quiet_pair(pair, x):
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        yield


@dataclass
class LatentDraw:
    """One draw of one latent for every datum, float64."""

    value: Tensor
    """`(n, D)`, event dimensions flattened."""
    log_q: Tensor
    """log q(z | x, latents before it), `(n,)`."""
    log_p: Tensor
    """log p(z | parents), `(n,)`."""
    loc: Tensor | None
    """Location of a diagonal normal posterior, `(n, D)`; None for other posteriors."""
    scale: Tensor | None
    """Its scale."""
    prior_loc: Tensor | None
    """Location of a diagonal normal prior, broadcast to `(n, D)`."""
    prior_scale: Tensor | None
    """Its scale."""
    kl: Tensor | None
    """KL(q || p) in closed form where torch knows it, `(n,)`."""


@dataclass
class Draw:
    """One draw of all latents for every datum."""

    reconstruction: Tensor
    """log p(x | z), `(n,)`, float64."""
    latents: dict[str, LatentDraw]
    shared: dict[str, float]
    """log q - log p of every global latent, nats for the whole data set."""


def _double(node: Any, pair: Pair) -> Tensor:
    """Log density per datum in float64: of the same parameters where they are normal, else as the site computes it."""
    parameters = normal_parameters(node["fn"])
    if parameters is None:
        return log_prob(node, pair.layout, 0).double()
    wide = {**node, "fn": node["fn"], "value": node["value"].double()}
    return log_prob(wide, pair.layout, 0).double()


def draw_chunk(pair: Pair, x: Tensor) -> Draw:
    """One draw for the rows of a chunk."""
    guide_trace, model_trace = (samples(trace) for trace in pair.traces(x))
    n, layout = len(x), pair.layout
    reconstruction = sum(log_prob(model_trace[name], layout, 0).double() for name in layout.observed)
    latents = {}
    for name in layout.latents:
        q, p = guide_trace[name], model_trace.get(name)
        parameters = normal_parameters(q["fn"])
        prior = normal_parameters(p["fn"]) if p else None
        latents[name] = LatentDraw(
            value=rows_first(q["value"], q, layout, n).double(),
            log_q=_double(q, pair),
            log_p=_double(p, pair) if p else torch.zeros(n, dtype=torch.float64, device=x.device),
            loc=rows_first(parameters[0], q, layout, n).double() if parameters else None,
            scale=rows_first(parameters[1], q, layout, n).double() if parameters else None,
            prior_loc=rows_first(prior[0], p, layout, n).double() if p and prior else None,
            prior_scale=rows_first(prior[1], p, layout, n).double() if p and prior else None,
            kl=_closed(q, p, layout) if p else None,
        )
    shared = {}
    for name in layout.shared:
        q, p = guide_trace[name], model_trace.get(name)
        shared[name] = float(q["fn"].log_prob(q["value"]).sum() - (p["fn"].log_prob(p["value"]).sum() if p else 0.0))
    return Draw(torch.as_tensor(reconstruction), latents, shared)


def _closed(q: Any, p: Any, layout: Layout) -> Tensor | None:
    value = closed_kl(q, p, layout, 0, 1)
    return None if value is None else value.double()


def draw(pair: Pair, x: Tensor, chunk: int = CHUNK) -> Draw:
    """One draw for every row of `x`, `chunk` rows at a time."""
    parts = [draw_chunk(pair, x[start : start + chunk]) for start in range(0, len(x), chunk)]
    latents = {name: _joined([p.latents[name] for p in parts]) for name in parts[0].latents}
    return Draw(torch.cat([p.reconstruction for p in parts]), latents, parts[0].shared)


def _joined(parts: list[LatentDraw]) -> LatentDraw:
    """Chunks of one latent in a row."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(LatentDraw)}
    joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
    return LatentDraw(**joined)
