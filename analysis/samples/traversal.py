"""Decoded means as one coordinate of a latent moves (traversal), or between the codes of two rows (interpolation)."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import accept, require_room
from pvae.analysis.decompose import collapse, posterior_draws
from pvae.analysis.export.sites import as_value
from pvae.analysis.figures.estimate import misdeclared, refuse
from pvae.analysis.samples import encode, running
from pvae.analysis.samples.sample import Covariates, Template, prior_latents
from pvae.distributions.exponential import Normals
from pvae.pair import Pair, log_prob, members, samples, sum_over, unwrapped
from pvae.runs.run import Run
from pvae.util import Progress, Record, field, seeds, silent

PRIOR_DRAWS = 1000
"""Number of prior samples that estimate the mean and standard deviation of a prior that is not a single normal."""
ORDER_ROWS = 500
"""Largest number of data rows from which the order of the coordinates is computed."""
DEFAULT_DIMS = 10
"""Largest number of coordinates that a traversal moves by default."""
SAME_DENSITY = 1e-4
"""Relative difference of two log densities below which they count as equal, as rounding differs between batches."""


class Traversal(running.Generated):
    """Decoded means as one latent coordinate moves at a time; the result of `traverse`.

    `save` has keys `x`, `values` and `dims`.
    """

    x: Tensor
    """Means of p(x | z), `(dims, steps, *shape)`."""
    values: Tensor
    """Values of the moved coordinates, `(dims, steps)`."""
    latent: str
    """Name of the moved latent."""
    dims: tuple[int, ...]
    """Indices of the moved coordinates, in the order of x."""
    order: str
    """Criterion by which the coordinates are ordered, in words: "KL", for example."""

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "dims": torch.tensor(self.dims)}


def traverse(
    run_or_pair: Run | Pair, x: Any = None, latent: str | None = None, dims: Sequence[int] | None = None,
    steps: int = 9, span: float = 3.0, *, given: Covariates | None = None, rows: Any = None, seed: int = 0,
    on_progress: Progress = silent,
) -> Traversal:  # fmt: skip
    """Move one coordinate of a latent at a time and decode the means E[x | z].

    A coordinate takes `steps` values, evenly spaced within `span` standard deviations around its prior mean; mean and
    standard deviation are exact if the prior is a single normal, else estimated from `PRIOR_DRAWS` samples. A single
    discrete code takes all its values instead, and a bit both. All other coordinates are fixed at the centre of the
    row's encoding (see `encode`), or at the prior mean without a row. Latents whose prior depends on the moved one,
    directly or through others, are set to their mean given it.

    Arguments:
        run_or_pair: a run, or any pair that has seen data.
        x: one row of data, `(*row)` or `(1, *row)`; None for the prior mean.
        latent: name of the latent; default: the first of the guide.
        dims: its coordinates (event dimensions flattened). Default: the first `DEFAULT_DIMS` in descending order of
            their KL over `rows`; where q and p are not both normal, of the variance of their posterior mean; where that
            is unknown, in their own order.
        steps: number of values of each coordinate.
        span: largest distance from the prior mean, in standard deviations of the prior.
        given: values of the covariates if x is None; see `sample`.
        rows: data `(n, *row)` that determine the default order of the coordinates; default: the test rows of a run,
            else x itself.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows decoded, rows in all).

    Returns:
        Traversal: x `(dims, steps, *shape)`, values `(dims, steps)`.

    Raises:
        DataError: x is more than one row, `steps` is below 1, `span` is not positive, the model has no local latents
            (one value per datum), or the latent is a grid of codes.
        DeclarationError: there is no such latent or coordinate, or the likelihood has no mean.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> traverse(pair, x[:1], dims=[1], steps=3).x.shape
        torch.Size([1, 3, 3])
    """
    refuse(steps < 1 or not 0 < span < float("inf"), "refused.few_steps", steps=steps, span=span)
    pair = running.opened(run_or_pair)
    row = None if x is None else running.one_row(pair, x)
    misdeclared(row is not None and given, "refused.given_beside_row")
    layout = pair.layout
    names = (*layout.latents, *layout.enumerated)
    refuse(not names, f"traverse: expected latents of single data; got only global {', '.join(layout.shared)}.")
    name = names[0] if latent is None else running.known_name(latent, names, "latent")
    template = Template(run_or_pair, pair, 1, given, seed, row)
    if rows is None and isinstance(run_or_pair, Run):
        held = run_or_pair.data.test.x
        rows = held[seeds.subset(len(held), ORDER_ROWS, seed).to(held.device)]
    seen = row if rows is None else accept(pair, rows)[:ORDER_ROWS]
    base = {} if row is None else encode.encode(pair, row, mean=True, seed=seed).latents
    with running.analysed(pair, template.at(0, 2), seed):
        model, priors = PlacedModel.of(template, name)
        scores, order = (None, "their own order") if seen is None else _scores(pair, seen, name)
        at = base[name].value.flatten() if base else priors[name][0]
        chosen = _dims(dims, name, len(at), scores)
        require_room(pair, "traverse", steps * len(chosen), 0, f"{steps:,} steps of {len(chosen)} coordinates")
        places = _places(model.nodes[name]["fn"], name, priors[name], chosen, steps, span)
        moved = at.expand(*places.shape, -1).clone()
        moved[range(len(chosen)), :, list(chosen)] = places.to(moved)
        moved = moved.flatten(0, 1)
        held_at = {z: code.value.reshape(1, -1) for z, code in base.items() if z != name}
        below = _followers(model, name, moved, held_at) if held_at else ()
        kept = {z: value for z, value in held_at.items() if z not in below}

        def decoded(start: int, stop: int) -> Tensor:
            found = model.sites(start, stop, {**kept, name: moved[start:stop]})
            return running.decoded_mean(found, layout, stop - start)

        x = running.by_chunks(decoded, len(moved), template.numbers, on_progress)
    return Traversal(x.unflatten(0, places.shape), places, name, chosen, order)


def decode(run: Run, latent: str, values: Tensor, *, seed: int = 0, on_progress: Progress = silent) -> Tensor:
    """Return E[x | z], `(m, *shape)`, with a latent set to `values` `(m, numel)`, the others to their mean given it.

    Covariates are those of one training row, drawn by the seed. The errors are those of `traverse`.
    """
    template = Template(run, run.pair, 1, None, seed)
    with running.analysed(run.pair, template.at(0, 2), seed):
        model, _ = PlacedModel.of(template, latent)

        def decoded(start: int, stop: int) -> Tensor:
            found = model.sites(start, stop, {latent: values[start:stop]})
            return running.decoded_mean(found, run.pair.layout, stop - start)

        return running.by_chunks(decoded, len(values), template.numbers, on_progress)


class PlacedModel(Record):
    """Model of a pair whose latents are set to given values."""

    template: Template
    """Rows that the model is run on."""
    nodes: Mapping[str, Any]
    """Sites of a run of the model, which give the shape and type of every latent."""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """Values `(numel,)` of latents that are not set and whose mean and mode are unknown."""

    @classmethod
    def of(cls, template: Template, name: str) -> tuple[Self, dict[str, tuple[Tensor, Tensor]]]:
        """Return the model in which a latent is to be set, and mean and deviation of each prior, `(numel,)`."""
        pair = template.pair
        nodes, names = samples(pair.simulate(template.at(0, 8))), (*pair.layout.latents, *pair.layout.enumerated)
        refuse(name not in nodes, f"traverse: expected {name} in the model; got a latent of the guide alone.")
        priors = _priors(template, {z: nodes[z] for z in names if z in nodes})
        return cls(template, nodes, {z: mean for z, (mean, _) in priors.items()}), priors

    def spread(self, flat: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return flat values `(count or 1, numel)` of latents as `count` rows in the shape and dtype of their sites."""
        rows = {name: value.expand(count, -1) for name, value in flat.items() if name in self.nodes}
        return {name: as_value(value, self.nodes[name], self.template.pair.layout) for name, value in rows.items()}

    def sites(self, start: int, stop: int, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the sites of some rows with latents set to flat values, and the others to their mean given these."""
        rows, count = self.template.at(start, stop), stop - start
        with running.Centred(self.spread(self.means, count)):
            return samples(self.template.pair.model_trace(rows, self.spread(values, count)))


def _priors(template: Template, nodes: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of the prior of every latent, of a discrete one its mode and 0, `(numel,)`.

    They are exact if the prior is one diagonal normal, the same for all rows, else estimated from samples.
    """
    found, pair = {}, template.pair
    for name, node in nodes.items():
        normal = members(node, pair.layout, 8)
        if isinstance(normal, Normals) and all(bool((t == t[:1]).all()) for t in (normal.loc, normal.scale)):
            found[name] = normal.loc[0].cpu(), normal.scale[0].cpu()
    if len(found) < len(nodes):
        drawn = running.by_chunks(lambda *at: prior_latents(pair, template.at(*at)), PRIOR_DRAWS, template.numbers)
        for name in nodes.keys() - found.keys():
            values, coded = drawn[name].reshape(PRIOR_DRAWS, -1), running.is_discrete(nodes[name]["fn"])
            mode = values.mode(0).values if coded else values[0]
            found[name] = (mode, torch.zeros_like(mode)) if coded else (values.mean(0), values.std(0))
    return found


def _scores(pair: Pair, x: Tensor, name: str) -> tuple[Tensor | None, str]:
    """Return a score that orders the coordinates of a latent (KL, or variance of the posterior mean), and its name."""
    layout = pair.layout
    if name in layout.enumerated or (layout.enumerated and len(layout.latents) > 1):
        return None, "their own order"
    drawn = posterior_draws.draw(pair, x).latents[name]
    if (kl := drawn.coordinate_kl) is not None:
        return kl.mean(0), "KL"
    variance = collapse.activity(drawn)
    return variance, "their own order" if variance is None else "variance of the posterior mean"


def _dims(dims: Sequence[int] | None, name: str, count: int, scores: Tensor | None) -> tuple[int, ...]:
    if dims is None:
        order = range(count) if scores is None else scores.argsort(descending=True, stable=True).tolist()
        return tuple(order[:DEFAULT_DIMS])
    wrong = [d for d in dims if not 0 <= d < count]
    misdeclared(wrong or not len(dims), "refused.dims", name=name, last=count - 1, dims=list(wrong or dims))
    return tuple(dims)


def _places(fn: Any, name: str, prior: tuple[Tensor, Tensor], dims: Sequence[int], steps: int, span: float) -> Tensor:
    """Return the values that each moved coordinate takes, `(dims, steps)`; all values of a single code or of bits."""
    loc, scale = prior
    if not running.is_discrete(fn):
        units = torch.linspace(-span, span, steps) if steps > 1 else torch.zeros(1)
        return loc[list(dims), None] + scale[list(dims), None] * units.to(loc)
    states = torch.tensor([0.0, 1.0])
    if not isinstance(unwrapped(fn), distributions.Bernoulli):
        refuse(len(loc) > 1 or not fn.has_enumerate_support, "refused.grid", name=name)
        states = fn.enumerate_support(expand=False).flatten().cpu()
    return states.expand(len(dims), -1)


def _followers(model: PlacedModel, name: str, moved: Tensor, held: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the latents whose prior depends on the moved one, directly or through others.

    The moved latent differs between rows and all others are at their prior means given it: a latent depends on it if
    its prior density at a fixed value differs between the rows.
    """
    some = moved[torch.linspace(0, len(moved) - 1, min(len(moved), running.CHUNK_ROWS)).long()]
    nodes, found = model.sites(0, len(some), {name: some}), set()
    for z, same in model.spread(held, len(some)).items():
        scores = log_prob({**nodes[z], "value": same}, model.template.pair.layout, 0)
        if float((scores - scores[0]).abs().max()) > SAME_DENSITY * (1 + float(scores.abs().max())):
            found.add(z)
    return found


# ---------------------------------------------------------------------- interpolation


class Interpolation(running.Generated):
    """Data decoded along the line between the codes of two rows; the result of `interpolate`.

    `save` has keys `x`, `at`, `latents/<name>` and, where known, `log_prior`.
    """

    x: Tensor
    """Means of p(x | z), `(steps, *shape)`; the first decodes the code of row a, the last that of row b."""
    at: Tensor
    """Position on the line, from 0 to 1, `(steps,)`."""
    log_prior: Tensor | None
    """Joint log p(z) of all latents, nats, `(steps,)`, float64, exact; None if the prior has no density."""
    latents: dict[str, Tensor]
    """Decoded latents by name, `(steps, *event)`."""


def interpolate(
    run_or_pair: Run | Pair, a: Any, b: Any, steps: int = 9, *, seed: int = 0, on_progress: Progress = silent
) -> Interpolation:
    """Decode the means E[x | z] on the straight line between the codes of two rows.

    The code of a row is the centre of q(z | x), see `encode`; in a hierarchy all levels move together. Discrete latents
    cannot be interpolated: they must be the same in both rows, and stay constant.

    The line is straight for every prior: its ends are the codes, and a linear decoder maps it to a line. Under a
    standard normal prior its middle is closer to the origin, where points are more probable and less typical than
    samples (a great circle keeps the norm, but posterior means do not have the norm of samples either). `log_prior`
    shows where the line passes through regions of low prior density.

    References:
        Sampling Generative Networks (White, 2016), https://arxiv.org/abs/1609.04468, on great circles

    Arguments:
        run_or_pair: a run, or any pair that has seen data.
        a: one row of data, `(*row)` or `(1, *row)`. Its covariates hold for the whole line; b is encoded with its own.
        b: another row.
        steps: number of points, both ends included.
        seed: seed of the samples where a posterior has no known mean.
        on_progress: called with (points decoded, steps).

    Returns:
        Interpolation: x `(steps, *shape)`; log_prior `(steps,)`, nats, exact.

    Raises:
        DataError: there are fewer than two steps, a or b is more than one row, their discrete latents differ, or the
            model has no local latents (one value per datum).
        DeclarationError: the likelihood has no mean.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> interpolate(pair, x[0], x[1], steps=5).x.shape
        torch.Size([5, 3])
    """
    refuse(steps < 2, f"interpolate: expected at least two steps; got steps={steps}.")
    pair, todo = running.opened(run_or_pair), "Pass x[:1]."
    first, last = (running.one_row(pair, row, "interpolate", todo) for row in (a, b))
    ends = [encode.encode(pair, row, mean=True, seed=seed).latents for row in (first, last)]
    template, at = Template(run_or_pair, pair, steps, None, seed, first), torch.linspace(0, 1, steps)
    with running.analysed(pair, template.at(0, 2), seed):
        model = PlacedModel(template, samples(pair.simulate(template.at(0, 2))))
        path = _path(model.nodes, ends[0], ends[1], at)

        def decoded(start: int, stop: int) -> Interpolation:
            latents = {name: values[start:stop] for name, values in path.items()}
            nodes = model.sites(start, stop, {name: v.reshape(stop - start, -1) for name, v in latents.items()})
            x, log_p = running.decoded_mean(nodes, pair.layout, stop - start), None
            with suppress(NotImplementedError):
                log_p = sum_over([log_prob(nodes[name], pair.layout, 0).double() for name in path])
                log_p = log_p.expand(stop - start).cpu()
            return Interpolation(x, at[start:stop], log_p, latents)

        return running.by_chunks(decoded, steps, template.numbers, on_progress)


def _path(
    nodes: Mapping[str, Any], a: Mapping[str, encode.LatentCode], b: Mapping[str, encode.LatentCode], at: Tensor
) -> dict[str, Tensor]:
    """Return the values of every latent of the model along the line from a to b, `(steps, *event)`."""
    path = {}
    for name in (name for name in a if name in nodes):
        start, end, fixed = a[name].value, b[name].value, running.is_discrete(nodes[name]["fn"])
        refuse(fixed and not torch.equal(start, end), "refused.other_codes", name=name)
        path[name] = start.expand(len(at), *start.shape[1:])
        if not fixed:
            path[name] = torch.lerp(start, end, at.to(start).reshape(-1, *(1,) * (start.dim() - 1)))
    refuse(not path, "interpolate: expected latents of single data; got a model without any.")
    return path
