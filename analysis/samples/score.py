"""Scores of rows of data: log p(x) with its error, the reconstruction of every element, p-values beside other rows."""

import json
from contextlib import suppress
from dataclasses import field, replace
from math import prod
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import accept, quiet, require_counts
from pvae.analysis.bounds import accumulate, evidence
from pvae.analysis.bounds.weights import log_weights
from pvae.analysis.export.sites import rows_of
from pvae.analysis.samples import running
from pvae.data.split import elementwise
from pvae.distributions.exact import log_density
from pvae.distributions.missing import Absence, has_columns
from pvae.errors import DataError, PvaeError, StorageError
from pvae.pair import Layout, Pair, densities, is_point, read_joint_states, site_shape, terms_of, unwrapped
from pvae.pair.layout import samples as sample_sites
from pvae.runs.run import Run
from pvae.util import Progress, files, group, silent, write_atomic

REFERENCE_ROWS = 1000
"""Largest number of validation rows whose scores are the reference of p-values."""
REFERENCE_FILE = "reference_scores.json"
"""File among the analyses of a run that keeps the scores of its validation rows, so that p-values need no data."""


class Scores(running.Generated):
    """Scores of n rows of data; the result of `score`. All but `elements` are float64, log densities in nats."""

    reconstruction: Tensor
    """Posterior mean of log p(x | z), `(n,)`, nats, by self-normalised importance weights: an estimate."""
    elements: Tensor | None = None
    """Posterior mean of log p(x_j | z) of every element (column, pixel), `(n, *shape)`, nats, by the same weights: an
    estimate. Its sum is `reconstruction`; a missing element has 0. None where elements are not independent given z."""
    log_p: Tensor | None = None
    """log p(x), `(n,)`: log of the mean importance weight, in expectation a lower bound. It is exact for flows, and
    where the model sums all latents out. Missing values are integrated out. None where the guide has no density."""
    error: Tensor | None = None
    """Monte Carlo standard error of `log_p`, `(n,)`, nats; 0 where it is exact, and for deterministic codes."""
    elbo: Tensor | None = None
    """ELBO, `(n,)`, nats: mean log weight of the same samples, a lower bound on log p(x) in expectation."""
    khat: Tensor | None = None
    """Pareto shape k-hat of the largest importance weights, `(n,)`; NaN without a tail. Above
    min(1 - 1 / log10(samples), 0.7), which is 0.5 for 100 samples, `log_p` is not reliable."""
    ess: Tensor | None = None
    """Effective number of importance samples, `(n,)`."""
    rank: Tensor | None = None
    """Number of reference rows whose `statistic` is not above that of the row, `(n,)`, int64."""
    p_value: Tensor | None = None
    """(1 + rank) / (1 + m) with m reference rows, `(n,)`: exactly uniform on 1/(1+m), ..., 1 for rows of the
    distribution of the reference rows; small for rows that are less likely than nearly all of these."""
    absent: dict[str, str] = field(default_factory=dict)
    """Reason why a field is None, by its name."""

    @property
    def statistic(self) -> Tensor:
        """Quantity that `rank` compares, `(n,)`: `log_p`, or `reconstruction` where there is no log p(x)."""
        return self.reconstruction if self.log_p is None else self.log_p


