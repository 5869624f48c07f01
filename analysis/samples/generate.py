"""What a fitted pair makes, and what it makes of data: samples, codes, reconstructions."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Categorical, Distribution, LowRankMultivariateNormal, MultivariateNormal

from pvae.analysis.decompose.draws import accept, quiet, same_globals
from pvae.analysis.export.datasets import safe_names
from pvae.analysis.export.sites import numpy_of, parameters_of, rows_of
from pvae.distributions.relaxed import twin
from pvae.errors import DataError, DeclarationError, near
from pvae.experiment.experiment import Experiment
from pvae.nn.schedules import Constant
from pvae.pair.densities import log_prob, sum_over
from pvae.pair.enumeration import Table, read_table
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util import seeds
from pvae.util.files import write_atomic

CHUNK = 250
"""Most rows that are drawn, encoded or decoded at a time."""
NUMBERS = 2**20
"""Most numbers in the data of a chunk."""

Given = Mapping[str, int | str | Sequence[int] | Tensor]
Progress = Callable[[int, int], None]


def silent(_done: int, _total: int) -> None:
    """Tell nobody."""


# ---------------------------------------------------------------------- results


class Generated(ABC):
    """Tensors on the CPU with names."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What there is, by the keys of `save`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`tensors` as numpy arrays."""
        return {key: numpy_of(t) for key, t in self.tensors().items()}

    def save(self, path: str | Path, **more: Tensor) -> Path:
        """Write an `.npz`, whole or not at all, that `numpy.load(path, allow_pickle=False)` reads; returns its path.

        The keys are those of `arrays`, and of `more`. A site's name is made safe: ASCII letters, digits and `_`.
        """
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays(), **{key: numpy_of(t) for key, t in more.items()}}
        np.savez(buffer, **arrays)
        write_atomic(Path(path), buffer.getvalue())
        return Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key} {list(t.shape)}' for key, t in self.tensors().items())})"


def named(what: str, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """`<what>/<name>` for those that are there, names made safe."""
    names = safe_names({name: () for name in values})
    return {f"{what}/{names[name]}": t for name, t in values.items() if t is not None}


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Generated):
    """Draws of a model; `save` has the keys `x`, `latents/<name>` and `covariates/<name>`."""

    x: Tensor
    """Draws of p(x | z), or its means, `(n, *shape)`."""
    latents: dict[str, Tensor]
    """The z they were drawn at, `(n, *event)`: every latent of the model that belongs to single data."""
    covariates: dict[str, Tensor]
    """What they are conditioned on, `(n,)`, int64."""
    is_mean: bool
    """Whether x are means."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Generated.tensors`."""
        return {"x": self.x, **named("latents", self.latents), **named("covariates", self.covariates)}


@dataclass(frozen=True, eq=False)
class Code:
    """One latent of rows of data."""

    value: Tensor
    """A draw of q, or its centre, `(n, *event)`."""
    log_q: Tensor
    """log q(value | x, latents before it), nats, `(n,)`, float64; exact."""
    loc: Tensor | None
    """Mean of a normal posterior, `(n, *event)`."""
    scale: Tensor | None
    """Standard deviations of a normal posterior, `(n, *event)`."""
    probs: Tensor | None
    """Of a discrete posterior of at most 4096 probabilities, `(n, ...)`; p(c | x, z) where the model sums the site out,
    `(n, K)`; None of a code known for certain."""
    is_draw: bool
    """Whether the value was drawn."""


@dataclass(frozen=True, eq=False, repr=False)
class Encoding(Generated):
    """Latents of rows of data.

    `save` has the keys `latents/<name>`, `log_q/<name>` and, where known, `loc/<name>`, `scale/<name>`, `probs/<name>`.
    """

    latents: dict[str, Code]
    """Those of the guide in its order, then those that the model sums out."""

    @property
    def log_q(self) -> Tensor:
        """log q(z | x) of all latents together, nats, `(n,)`."""
        return sum_over([code.log_q for code in self.latents.values()])

    def __getitem__(self, name: str) -> Tensor:
        """The value of a latent, `(n, *event)`."""
        return self.latents[known_name(name, self.latents, "encode")].value

    def tensors(self) -> dict[str, Tensor]:
        """See `Generated.tensors`."""
        parts = {"latents": "value", "log_q": "log_q", "loc": "loc", "scale": "scale", "probs": "probs"}
        found: dict[str, Tensor] = {}
        for what, field in parts.items():
            found |= named(what, {name: getattr(code, field) for name, code in self.latents.items()})
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Reconstructions(Generated):
    """Data decoded from their own codes; `save` has the keys `x`, `log_p` and `latents/<name>`."""

    x: Tensor
    """Means of p(x | z), or draws, `(n, *shape)`."""
    log_p: Tensor
    """log p(x | z) of the data themselves, nats, `(n,)`, float64."""
    latents: dict[str, Tensor]
    """The z they were decoded at, `(n, *event)`."""
    is_mean: bool
    """Whether x are means."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Generated.tensors`."""
        return {"x": self.x, "log_p": self.log_p, **named("latents", self.latents)}


