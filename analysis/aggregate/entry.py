"""First steps of every analysis of a pair: check or simulate data, seed the noise, fix a sample of global latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.analysis.figures.estimate import misdeclared, refuse, text
from pvae.distributions import missing, relaxed
from pvae.errors import DataError
from pvae.pair import Pair, Unweighed, require_bound, running, samples
from pvae.util import memory, seeds


def accept(
    pair: Pair, x: Any, *, guide: bool = True, known: bool = True, holes: bool = False, mixed: bool = False
) -> Tensor:
    """Return data as the tensor that the pair scores, `(n, *event)`; refuse pairs without a likelihood.

    Arguments:
        pair: the pair.
        x: data `(n, *event)`.
        guide: False for an analysis that does without the guide, whose latents may then be others than the model's.
        known: False for an analysis that infers every latent, which rows with the value of one are no data of.
        mixed: True for an analysis of rows of which some hold the value of a latent and others do not.
        holes: True for an analysis that takes missing values (NaN) of a declared pair whose likelihood does not.

    Raises:
        DeclarationError: `pair` is no `pvae.Pair`, or the guide has latents that the model lacks.
        DataError: the pair has no likelihood, or rows do not fit it; or some hold the value of a latent and others do
            not, or the analysis is of none that do.
    """
    has_pair = isinstance(getattr(pair, "pair", None), Pair)
    misdeclared(not isinstance(pair, Pair), "refused.no_pair", found=pair, has_pair=has_pair)
    refuse(pair.implicit, "refused.no_likelihood")
    rows = pair.accept(x)
    if guide:
        require_bound(pair.structure.guide_only)
    pair.frame.require(rows, mixed=mixed)
    names = [] if guide and known else sorted(pair.frame.known(rows, every=False))
    refuse(names, "refused.known", names=names)
    takes = holes or getattr(getattr(pair.model, "decoder", None), "takes_missing", True)  # or a hand-written pair
    if not takes and bool((x := pair.frame.split(rows)[0]).isnan().any()):
        raise DataError(text("refused.holes", row=int(x.flatten(1).isnan().any(1).nonzero()[0])))
    return rows


@contextmanager
def quiet(pair: Pair, x: Tensor, seed: int) -> Iterator[None]:
    """Context of an analysis: evaluation mode, no gradients, seeded noise and no weights from poutine.scale.

    Weights that poutine.scale puts on the terms of a loss are not part of the ELBO that is analysed. Relaxed latents
    are replaced by the discrete codes they stand for.
    """
    with running.quiet(pair, x), Unweighed(), relaxed.Discretised(pair.relaxed):
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        yield


def require_room(pair: Pair, caller: str, data: int, numbers: float, what: str) -> None:
    """Refuse an analysis that keeps so many data with their latents, and further numbers, where memory is too small.

    Raises:
        DataError: the message gives the memory that they need; `what` is to be lowered.
    """
    row = prod(pair.frame.row) + sum(shape.numel for shape in pair.structure.shapes.values())
    memory.require_memory(8 * (data * row + numbers), caller, what, "Ask for fewer.")


def require_counts(caller: str, **counts: int) -> None:
    """Refuse settings of an analysis that are below one.

    Raises:
        DataError: the message names the first of them.
    """
    for name, count in counts.items():
        refuse(count < 1, f"{caller}: expected {name} of at least 1; got {count}.")


def require_likelihood(pair: Pair, caller: str) -> None:
    """Refuse a pair in which z determines x, as in a flow: log p(x | z) is defined only at the guide's own z.

    Raises:
        DataError: z determines x; the message names the observed sites.
    """
    refuse(found := pair.structure.determined, "refused.determined", caller=caller, names=found)


@contextmanager
def same_globals(pair: Pair, x: Tensor) -> Iterator[dict[str, Any]]:
    """Context in which all runs of guide and model reuse one sample of the global latents; yields its trace nodes."""
    if not pair.layout.shared:
        yield {}
        return
    nodes, fixed = samples(pair.guide_trace(pair.structure.few(x))), poutine.Trace()
    shared = {name: nodes[name] for name in pair.layout.shared}
    fixed.nodes.update(shared)
    with poutine.replay(trace=fixed):
        yield shared


def simulated(pair: Pair, like: Tensor, caller: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return data and latents sampled from the model, one row for each of `like`, whose covariates are kept.

    So are its missing elements (NaN), unless the model samples which are missing.

    Raises:
        DataError: the model observes something else than its data; the message begins with `caller`.
    """
    trace, given = samples(pair.simulate(like)), pair.frame.covariates
    values = {name: node["value"] for name, node in trace.items() if name not in pair.layout.observed}
    found = {name: trace[name]["value"] for name in pair.layout.observed if name in trace and name not in given}
    hides = {name: fn.hidden(found[name]) for name in found if isinstance(fn := trace[name]["fn"], missing.Absence)}
    x = _placed(pair, like, found := found | hides)
    if x is not None and not pair.frame.entries:
        seen = samples(pair.model_trace(x, values))
        again = {name: seen[name]["value"].to(v.dtype).reshape(v.shape) for name, v in found.items()}
        x = x if all(torch.allclose(again[name], v, 0, 0, equal_nan=True) for name, v in found.items()) else None
    if x is None:
        raise DataError(text("refused.parts_observed", caller=caller, found=found, like=list(like.shape)))
    gone = like.isnan()
    return x if hides or not bool(gone.any()) else x.masked_fill(gone, torch.nan), values


def _placed(pair: Pair, like: Tensor, found: dict[str, Tensor]) -> Tensor | None:
    """Return rows `like` with simulated values of the observed sites in place of what the sites observe there."""
    if pair.arguments is None:
        (value, *rest) = found.values()
        if rest or (value.numel() != like.numel() and not pair.frame.entries):
            return None
        return pair.frame.join(value if pair.frame.entries else value.to(like.dtype).reshape(like.shape), like)
    seen, (args, named) = samples(pair.model_trace(like)), pair.arguments.unpack(like)
    parts: dict[Any, Tensor] = dict(enumerate(args)) | named
    for name, value in found.items():
        held = seen[name]["value"]
        fit = {key: part for key, part in parts.items() if part.numel() == held.numel()}
        at = [key for key, part in fit.items() if torch.equal(held.reshape(part.shape).to(part.dtype), part)]
        if len(at) != 1:
            return None
        parts[at[0]] = value.reshape(parts[at[0]].shape).to(parts[at[0]].dtype)
    return pair.arguments.pack(parts if named else list(parts.values())).to(like)