def score(
    run_or_pair: Run | Pair, x: Any, *, samples: int = 100, reference: Any = None, seed: int = 0,
    on_progress: Progress = silent,
) -> Scores:  # fmt: skip
    """Score rows of data: log p(x) of each by importance sampling from the guide, by element, and as a p-value.

    log p(x) and its diagnostics are those of `evidence`. Missing values (NaN, where declared) are integrated out
    exactly, since elements are independent given z; where the decoder gives their probability to be missing
    (`missingness`), log p of which are missing is part of all terms. Where a guide samples global latents, p(x) is the
    posterior predictive density, the mean over q of p(x | globals). Rows with covariates are scored given these.

    A guide without a density (the point of an autoencoder) gives no bound on log p(x): log p(x | z) at its point is
    then what rows are ranked by.

    The p-value of a row is valid if the reference rows are a random sample that the fit did not use. For a run they are
    at most 1000 rows of its validation split (on which a fit has chosen its epoch, which matters little), scored
    once: their scores are kept in the run's folder, for use where the data are not at hand. All processes of a group
    have to call this function, with the same rows; they share the work.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        Testing for Outliers with Conformal p-values (Bates et al., 2023), https://arxiv.org/abs/2104.08279

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        samples: number of importance samples of a row.
        reference: rows `(m, *row)` beside which the rows are ranked; by default the validation rows of a run.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows done, n).

    Returns:
        Scores; what cannot be given is None, with its reason in `absent`.

    Raises:
        DataError: x has no rows, or rows of another shape.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> run = example_run()
        >>> found = score(run, run.data.test.x[:5])
        >>> found.log_p.shape, found.elements.shape, bool((found.p_value > 0).all())
        (torch.Size([5]), torch.Size([5, 3]), True)
    """
    require_counts("score", samples=samples)
    pair = running.opened(run_or_pair)
    found = _scored(pair, accept(pair, x, known=False), samples, seed, on_progress)
    try:
        beside = _reference(run_or_pair, pair, reference, samples)
    except PvaeError as error:
        if reference is not None:
            raise
        why = f"no validation rows to rank beside: {error} Pass reference=..., or score once where the data are."
        return replace(found, absent={**found.absent, "rank": why, "p_value": why})
    rank = torch.searchsorted(beside.sort().values, found.statistic, right=True)
    return replace(found, rank=rank, p_value=(1 + rank).double() / (1 + len(beside)))


def _scored(pair: Pair, x: Tensor, samples: int, seed: int, on_progress: Progress) -> Scores:
    """Return the scores of rows `(n, *row)` without ranks."""
    layout, absent, certain = pair.layout, dict[str, str](), False
    with quiet(pair, x, seed):
        try:
            certain = evidence.require_posterior(pair) and pair.structure.points.issuperset(layout.shared)
        except DataError as error:
            absent = dict.fromkeys(("log_p", "error", "elbo", "khat", "ess"), str(error))

        def read(traces: Any, particles: int) -> tuple[Tensor, Tensor]:
            terms = terms_of(traces, layout, particles, False, None)
            total = terms.reconstruction.double().reshape(max(particles, 1), -1, 1)
            weights = torch.zeros_like(total[..., 0]) if absent else log_weights(terms, layout.shared)
            elements = element_densities(traces, layout, particles, total.shape[1])
            values = total if elements is None else torch.cat([total, elements.double()], -1)
            return weights.expand(total.shape[:2]), values

        def draw(chunk: Tensor, count: int) -> tuple[Tensor, ...]:
            at_once = count if count > 1 and pair.way_of_particles(chunk) == "plate" else 0
            found = [read(pair.traces(chunk, at_once or 1), at_once) for _ in range(1 if at_once else count)]
            return tuple(map(torch.cat, zip(*found, strict=True)))

        count, together = 1 if certain else samples, pair.structure.rows is not None
        found = accumulate.accumulate_weights(x, count, draw, on_progress, together=together)
    known: Any = found.log_p, found.squared_errors[-1].sqrt(), found.bounds[0], found.khat, found.ess
    known, elements = [None] * 5 if absent else known, found.means[1:].mT.float()
    if not elements.numel():
        absent["elements"] = "elements of x are not independent given z, z determines x, or codes are summed out"
        return replace(Scores(found.means[0], None, *known), absent=absent)
    event = pair.frame.x if elements.shape[1] == prod(pair.frame.x) else elements.shape[1:]
    return replace(Scores(found.means[0], elements.reshape(-1, *event), *known), absent=absent)