# ---------------------------------------------------------------------- sample


def sample(
    run_or_pair: Run | Pair,
    n: int = 64,
    *,
    mean: bool = False,
    given: Given | None = None,
    seed: int = 0,
    on_progress: Progress = silent,
) -> Samples:
    """Draw z from the model's prior and x from its decoder.

    Global latents are drawn once, from the guide: they are what the fit has learned of the model.

    Arguments:
        run_or_pair: a run, or any pair that has seen data.
        n: draws.
        mean: give E[x | z] (Bernoulli probabilities, a normal's location) in place of a draw of x.
        given: for a model conditioned on covariates, the value of each: an integer, or n of them; of a prompt, a text
            of its vocabulary. Unless said, a run draws them from its training rows.
        seed: of all draws; the same seed, the same numbers.
        on_progress: called with (draws done, n) after every `CHUNK` at most.

    Returns:
        Samples: x `(n, *shape)`, the latents they were drawn at, and the covariates.

    Raises:
        DataError: n below 1.
        DeclarationError: `given` names what the model is not conditioned on, or a value that it does not take; a
            conditioned pair without `given`; `mean` of a likelihood that has none; a run whose prior has never met
            its codes.
    """
    if n < 1:
        raise DataError(f"sample: expected at least one draw; got n={n}.")
    _require_density(run_or_pair)
    pair = opened(run_or_pair)
    rows = Template(run_or_pair, pair, n, given, seed)
    parts: list[Samples] = []
    with analysed(pair, rows.at(0, 2), seed):
        for start, stop in chunks(n, rows.numbers):
            trace = pair.simulate(rows.at(start, stop))
            parts.append(_sampled(pair, trace, stop - start, mean))
            on_progress(stop, n)
    return Samples(
        torch.cat([part.x for part in parts]), _joined([part.latents for part in parts]), rows.covariates, mean
    )


def _require_density(source: Run | Pair) -> None:
    """Refuse an autoencoder: without a KL no code had to lie where the prior draws, and no prior was brought there."""
    if not isinstance(source, Run) or not isinstance(source.plan, Experiment):
        return
    latents = source.plan.latents.items()
    free = [name for name, latent in latents if latent.dim is not None and not latent.prior.reads_guide]
    if free and source.plan.objective.beta == Constant(value=0.0):
        raise DeclarationError(
            f"{source.path}: expected a prior that was fitted to the codes; got objective.beta = 0, under which none "
            f"is. Fit one: pvae refit {source.name} latents.{free[0]}.prior.kind=realnvp"
        )


def _sampled(pair: Pair, trace: Trace, count: int, mean: bool) -> Samples:
    layout, nodes = pair.layout, samples(trace)
    hidden = {name: node for name, node in nodes.items() if name not in layout.observed and layout.holds(node)}
    node = nodes[datum(layout, nodes)]
    x = decoded_mean(node, layout, count) if mean else row_values(node["value"], node, layout, count)
    return Samples(x, {name: row_values(z["value"], z, layout, count) for name, z in hidden.items()}, {}, mean)


