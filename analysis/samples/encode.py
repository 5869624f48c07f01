"""Encoding of data into latents, and reconstruction of data from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, LowRankMultivariateNormal, MultivariateNormal

from pvae.analysis.decompose.entry import accept
from pvae.analysis.export.sites import parameters_of
from pvae.analysis.samples.generated import Encoding, LatentCode, Reconstructions
from pvae.analysis.samples.running import analysed, by_chunks, centre, datum, decoded_mean, opened, row_values
from pvae.pair.densities import log_prob, sum_over
from pvae.pair.enumeration import JointStates, read_joint_states
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util import seeds
from pvae.util.progress import Progress, silent


def encode(
    run_or_pair: Run | Pair, x: Any, *, mean: bool = False, seed: int = 0, on_progress: Progress = silent
) -> Encoding:
    """Encode rows of data: sample z ~ q(z | x), or take the centre of q(z | x).

    With `mean` every latent is its posterior mean, and a discrete one its most probable value. In a hierarchy the means
    are passed down: all but the first are means given the means of the latents before, not averages over samples.
    Posteriors without a known mean (flows) are sampled all the same; see `is_draw`. Sites that the model sums out
    have no guide: their posterior p(c | x, z) is exact, at the z of this result.

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mean: return centres instead of samples.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows done, n).

    Returns:
        Encoding: for every latent its value, its log q (nats, exact), and loc, scale or probabilities where the
        posterior has them.

    Raises:
        DataError: x has no rows, or rows of another shape.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> encode(pair, x, mean=True)["z"].shape == (len(x), 2)
        True
    """
    pair = opened(run_or_pair)
    x = accept(pair, x)
    with analysed(pair, x, seed, mean):
        codes = by_chunks(lambda *at: _encoded(pair, x[slice(*at)], mean)[0], len(x), x[0].numel(), on_progress)
    return Encoding(codes)


def _encoded(pair: Pair, x: Tensor, mean: bool) -> tuple[dict[str, LatentCode], dict[str, Tensor]]:
    """Return the codes of a chunk of rows, and the values of all latents, global ones too, as their sites have them."""
    layout, count = pair.layout, len(x)
    guide_trace, model_trace = pair.traces(x) if layout.enumerated else (pair.guide_trace(x), None)
    nodes = samples(guide_trace)
    codes = {name: _code(nodes[name], layout, count, mean) for name in layout.latents}
    values = {name: nodes[name]["value"] for name in (*layout.latents, *layout.shared)}
    if model_trace is not None:
        for name, code, value in _summed(
            read_joint_states(samples(model_trace), layout, 0), samples(model_trace), mean
        ):
            codes[name], values[name] = code, value
    return codes, values


def _code(node: Mapping[str, Any], layout: Layout, count: int, mean: bool) -> LatentCode:
    shown = {key: t.cpu() for key, t in parameters_of(node, layout, count).items()}
    fn = unwrapped(node["fn"])
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        shown = {"loc": row_values(fn.loc, node, layout, count), "scale": row_values(fn.stddev, node, layout, count)}
    return LatentCode(
        value=row_values(node["value"], node, layout, count),
        log_q=log_prob(node, layout, 0).double().cpu(),
        loc=shown.get("loc"),
        scale=shown.get("scale"),
        probs=shown.get("probs"),
        is_draw=not mean or centre(node["fn"]) is None,
    )


def _summed(table: JointStates, nodes: Mapping[str, Any], mean: bool) -> Iterator[tuple[str, LatentCode, Tensor]]:
    """Yield name, code and site value of every latent that the model sums out, sampled in order from p(c | x, z).

    With `mean` the value of each is the most probable one, given those before it.
    """
    layout, rest = table.layout, table.joint.double().flatten(0, len(table.sizes) - 1).log_softmax(0)
    rest = rest.reshape(table.joint.shape)  # (K_j, ..., K_J, n) given the codes before
    count = rest.shape[-1]
    every = torch.arange(count, device=rest.device)
    for j, name in enumerate(layout.enumerated):
        log_p = rest.reshape(table.sizes[j], -1, count).logsumexp(1).log_softmax(0).T
        index = log_p.argmax(-1) if mean else Categorical(logits=log_p).sample()
        rest = rest.movedim(-1, 0)[every, index].movedim(0, -1)
        probs = table.weights.movedim(j, 0).reshape(table.sizes[j], -1, count).sum(1).T
        fn = nodes[name]["fn"]
        states = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
        value = states[index]
        spread = value.reshape(count, *(1,) * (-layout.dim - 1), *fn.event_shape)
        yield name, LatentCode(value.cpu(), log_p[every, index].cpu(), None, None, probs.cpu(), not mean), spread


def reconstruct(
    run_or_pair: Run | Pair, x: Any, *, mean: bool = True, seed: int = 0, on_progress: Progress = silent
) -> Reconstructions:
    """Encode rows of data with a sample z ~ q(z | x), and decode them again.

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mean: return E[x | z], else a sample of p(x | z).
        seed: seed of the samples; the same seed gives the same z for both values of `mean`.
        on_progress: called with (rows done, n).

    Returns:
        Reconstructions: x `(n, *shape)`, and log p(x | z) of the data at the same z, nats; its mean over samples is the
        reconstruction term of the ELBO. Codes that the model sums out are sampled from p(c | x, z).

    Raises:
        DataError: x has no rows, or rows of another shape.
        DeclarationError: the likelihood has no `mean`.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> reconstruct(pair, x).x.shape == x.shape
        True
    """
    pair = opened(run_or_pair)
    x = accept(pair, x)
    layout = pair.layout

    def decoded(start: int, stop: int) -> Reconstructions:
        part, count = x[start:stop], stop - start
        codes, values = _encoded(pair, part, mean=False)
        nodes = samples(pair.model_trace(part, values))
        log_p = sum_over([log_prob(nodes[name], layout, 0, len(x)).double() for name in layout.observed])
        node = datum(layout, nodes)
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 4 + start), x.device)
            found = decoded_mean(node, layout, count) if mean else row_values(node["fn"].sample(), node, layout, count)
        latents = {name: code.value for name, code in codes.items()}
        return Reconstructions(found, log_p.expand(count).cpu(), latents, mean)

    with analysed(pair, x, seed):
        return by_chunks(decoded, len(x), x[0].numel(), on_progress)
