"""Estimators of the gradient of a bound beside each other: bias, variance, signal-to-noise ratio and time."""

import math
from time import perf_counter, process_time
from typing import Any

import pandas
import torch
from pyro.infer import config_enumerate
from rich.box import SIMPLE_HEAD as LEAN
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, require_counts
from pvae.analysis.figures.estimate import text
from pvae.distributions.relaxed import Discretised
from pvae.errors import DeclarationError
from pvae.objectives import base, elbo
from pvae.pair import Pair, evaluating
from pvae.runs.run import Run
from pvae.util import Progress, Record, plain, seeds, silent

MOST_STATES = 4096
"""Largest number of joint states of codes over which a gradient is summed."""
SIGNIFICANT = 3.0
"""Number of standard errors from which a bias counts."""
ROUNDING = 1e-4
"""Largest bias, relative to the gradient, that may be due to rounding."""


class Gradients(Record):
    """Estimators of the gradient of one bound for each group of parameters, at fixed weights and data."""

    n: int
    """Number of data in the batch."""
    draws: int
    """Number of gradients of each estimator."""
    exact: bool
    """True if the bias is against a sum over all codes (beside real latents, the mean of 2 * `draws` such sums), False
    if against the mean of 2 * `draws` gradients."""
    frame: pandas.DataFrame
    """A row for each `group` and `estimator`. `bias`: norm of the bias of the mean gradient, divided by the norm of the
    gradient, and its standard error `bias_error`. `variance`: trace of the covariance, squared nats per datum.
    `signal_to_noise`: norm of the mean gradient divided by the root of the variance. `seconds` of a gradient,
    of the processor where the pair is on one. `per_second`: square of the ratio divided by the seconds, which stays
    when gradients are averaged. `biased`: whether the squared bias is more than `SIGNIFICANT` errors."""
    refused: dict[str, str]
    """Reasons against other estimators, by name."""

    @property
    def verdicts(self) -> list[str]:
        """One sentence for each group: the estimator to choose."""
        groups = self.frame.groupby("group", sort=False)
        return [text("gradients.verdict", group=name, rows=part.to_dict("records")) for name, part in groups]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures and the verdicts as plain values, for JSON."""
        found = {"n": self.n, "draws": self.draws, "exact": self.exact, "rows": self.frame.to_dict("records")}
        return dict(plain({**found, "verdicts": self.verdicts, "refused": self.refused}))

    def __str__(self) -> str:
        shown = self.frame.to_string(index=False, float_format="{:.3g}".format)
        return "\n".join([text("gradients.title", found=self), shown, *self.verdicts, *self.refused.values()])

    def __rich__(self) -> Table:
        below = "\n".join([*self.verdicts, *self.refused.values()])
        title = Text(text("gradients.title", found=self))
        table = Table(title=title, caption=Text(below), caption_justify="left", box=LEAN)
        for column in ("estimator", "bias", "variance", "signal / noise", "ms", "per second"):
            table.add_column(column, justify="left" if column == "estimator" else "right", no_wrap=" " not in column)
        for group, rows in self.frame.groupby("group", sort=False):
            table.add_row(Text(f"{group}:", style="bold"))
            for row in rows.to_dict("records"):
                figures = row["variance"], row["signal_to_noise"], 1000 * row["seconds"], row["per_second"]
                bias = f"{row['bias']:.2g} ± {row['bias_error']:.1g}"
                table.add_row(row["estimator"].replace("_", " "), bias, *(f"{value:.3g}" for value in figures))
        return table


def gradients(
    run: Run, split: str = "test", rows: int = 100, draws: int = 100, seed: int = 0, *, on_progress: Progress = silent
) -> Gradients:
    r"""Compare the estimators that the objective of a run has for the gradient of its bound, on one batch.

    Independent gradients g, g' of an estimator give unbiased E[g . g'] of the squared mean, E|g - g'|^2 / 2 of the
    variance, and E[(g - r) . (g' - r')] of the squared bias, with two independent references r, r': the gradient of the
    ELBO summed over all codes, or where z is real the means of `draws` reparameterised gradients (beside codes, of
    such sums). A relaxation is biased as a gradient of the codes' ELBO. The weight of the KL is that of the last epoch.
    A bound of importance weights, and codes without a probability, have no sum: their reference is their own mean.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), https://arxiv.org/abs/1802.04537

    Arguments:
        run: a fitted run.
        split: "train", "validation" or "test".
        rows: number of data in the batch, chosen at random with `seed`.
        draws: gradients of each estimator, at least 4.
        seed: seed of rows and samples.
        on_progress: called with (gradients done, gradients in all).

    Returns:
        Gradients, estimates with their Monte Carlo errors. Memory: some ten times the size of the parameters.

    Raises:
        DataError: a count is too small, or the pair has no likelihood.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = gradients(example_run(), rows=4, draws=4)
        >>> {"reparameterised", "stick_the_landing"} <= {*found.frame["estimator"]}
        True
    """
    require_counts("gradients", rows=rows, draws=draws - 3)
    pair, objective, part = run.pair, run.plan.objective, run.data.split(split)
    x = accept(pair, part.rows[seeds.subset(len(part), rows, seed)])
    named = {name: p for name, p in pair.named_parameters() if p.requires_grad and ".baseline." not in name}
    groups = list(dict.fromkeys(map(_group, named)))
    of = torch.cat([torch.full((p.numel(),), groups.index(_group(name)), device=x.device) for name, p in named.items()])
    weight = torch.tensor(objective.beta.at(run.plan.train.epochs, run.plan.train.epochs), device=x.device)
    made, refused, clock = elbo.estimators(objective, pair), {}, process_time if x.is_cpu else perf_counter
    found: list[dict[str, Any]] = []

    def gradient(source: Pair, asked: base.Objective, number: int) -> Tensor:
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, number), x.device)
        loss, _ = asked.evaluate(source, x, None, weight)
        slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([slope.flatten() for slope in slopes])

    def dot(one: Any, other: Any) -> Tensor:
        return torch.zeros(len(groups), dtype=torch.float64, device=x.device).index_add(0, of, (one * other).double())

    with evaluating(pair), torch.random.fork_rng(), torch.enable_grad():
        known = _summed(pair, x) if isinstance(objective, elbo.ELBO) else None
        usual = next(iter(made.values())) if known is None else elbo.TraceELBO(free_bits=objective.free_bits)
        count = 1 if known and {*known.layout.latents, *known.layout.shared} <= {*known.layout.expected} else draws
        one, other = (sum(gradient(known or pair, usual, s + i) for i in range(count)) / count for s in (0, draws))
        for index, (name, asked) in enumerate(made.items()):
            try:
                parts, start = [], clock()
                for i in range(draws // 2):
                    a, b = (gradient(pair, asked, (index + 1) * 2 * draws + 2 * i + j) for j in range(2))
                    parts.append(torch.stack([dot(a, b), dot(a - b, a - b) / 2, dot(a - one, b - other)]))
                    on_progress(index * draws + 2 * i + 2, len(made) * draws)
                seconds = (clock() - start) / len(parts) / 2
            except DeclarationError as error:
                refused[name] = str(error)
                continue
            pairs = torch.stack(parts)
            if not found:  # the references are drawn by the first
                noise = pairs[:, 0].std(0) / draws * (count > 1)
            errors = torch.hypot(pairs[:, 2].std(0) / len(parts) ** 0.5, noise)
            figures = zip(groups, pairs.mean(0).T.tolist(), errors.tolist(), dot(one, other).tolist(), strict=True)
            for group, mean, spread, norm in figures:
                found.append({"group": group, "estimator": name, **_figures(mean, spread, norm, seconds)})
    order = sorted(found, key=lambda row: groups.index(row["group"]))
    return Gradients(len(x), draws, known is not None, pandas.DataFrame(order), refused)


def _group(name: str) -> str:
    """Return the group of a parameter: of the encoder, of the posterior or prior of a latent, of the decoder."""
    part, *rest = name.split(".")[1:] or [name]
    return f"{part.removesuffix('s')} of {rest[0]}" if part in ("posteriors", "priors") else part


def _figures(means: Any, error: float, norm: float, seconds: float) -> dict[str, float]:
    """Return an estimator's figures in a group: means of g . g' and |g - g'|^2 / 2, the squared bias, its error."""
    signal, variance, bias = means
    power = max(signal, 0.0) / variance if variance > 0 else math.inf if signal > 0 else math.nan
    off, norm = math.sqrt(max(bias, 0.0)), math.sqrt(max(norm, 1e-30))
    return {
        "bias": off / norm, "bias_error": error / max(2 * off, math.sqrt(error), 1e-30) / norm, "variance": variance,
        "signal_to_noise": math.sqrt(power), "seconds": seconds, "per_second": power / seconds,
        "biased": bias > SIGNIFICANT * error and off > ROUNDING * norm,
    }  # fmt: skip


def _summed(pair: Pair, x: Tensor) -> Pair | None:
    """Return the pair with its codes summed over; None if z is real, or if they have too many joint states."""
    names = {*pair.layout.scored, *pair.layout.relaxed}
    sites = [site.space for site in getattr(pair.guide, "sites", ()) if site.name in names]
    if not names or len(sites) < len(names) or sum(space.log_states for space in sites) > math.log(MOST_STATES):
        return None
    model, guide = (Discretised(pair.relaxed)(program) for program in (pair.model, pair.guide))
    return Pair(model, config_enumerate(guide)).adopt(x)