class Template:
    """Rows `(n, *row)` that say how many data a model is to make, and what they are conditioned on; made in pieces.

    A model may read more of its rows than their number: a run's are its training rows, a pair's zeros.
    """

    def __init__(
        self, source: Run | Pair, pair: Pair, n: int, given: Given | None, seed: int, row: Tensor | None = None
    ) -> None:
        self.pair, self.frame, self.row = pair, pair.frame, row
        self.data = source.data.train.rows if isinstance(source, Run) else None
        self.numbers = max(1, prod(self.frame.row))
        self.covariates = self._covariates(n, given, seed)

    def _covariates(self, n: int, given: Given | None, seed: int) -> dict[str, Tensor]:
        known = self.frame.covariates
        for name in given or {}:
            if not known:
                raise DeclarationError(f"given: expected nothing, for the model has no covariates; got {name!r}.")
            known_name(name, known, "given")
        if not known or given:
            return {name: self._given(name, codes, n, given or {}) for name, codes in known.items()}
        if self.row is not None:
            found = self.row.flatten().expand(n, -1)
        elif self.data is not None:
            generator = torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 3))
            found = self.data[torch.randint(len(self.data), (n,), generator=generator).to(self.data.device)]
        else:
            wanted = ", ".join(f"{name!r}: 0 .. {codes - 1}" for name, codes in known.items())
            raise DeclarationError(
                f"given: expected a value of what the model is conditioned on, {{{wanted}}}; got none. Say given=..., "
                f"or pass the run, whose own labels are then drawn."
            )
        return {name: column.long().cpu() for name, column in self.frame.columns(found).items()}

    def _given(self, name: str, codes: int, n: int, given: Given) -> Tensor:
        """A covariate's values, `(n,)`, or those of a prompt, `(n, length)`."""
        vocabulary = self.frame.prompts.get(name)
        if vocabulary is None:
            return _values(name, codes, n, given)
        text = given.get(name)
        if not isinstance(text, str):
            raise DeclarationError(
                f"given.{name}: expected a text of {', '.join(vocabulary.words[1:])}; got {str(text)[:60]}."
            )
        return torch.tensor(vocabulary.encode(text)).expand(n, -1).clone()

    def at(self, start: int, stop: int) -> Tensor:
        """Some of the rows, as the pair takes them; the last is repeated where there are none left."""
        count = stop - start
        if self.covariates:
            at = torch.arange(start, stop).clamp(max=len(next(iter(self.covariates.values()))) - 1)
            columns = torch.cat([column[at].reshape(count, -1) for column in self.covariates.values()], 1)
            return self.pair.accept(torch.cat([torch.zeros(count, prod(self.frame.x)), columns], 1))
        if self.row is not None:
            return self.row.expand(count, *self.row.shape[1:])
        if self.data is not None:
            return self.pair.accept(self.data[torch.arange(start, stop, device=self.data.device) % len(self.data)])
        return self.pair.accept(torch.zeros(count, *self.frame.row))


def _values(name: str, codes: int, n: int, given: Given) -> Tensor:
    """A covariate's values `(n,)`."""
    if name not in given:
        raise DeclarationError(f"given: expected a value of {name} too, 0 .. {codes - 1}; got none.")
    try:
        found = torch.as_tensor(given[name]).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    if found.is_floating_point() or found.dtype is torch.bool or found.shape not in ((), (n,)):
        raise DeclarationError(f"given.{name}: expected an integer, or {n} of them; got {str(given[name])[:60]}.")
    if not 0 <= int(found.min()) <= int(found.max()) < codes:
        wrong = found[(found < 0) | (found >= codes)].flatten()[0] if found.dim() else found
        raise DeclarationError(f"given.{name}: expected 0 .. {codes - 1}; got {int(wrong)}.")
    return found.long().expand(n).clone()


# ---------------------------------------------------------------------- encode


def encode(
    run_or_pair: Run | Pair, x: Any, *, mean: bool = False, seed: int = 0, on_progress: Progress = silent
) -> Encoding:
    """The latents of rows of data: a draw of the guide, or its centre.

    With `mean` every latent is its posterior mean, of a discrete one the most probable value, and what reads other
    latents reads theirs: in a hierarchy the means are fed down, so that all but the first are means at the means of
    those before, no means over draws. Posteriors without a known mean (flows) are drawn all the same; `Code.is_draw`
    says which. Sites that the model sums out exactly have no guide: their posterior p(c | x, z) is known, at the z of
    this very result.

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mean: give centres in place of draws.
        seed: of the draws; the same seed, the same numbers.
        on_progress: called with (rows done, n).

    Returns:
        Encoding: by latent, the value, its log q, and loc, scale or probabilities where the posterior has them.

    Raises:
        DataError: x has no rows, or rows of another shape.
    """
    pair = opened(run_or_pair)
    x = accept(pair, x)
    parts: list[dict[str, Code]] = []
    with analysed(pair, x, seed, mean):
        for start, stop in chunks(len(x), x[0].numel()):
            parts.append(_encoded(pair, x[start:stop], mean)[0])
            on_progress(stop, len(x))
    return Encoding({name: _joined_codes([part[name] for part in parts]) for name in parts[0]})


