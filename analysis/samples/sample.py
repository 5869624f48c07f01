"""Samples of a fitted model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import require_room
from pvae.analysis.figures.estimate import misdeclared, refuse, text
from pvae.analysis.samples import running
from pvae.analysis.samples.features import is_image
from pvae.errors import DataError, DeclarationError, instead
from pvae.experiment.experiment import Experiment
from pvae.graph.frame import Entry
from pvae.nn.schedules import Constant
from pvae.pair import Layout, Pair, samples
from pvae.runs.run import Run
from pvae.util import Progress, seeds, silent

NOTEBOOK_ROWS, NOTEBOOK_IMAGES = 8, 50
"""Largest numbers of samples that a notebook shows as rows of a table, and as images."""
Covariates = Mapping[str, int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | Tensor]


class Samples(running.Generated):
    """Samples of a model; the result of `sample`. `save` has keys `x`, `latents/<name>` and `covariates/<name>`."""

    x: Tensor
    """Samples of p(x | z), or its means, `(n, *shape)`."""
    latents: dict[str, Tensor]
    """Sampled latents z by name, `(n, *event)`: all local latents of the model, which have one value per datum."""
    covariates: dict[str, Tensor]
    """Covariates by name that the samples are conditioned on, `(n,)`, int64; of a prompt `(n, length)`."""
    is_mean: bool
    """True if x are means of p(x | z)."""

    def _repr_html_(self) -> str:
        from pvae.analysis.pages.plots import base, pictures

        if not is_image(self.x.shape[1:]) or self.origin.names:
            return str(self.to_frame().head(NOTEBOOK_ROWS).to_html())
        x = base.array(self.x[:NOTEBOOK_IMAGES])
        return base.pictured(pictures.samples(x, x, float(x.min()), float(x.max())), repr(self))


def sample(
    run_or_pair: Run | Pair, n: int = 64, *, mean: bool = False, given: Covariates | None = None, seed: int = 0,
    on_progress: Progress = silent,
) -> Samples:  # fmt: skip
    """Sample from the model: z ~ p(z), then x ~ p(x | z).

    Global latents are sampled once, from the guide: their posterior is what the fit has learned.

    Arguments:
        run_or_pair: a run, or any pair that has seen data.
        n: number of samples.
        mean: return E[x | z] (Bernoulli probabilities, the location of a normal) instead of samples of x.
        given: values of the covariates of a conditional model, one each, or n of them: an integer, or the word of a
            level; numbers, of a run in the units of its data; for a prompt, a text of its vocabulary. A run samples
            those that are not given from its training rows, and the model itself captions that it scores.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (samples done, n).

    Returns:
        Samples: x `(n, *shape)`, the sampled latents, and the covariates.

    Raises:
        DataError: n is below 1.
        DeclarationError: `given` names no covariate, has a value out of range, or is missing for a conditional pair;
            the likelihood has no `mean`; the prior of the run was never fitted to its codes.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = sample(example_run(), n=5)
        >>> found.x.shape, found.latents["z"].shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """
    refuse(n < 1, f"sample: expected at least one draw; got n={n}.")
    _require_density(run_or_pair)
    pair = running.opened(run_or_pair)
    rows = Template(run_or_pair, pair, n, given, seed, free=pair.layout.observed)
    with running.analysed(pair, rows.at(0, 2), seed):
        found = running.by_chunks(lambda *at: model_samples(pair, rows.at(*at), mean), n, rows.numbers, on_progress)
    return replace(found, covariates={**rows.covariates, **found.covariates})


def _require_density(source: Run | Pair) -> None:
    """Raise DeclarationError for a run with beta = 0 (an autoencoder), whose prior was not fitted to its codes."""
    if not isinstance(source, Run) or not isinstance(source.plan, Experiment):
        return
    latents = source.plan.latents.items()
    free = [name for name, latent in latents if latent.dim is not None and not latent.prior.reads_guide]
    misdeclared(free and source.plan.objective.beta == Constant(value=0.0), "refused.unfitted", run=source, names=free)


def model_samples(pair: Pair, rows: Tensor, mean: bool) -> Samples:
    """Return samples of the model in its current context, one for each of the placeholder rows `(n, *row)`."""
    layout, count, nodes, known = pair.layout, len(rows), samples(pair.simulate(rows)), pair.frame.covariates
    node = running.datum(layout, nodes)
    x = running.decoded_mean(nodes, layout, count) if mean else running.row_values(node["value"], node, layout, count)
    captions = {k: running.row_values(z["value"], z, layout, count) for k, z in nodes.items() if k in known}
    return Samples(x, _latents(nodes, layout, count), captions, mean)


def prior_latents(pair: Pair, rows: Tensor) -> dict[str, Tensor]:
    """Return one prior sample of every latent in the current context, for each of the placeholder rows `(n, *row)`."""
    return _latents(samples(pair.simulate(rows)), pair.layout, len(rows))


def _latents(nodes: Mapping[str, Any], layout: Layout, count: int) -> dict[str, Tensor]:
    hidden = {name: z for name, z in nodes.items() if name not in layout.observed and layout.holds(z)}
    return {name: running.row_values(z["value"], z, layout, count) for name, z in hidden.items()}


class Template:
    """Placeholder rows `(n, *row)` that a model is run on to sample x: they set its batch size and its covariates.

    Rows are made chunk by chunk. As a hand-written model may also read x from them, they are a given row of data or the
    training rows of its run; otherwise, and if there are covariates, x is zero. A declared run needs no data, unless
    covariates are drawn from them. Covariates `free` that are not given are unknown, NaN: the model samples them.
    """

    def __init__(
        self, source: Run | Pair, pair: Pair, n: int, given: Covariates | None, seed: int, row: Tensor | None = None,
        free: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.pair, self.frame, self.row = pair, pair.frame, row
        require_room(pair, "samples", n, 0, f"{n:,} samples")
        self.given = given_values(source, pair, given or {}, n)
        self.known = {k: entry for k, entry in self.frame.covariates.items() if k in self.given or k not in free}
        needed = not pair.declared or (self.known.keys() - self.given.keys() and row is None)
        self.data = source.data.train.rows if isinstance(source, Run) and needed else None
        self.n, self.numbers = n, max(1, prod(self.frame.row))
        self.covariates = self._covariates(n, seed)

    def _covariates(self, n: int, seed: int) -> dict[str, Tensor]:
        if not (left := [name for name in self.known if name not in self.given]):
            return {name: self.given[name] for name in self.known}
        if self.row is not None:
            found = self.row.flatten().expand(n, -1)
        elif self.data is not None:
            generator = seeds.generator(seed, seeds.ANALYSIS, 3)
            found = self.data[torch.randint(len(self.data), (n,), generator=generator).to(self.data.device)]
        else:
            raise DeclarationError(text("refused.nothing_given", known={name: self.known[name] for name in left}))
        drawn = self.frame.columns(found)
        drawn = {n: (drawn[n].long() if entry.codes else drawn[n]).cpu() for n, entry in self.known.items()}
        return {**drawn, **self.given}

    def at(self, start: int, stop: int) -> Tensor:
        """Return rows start .. stop - 1 as the pair accepts them; past the end the last covariates are repeated."""
        count = stop - start
        if self.frame.entries:
            at = torch.arange(start, stop).clamp(max=self.n - 1)
            columns = {name: column[at] for name, column in self.covariates.items()}
            return self.pair.accept(self.frame.assemble(torch.zeros(count, *self.frame.x), columns))
        if self.row is not None:
            return self.row.expand(count, *self.row.shape[1:])
        if self.data is not None:
            return self.pair.accept(self.data[torch.arange(start, stop, device=self.data.device) % len(self.data)])
        return self.pair.accept(torch.zeros(count, *self.frame.row))


def given_values(source: Run | Pair, pair: Pair, given: Covariates, n: int) -> dict[str, Tensor]:
    """Return the values that covariates are set to, `(n, *entry.shape)` by name, as rows of the model have them.

    Arguments:
        source: a run, in whose units numbers are given, and levels by their words; or the pair, for values of rows.
        pair: the pair.
        given: a value of each covariate, or n of them; of a prompt, a text.
        n: number of rows.

    Raises:
        DeclarationError: `given` names no covariate of the model, or a value or level is none that it can have.
    """
    known, found = pair.frame.covariates, dict[str, Tensor]()
    misdeclared(not isinstance(given, Mapping), f"given: expected values by covariate, as {{'y': 3}}; got {given!r}.")
    for name, value in given.items():
        misdeclared(not known, f"given: expected nothing, for the model has no covariates; got {name!r}.")
        entry = known[running.known_name(name, known, "given")]
        if (vocabulary := entry.vocabulary) is None or entry.tokens is None:
            if isinstance(source, Run) and (entry.source == "side" or (entry.source, type(value)) == ("label", str)):
                odd = f"given.{name}: expected a value, or {n} of them; got {str(value)[:60]}."
                said = instead(DataError, f"given.{name}: {{problem}}", DeclarationError)
                with instead((TypeError, ValueError), odd, DeclarationError), said:
                    found[name] = source.transforms.given(name, value)
            found[name] = _values(name, entry, n, found.get(name, value), value)
        else:
            is_text = isinstance(value, str)
            misdeclared(not is_text, "refused.no_text", name=name, words=vocabulary.words[1:], value=value)
            found[name] = torch.tensor(vocabulary.encode(str(value))).expand(n, -1).clone()
    return found


def _values(name: str, entry: Entry, n: int, value: Any, said: Any) -> Tensor:
    """Return the values of a label or of numbers, `(n, *entry.shape)`, after checking that the entry can have them."""
    try:
        found = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(False)
    if entry.width == 1 and not entry.codes and found.shape in ((), (n,)):
        found = found.unsqueeze(-1)
    kind = "an integer" if entry.codes else f"{entry.width} numbers"
    is_wrong = found.dtype is torch.bool or (entry.codes > 0 and found.is_floating_point())
    is_wrong = is_wrong or found.shape not in (entry.shape, (n, *entry.shape))
    misdeclared(is_wrong, f"given.{name}: expected {kind}, or {n} of them; got {str(said)[:60]}.")
    misdeclared((wrong := entry.wrong(found)).any(), "refused.out_of_range", name=name, entry=entry, found=found[wrong])
    return (found.long() if entry.codes else found.float()).expand(n, *entry.shape).clone()
