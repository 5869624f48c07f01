"""Interpolation between two rows of data along the line between their codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.samples import running
from pvae.analysis.samples.encode import LatentCode, encode
from pvae.analysis.samples.sample import Template
from pvae.analysis.samples.traversal import PlacedModel, one_row
from pvae.errors import DataError
from pvae.pair.densities import log_prob, sum_over
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util.progress import Progress, silent


@dataclass(frozen=True, eq=False, repr=False)
class Interpolation(running.Generated):
    """Data decoded along the line between the codes of two rows; the result of `interpolate`.

    `save` has keys `x`, `at`, `latents/<name>` and, where known, `log_prior`.
    """

    x: Tensor
    """Means of p(x | z), `(steps, *shape)`; the first decodes the code of row a, the last that of row b."""
    at: Tensor
    """Position on the line, from 0 to 1, `(steps,)`."""
    latents: dict[str, Tensor]
    """Decoded latents by name, `(steps, *event)`."""
    log_prior: Tensor | None
    """Joint log p(z) of all latents, nats, `(steps,)`, float64, exact; None if the prior has no density."""

    def tensors(self) -> dict[str, Tensor]:
        prior = {} if self.log_prior is None else {"log_prior": self.log_prior}
        return {"x": self.x, "at": self.at, **prior, **running.named("latents", self.latents)}


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
    if steps < 2:
        raise DataError(f"interpolate: expected at least two steps; got steps={steps}.")
    pair, todo = running.opened(run_or_pair), "Pass x[:1]."
    first, last = (one_row(pair, row, "interpolate", todo) for row in (a, b))
    ends = [encode(pair, row, mean=True, seed=seed).latents for row in (first, last)]
    template, at = Template(run_or_pair, pair, steps, None, seed, first), torch.linspace(0, 1, steps)
    with running.analysed(pair, template.at(0, 2), seed):
        model = PlacedModel(template, samples(pair.simulate(template.at(0, 2))))
        path = _path(model.nodes, ends[0], ends[1], at)

        def decoded(start: int, stop: int) -> Interpolation:
            latents = {name: values[start:stop] for name, values in path.items()}
            nodes = model.sites(start, stop, {name: v.reshape(stop - start, -1) for name, v in latents.items()})
            x = running.decoded_mean(nodes, pair.layout, stop - start)
            try:
                log_p = sum_over([log_prob(nodes[name], pair.layout, 0).double() for name in path])
            except NotImplementedError:
                return Interpolation(x, at[start:stop], latents, None)
            return Interpolation(x, at[start:stop], latents, log_p.expand(stop - start).cpu())

        return running.by_chunks(decoded, steps, template.numbers, on_progress)


def _path(
    nodes: Mapping[str, Any], a: Mapping[str, LatentCode], b: Mapping[str, LatentCode], at: Tensor
) -> dict[str, Tensor]:
    """Return the values of every latent of the model along the line from a to b, `(steps, *event)`."""
    path = {}
    for name in a:
        if name not in nodes:
            continue
        start, end = a[name].value, b[name].value
        if not running.is_discrete(nodes[name]["fn"]):
            path[name] = torch.lerp(start, end, at.to(start).reshape(-1, *(1,) * (start.dim() - 1)))
        elif torch.equal(start, end):
            path[name] = start.expand(len(at), *start.shape[1:])
        else:
            raise DataError(
                f"interpolate: expected latents of real numbers, or rows of one and the same code; got {name}, which "
                f"differs: discrete codes cannot be interpolated. Take other rows, or move one coordinate: traverse."
            )
    if not path:
        raise DataError("interpolate: expected latents of single data; got a model without any.")
    return path