def _encoded(pair: Pair, x: Tensor, mean: bool) -> tuple[dict[str, Code], dict[str, Tensor]]:
    """Codes of a chunk, and their values as the programs take them, global ones too."""
    layout, count = pair.layout, len(x)
    guide_trace, model_trace = pair.traces(x) if layout.enumerated else (pair.guide_trace(x), None)
    nodes = samples(guide_trace)
    codes = {name: _code(nodes[name], layout, count, mean) for name in layout.latents}
    values = {name: nodes[name]["value"] for name in (*layout.latents, *layout.shared)}
    if model_trace is not None:
        for name, code, value in _summed(read_table(model_trace, layout, 0), samples(model_trace), mean):
            codes[name], values[name] = code, value
    return codes, values


def _code(node: Mapping[str, Any], layout: Layout, count: int, mean: bool) -> Code:
    shown = {key: t.cpu() for key, t in parameters_of(node, layout, count).items()}
    fn = unwrapped(node["fn"])
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        shown = {"loc": row_values(fn.loc, node, layout, count), "scale": row_values(fn.stddev, node, layout, count)}
    return Code(
        value=row_values(node["value"], node, layout, count),
        log_q=log_prob(node, layout, 0).double().cpu(),
        loc=shown.get("loc"),
        scale=shown.get("scale"),
        probs=shown.get("probs"),
        is_draw=not mean or centre(node["fn"]) is None,
    )


def _summed(table: Table, nodes: Mapping[str, Any], mean: bool) -> Iterator[tuple[str, Code, Tensor]]:
    """Every site that the model sums out: one draw of p(c | x, z), code after code, or the most probable each."""
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
        yield name, Code(value.cpu(), log_p[every, index].cpu(), None, None, probs.cpu(), not mean), spread


def _joined_codes(parts: Sequence[Code]) -> Code:
    """Chunks of one latent in a row."""
    columns: dict[str, Any] = {
        field: None if getattr(parts[0], field) is None else torch.cat([getattr(part, field) for part in parts])
        for field in ("value", "log_q", "loc", "scale", "probs")
    }
    return replace(parts[0], **columns)


# ---------------------------------------------------------------------- reconstruct


def reconstruct(
    run_or_pair: Run | Pair, x: Any, *, mean: bool = True, seed: int = 0, on_progress: Progress = silent
) -> Reconstructions:
    """Encode data by a draw of the guide, and decode them again.

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mean: give E[x | z]; else a draw of p(x | z).
        seed: of the draws; the same seed, the same z whatever `mean` is.
        on_progress: called with (rows done, n).

    Returns:
        Reconstructions: x `(n, *shape)` and log p(x | z) of the data at that very z; its mean over draws is the
        reconstruction term of the ELBO. Codes that the model sums out are drawn from p(c | x, z).

    Raises:
        DataError: x has no rows, or rows of another shape.
        DeclarationError: `mean` of a likelihood that has none.
    """
    pair = opened(run_or_pair)
    x = accept(pair, x)
    parts: list[tuple[Tensor, Tensor]] = []
    latents: list[dict[str, Tensor]] = []
    with analysed(pair, x, seed):
        for start, stop in chunks(len(x), x[0].numel()):
            codes, values = _encoded(pair, x[start:stop], mean=False)
            noise = None if mean else seeds.mix(seed, seeds.ANALYSIS, 4 + start)
            parts.append(_reconstructed(pair, x[start:stop], values, len(x), noise))
            latents.append({name: code.value for name, code in codes.items()})
            on_progress(stop, len(x))
    decoded, log_p = (torch.cat(column) for column in zip(*parts, strict=True))
    return Reconstructions(decoded, log_p, _joined(latents), mean)