def _reference(source: Run | Pair, pair: Pair, given: Any, samples: int) -> Tensor:
    """Return the statistics of the reference rows, `(m,)`, float64.

    Raises:
        DataError: no rows are given or at hand, or the file of kept scores holds something else.
    """
    if given is not None:
        return _scored(pair, accept(pair, given), samples, 0, silent).statistic
    if not isinstance(source, Run):
        raise DataError("expected a run; got a pair.")
    path, key = source.path / "analysis" / REFERENCE_FILE, f"{source.checkpoint.path.name}, {samples} samples"
    kept = group.from_first(lambda: files.read_object(path.parent, REFERENCE_FILE) if path.is_file() else {})
    if key not in kept:
        split = source.data.validation
        index = torch.linspace(0, len(split) - 1, min(len(split), REFERENCE_ROWS)).long()
        found = _scored(pair, accept(pair, split.rows[index]), samples, 0, silent).statistic
        kept[key] = found.nan_to_num().tolist()  # JSON has no infinity
        with suppress(StorageError):  # of a run that may only be read
            write_atomic(source.files.analysis / REFERENCE_FILE, json.dumps(kept))
    with suppress(TypeError, ValueError, RuntimeError):
        return torch.tensor(kept[key], dtype=torch.float64).reshape(-1)
    raise DataError(f"{path}: expected scores, numbers by checkpoint; got something else. Delete the file.")


# ---------------------------------------------------------------------- elements of x


def is_elementwise(fn: Any) -> bool:
    """Return True if the elements of x are independent under p(x | z), with densities of their own."""
    return has_columns(fn) or not (unwrapped(fn).event_shape or is_point(fn))


def kinds_of(fn: Any, count: int) -> Tensor:
    """Return booleans `(3, D)`: True where an element of x is real, where it is a level (or bit), where a category."""
    supports = unwrapped(fn).element_supports if has_columns(fn) else [elementwise(unwrapped(fn).support)] * count
    category = [isinstance(support, type(distributions.constraints.integer_interval(0, 1))) for support in supports]
    level = [support is distributions.constraints.boolean or c for support, c in zip(supports, category, strict=True)]
    return torch.tensor([[not support.is_discrete for support in supports], level, category])


def element_densities(traces: Any, layout: Layout, particles: int, rows: int) -> Tensor | None:
    """Return log p(x_j | z) of every element j of x, nats, `(particles or 1, rows, D)`; exact.

    With codes c that the model sums out it is the expectation under p(c | x, z). None where the elements are not
    independent given z, where z determines x, and where x depends on some of these codes alone.
    """
    nodes, count = sample_sites(traces[1]), max(particles, 1)
    node = running.datum(layout, nodes)
    fn, base = node["fn"], unwrapped(node["fn"])
    if layout.eliminated or not is_elementwise(fn):
        return None
    value = base.element_log_prob(node["value"]) if has_columns(fn) else log_density(base, node["value"])
    if isinstance(fn, Absence):
        value = value + fn.absence_log_prob(node["value"])
    for mask in densities.masks_of(node):
        value = torch.where(mask.bool(), value, 0.0)
    value = rows_of(value, node, layout, rows)
    if layout.enumerated:
        table = read_joint_states(nodes, layout, particles)
        lead = len(table.sizes)
        if tuple(fn.batch_shape[:lead]) != table.sizes[::-1]:  # Pyro counts the dimensions of states from the right
            return None
        weights = table.weights.permute(*reversed(range(lead)), *range(lead, table.weights.dim()))
        weights = weights.reshape(-1, count, rows).permute(2, 0, 1)
        value = (weights[..., None] * value.reshape(*weights.shape, -1)).sum(1)
    return value.reshape(rows, count, -1).movedim(1, 0)


class Hidden(Messenger):
    """Pyro handler that leaves elements of x out of the likelihood: their log density counts as 0.

    Arguments:
        layout: layout of a pair that observes x whole at one site, with elements that are independent given z.
        missing: booleans `(n, *x)`, True where an element is left out.
    """

    def __init__(self, layout: Layout, missing: Tensor) -> None:
        super().__init__()
        self.layout, self.missing = layout, missing

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.layout.observed:
            fn = msg["fn"]
            base = unwrapped(fn).expand((*fn.batch_shape, *fn.event_shape))
            seen = ~site_shape(msg, self.layout).spread(self.missing.flatten(1))
            msg["fn"] = base.mask(seen).to_event(len(fn.event_shape))
