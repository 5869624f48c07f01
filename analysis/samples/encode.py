"""Encoding of data into latents, and reconstruction of data from them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import accept
from pvae.analysis.export.sites import parameters_of, rows_of
from pvae.analysis.samples import running, sample
from pvae.pair import JointStates, Layout, Pair, log_prob, read_joint_states, samples, sum_over, unwrapped
from pvae.runs.run import Run
from pvae.util import Progress, Record, seeds, silent


class LatentCode(Record, eq=False):
    """Posterior of one latent for n data: a value, its log density, and the parameters of the posterior if known."""

    value: Tensor
    """Sample of q(z | x), or its centre (the mean; of a discrete latent the mode), `(n, *event)`."""
    log_q: Tensor
    """Log q of `value` given x and the latents that precede it in the guide, nats, `(n,)`, float64; exact."""
    loc: Tensor | None
    """Mean of a normal posterior, `(n, *event)`; None for other posteriors."""
    scale: Tensor | None
    """Standard deviations of a normal posterior, `(n, *event)`; None for other posteriors."""
    probs: Tensor | None
    """Probabilities of a discrete posterior, `(n, ...)`, or p(c | x, z), `(n, K)`, of a latent that the model sums out.
    None for other posteriors, for deterministic codes, and for more than 4096 probabilities per datum."""
    is_draw: bool
    """True if `value` is a sample of the posterior, False if it is its centre."""


class Encoding(running.Generated):
    """Latents inferred from rows of data; the result of `encode`.

    `save` has keys `latents/<name>`, `log_q/<name>` and, where known, `loc/<name>`, `scale/<name>`, `probs/<name>`.
    """

    latents: dict[str, LatentCode]
    """Posterior of each latent by name: those of the guide in its order, then discrete ones that the model sums out."""

    @property
    def log_q(self) -> Tensor:
        """Joint log q(z | x) of all latents, nats, `(n,)`, float64."""
        return sum_over([code.log_q for code in self.latents.values()])

    def __getitem__(self, name: str) -> Tensor:
        """Return the value of a latent by its name, `(n, *event)`."""
        return self.latents[running.known_name(name, self.latents, "encode")].value

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for field in ("value", "log_q", "loc", "scale", "probs"):
            known = {name: getattr(code, field) for name, code in self.latents.items()}
            found |= running.named("latents" if field == "value" else field, known)
        return found


class Reconstructions(running.Generated):
    """Data decoded from their latents; the result of `reconstruct`. `save` has keys `x`, `log_p`, `latents/<name>`."""

    x: Tensor
    """Means of p(x | z), or samples, `(n, *shape)`."""
    log_p: Tensor
    """log p(x | z) of the data, nats, `(n,)`, float64; exact at the given z."""
    latents: dict[str, Tensor]
    """Decoded latents z by name, sampled from q(z | x), `(n, *event)`."""
    is_mean: bool
    """True if x are means of p(x | z)."""


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
    pair = running.opened(run_or_pair)
    x = accept(pair, x)
    with running.analysed(pair, x, seed, mean):
        n, numbers = len(x), x[0].numel()
        return running.by_chunks(lambda *at: Encoding(_encoded(pair, x[slice(*at)], mean)[0]), n, numbers, on_progress)


def _encoded(pair: Pair, x: Tensor, mean: bool) -> tuple[dict[str, LatentCode], dict[str, Tensor]]:
    """Return the codes of a chunk of rows, and the values of all latents, global ones too, as their sites have them."""
    layout, count = pair.layout, len(x)
    guide_trace, model_trace = pair.traces(x) if layout.enumerated else (pair.guide_trace(x), None)
    nodes = samples(guide_trace)
    codes = {name: _code(nodes[name], layout, count, mean) for name in layout.latents}
    values = {name: nodes[name]["value"] for name in (*layout.latents, *layout.shared)}
    if model_trace is not None:
        summed = samples(model_trace)
        for name, code, value in summed_codes(read_joint_states(summed, layout, 0), summed, mean):
            codes[name], values[name] = code, value
    return codes, values


def _code(node: Mapping[str, Any], layout: Layout, count: int, mean: bool) -> LatentCode:
    shown, fn = parameters_of(node, layout, count), unwrapped(node["fn"])
    if isinstance(fn, distributions.MultivariateNormal | distributions.LowRankMultivariateNormal):
        shown = {key: rows_of(t, node, layout, count) for key, t in (("loc", fn.loc), ("scale", fn.stddev))}
    parts = {key: shown[key].cpu() if key in shown else None for key in ("loc", "scale", "probs")}
    log_q, is_draw = log_prob(node, layout, 0).double().cpu(), not mean or running.centre(node["fn"]) is None
    return LatentCode(running.row_values(node["value"], node, layout, count), log_q, **parts, is_draw=is_draw)


def summed_codes(table: JointStates, nodes: Mapping[str, Any], mean: bool) -> Iterator[tuple[str, LatentCode, Tensor]]:
    """Yield name, code and site value of every latent that the model sums out, sampled in order from p(c | x, z).

    With `mean` the value of each is the most probable one, given those before it.
    """
    layout, rest = table.layout, table.joint.double().flatten(0, len(table.sizes) - 1).log_softmax(0)
    rest = rest.reshape(table.joint.shape)  # (K_j, ..., K_J, n) given the codes before
    count = rest.shape[-1]
    every = torch.arange(count, device=rest.device)
    for j, name in enumerate(layout.enumerated):
        log_p = rest.reshape(table.sizes[j], -1, count).logsumexp(1).log_softmax(0).T
        index = log_p.argmax(-1) if mean else distributions.Categorical(logits=log_p).sample()
        rest = rest.movedim(-1, 0)[every, index].movedim(0, -1)
        probs = table.weights.movedim(j, 0).reshape(table.sizes[j], -1, count).sum(1).T
        fn = nodes[name]["fn"]
        value = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)[index]
        spread = value.reshape(count, *(1,) * (-layout.dim - 1), *fn.event_shape)
        yield name, LatentCode(value.cpu(), log_p[every, index].cpu(), None, None, probs.cpu(), not mean), spread


def reconstruct(
    run_or_pair: Run | Pair, x: Any, *, mean: bool = True, given: sample.Covariates | None = None, seed: int = 0,
    on_progress: Progress = silent,
) -> Reconstructions:  # fmt: skip
    """Encode rows of data with a sample z ~ q(z | x), and decode them again.

    With `given` they are decoded under other covariates than those they are encoded with: p(x | z, y = given), the
    counterfactual of a model that gives its decoder y. The log densities are then those of the data under these.

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mean: return E[x | z], else a sample of p(x | z).
        given: covariates to change, by name: one value for all rows; see `sample`.
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
    pair = running.opened(run_or_pair)
    x = accept(pair, x)
    layout, frame, changed = pair.layout, pair.frame, sample.given_values(run_or_pair, pair, given or {}, 1)

    def decoded(start: int, stop: int) -> Reconstructions:
        part, count = x[start:stop], stop - start
        codes, values = _encoded(pair, part, mean=False)
        if changed:
            under = {name: t.expand(count, *t.shape[1:]) for name, t in changed.items()}
            part = frame.assemble(frame.split(part)[0], {**frame.columns(part), **under})
        nodes = samples(pair.model_trace(part, values))
        log_p = sum_over([log_prob(nodes[name], layout, 0, len(x)).double() for name in layout.observed])
        if mean:
            found = running.decoded_mean(nodes, layout, count)
        else:
            node = running.datum(layout, nodes)
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 4 + start), x.device)
                found = running.row_values(node["fn"].sample(), node, layout, count)
        latents = {name: code.value for name, code in codes.items()}
        return Reconstructions(found, log_p.expand(count).cpu(), latents, mean)

    with running.analysed(pair, x, seed):
        return running.by_chunks(decoded, len(x), x[0].numel(), on_progress)