def _reconstructed(
    pair: Pair, x: Tensor, values: Mapping[str, Tensor], size: int, noise: int | None
) -> tuple[Tensor, Tensor]:
    """E[x | z] of a chunk, or a draw with noise of that seed, and log p(x | z); `size` is that of all rows."""
    layout, count = pair.layout, len(x)
    nodes = samples(pair.model_trace(x, values))
    log_p = sum_over([log_prob(nodes[name], layout, 0, size).double() for name in layout.observed])
    node = nodes[datum(layout, nodes)]
    if noise is None:
        return decoded_mean(node, layout, count), log_p.expand(count).cpu()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        seeds.set_noise(noise, x.device)
        return row_values(node["fn"].sample(), node, layout, count), log_p.expand(count).cpu()


# ---------------------------------------------------------------------- reading distributions


def mean_of(fn: Any) -> Tensor:
    """The mean of a site's distribution, `(batch, *event)`; of an unordered level, its expected index.

    Raises:
        NotImplementedError: it has none.
    """
    base = unwrapped(fn)
    if isinstance(base, Categorical):
        levels = torch.arange(base.probs.shape[-1], dtype=base.probs.dtype, device=base.probs.device)
        return base.probs @ levels
    mean = fn.mean
    if not isinstance(mean, Tensor) or bool(mean.isnan().any()):
        raise NotImplementedError(f"{type(base).__name__} has no mean")
    return mean


def is_discrete(fn: Distribution) -> bool:
    """Whether a distribution's values are discrete."""
    try:
        return bool(getattr(fn.support, "is_discrete", False))
    except NotImplementedError:
        return False


def centre(fn: Any) -> Tensor | None:
    """The mean of a distribution, `(batch, *event)`; the most probable value of a discrete one; None for others."""
    try:
        return fn.mode.nan_to_num(0.0) if is_discrete(fn) else mean_of(fn)  # of an even Bernoulli it is NaN
    except (NotImplementedError, AttributeError):
        return None


class Centred(Messenger):
    """Sets hidden sites to the centres of their distributions, where those are known, in place of draws.

    Arguments:
        loose: values by name for sites whose centre is not known; others are drawn.
    """

    def __init__(self, loose: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.loose = loose or {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or poutine.util.site_is_subsample(msg):
            return
        found = centre(twin(msg["fn"]))
        msg["value"] = self.loose.get(msg["name"]) if found is None else found


# ---------------------------------------------------------------------- parts


def opened(source: Any) -> Pair:
    """The pair of a run, or the pair itself; it has seen data."""
    pair = source.pair if isinstance(source, Run) else source
    if not isinstance(pair, Pair):
        raise DeclarationError(f"Expected a pvae.Run or a pvae.Pair; got {type(pair).__name__}.")
    _ = pair.layout  # says so where it has seen none
    return pair


def known_name(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> str:
    """The name, if it is one of them; raises DeclarationError that gives the nearest."""
    if name not in names:
        raise DeclarationError(f"{what}: expected one of {', '.join(names)}; got {name!r}{near(name, names)}.")
    return name


@contextmanager
def analysed(pair: Pair, x: Tensor, seed: int, mean: bool = False) -> Iterator[None]:
    """Quiet, seeded, one draw of global latents for all; with `mean` hidden sites at their centres."""
    with quiet(pair, x, seed), Centred() if mean else nullcontext(), same_globals(pair, x):
        yield


def chunks(n: int, numbers: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of n rows, each row of so many numbers."""
    size = min(CHUNK, max(1, NUMBERS // numbers))
    for start in range(0, n, size):
        yield start, min(start + size, n)


def datum(layout: Layout, nodes: Mapping[str, Any]) -> str:
    """The observed site that is the datum: the first inside the data plate."""
    return next(name for name in layout.observed if layout.holds(nodes[name]))


def row_values(t: Any, node: Mapping[str, Any], layout: Layout, count: int) -> Tensor:
    """A site's value, or what its distribution has of that shape, as `(count, ...)` on the CPU."""
    return rows_of(torch.as_tensor(t), node, layout, count).cpu()


def decoded_mean(node: Mapping[str, Any], layout: Layout, count: int) -> Tensor:
    """E[x | z] of an observed site, `(count, *shape)`."""
    try:
        return row_values(mean_of(node["fn"]), node, layout, count)
    except NotImplementedError:
        kind = type(unwrapped(node["fn"])).__name__
        raise DeclarationError(f"mean: expected p(x | z) with a known mean; got {kind}. Ask for draws.") from None


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
