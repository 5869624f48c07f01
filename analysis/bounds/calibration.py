"""Calibration of the guide: is q(z | x) the posterior of the model, on data that the model itself makes?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import accept, quiet, require_likelihood, require_room, same_globals, simulated
from pvae.analysis.bounds.ranks import FINE, LEVEL, RankTest, rank_tests
from pvae.analysis.bounds.weights import log_weights
from pvae.analysis.figures.estimate import Estimate, Figures, Row, refuse, text, texts
from pvae.distributions.relaxed import LogOneHot
from pvae.errors import instead
from pvae.pair import Pair, PairData, ProgramError, is_code, is_masked, sum_over, terms_of
from pvae.pair.layout import samples, site_shape, unwrapped
from pvae.util import Progress, seeds, silent

NUMBERS = 2**21
"""Largest number of elements of x in one batch of samples."""
SHOWN = 12
"""Largest number of coordinates in the table and the sentences, the smallest p-values first."""
JOINT = "all jointly"


class Calibration(Figures):
    """Ranks of the latents that made simulated data among samples of q(z | x); the result of `calibration`."""

    n: int
    """Number of rows simulated from the model."""
    draws: int
    """Number L of samples of q(z | x) for every row."""
    importance: int
    """Number of samples of q(z | x) from which each weighted sample is chosen; 0 for none."""
    guide: tuple[RankTest, ...]
    """Tests of every coordinate of every latent under q(z | x), and last of all coordinates jointly."""
    weighted: tuple[RankTest, ...]
    """The same with importance weights; empty without."""

    @property
    def joint(self) -> RankTest:
        """Test of all coordinates jointly: the ranks of the distance to a reference point; "narrow" or "wide"."""
        return self.guide[-1]

    @property
    def worst(self) -> list[RankTest]:
        """Coordinates of q(z | x) in the order of their p-values, at most `SHOWN`."""
        return sorted(self.guide[:-1], key=lambda test: test.p)[:SHOWN]

    def rows(self) -> Iterator[Row]:
        for name, tests in (("", self.guide), (" weighted", self.weighted)):
            for level in (0.5, 0.9) if tests else ():
                what = f"proportion of z in the region to which q gives {100 * level:.0f} %"
                yield f"coverage {100 * level:.0f} %{name}", tests[-1].within(level), what
        again = {test.name: test for test in self.weighted}
        for test in self.worst:
            yield test.name, test.width, _told(test)
            if test.name in again and test.verdict != FINE:
                yield f"{test.name} weighted", again[test.name].width, _told(again[test.name])

    @property
    def remarks(self) -> tuple[str, ...]:
        return (*self.sentences, text("calibration.values", more=len(self.guide) - 1 - SHOWN))

    @property
    def sentences(self) -> tuple[str, ...]:
        """Sentences on q(z | x), on its coverage and on importance weights, each with its figures."""
        said: list[str] = []
        for tests, q in ((self.guide, "q"), (self.weighted, "weighted q")):
            if tests:
                of = {"share": tests[-1].within(0.9), "verdict": tests[-1].verdict, "coordinates": len(tests) - 1}
                said += texts("calibration.sentences", found=self, q=q, wrong=[*_wrong(tests[:-1])], **of)
        return (*said, text("calibration.meaning"))

    def to_dict(self) -> dict[str, Any]:
        tests = {name: [asdict(test) for test in getattr(self, name)] for name in ("guide", "weighted")}
        coverage = self.joint.within(0.9).to_dict()
        return {**self.facts(), "level": LEVEL, "coverage_90": coverage, **tests, "said": list(self.sentences)}


def _told(test: RankTest) -> str:
    return f"{test.verdict}; shift {test.shift.value:+.2f}, p {test.p:.1g}"


def _wrong(tests: Sequence[RankTest]) -> Iterator[tuple[str, list[str], float, float]]:
    """Yield each fault with the names of its coordinates, by their p-values, their median width and largest shift."""
    for word in ("too narrow", "too wide", "shifted", "of another shape"):
        if found := sorted((test for test in tests if word in test.verdict), key=lambda test: test.p):
            widths, shifts = [test.width.value for test in found], [test.shift.value for test in found]
            yield word, [test.name for test in found], float(np.median(widths)), max(shifts, key=abs)


def calibration(
    pair: Pair, rows: int = 1000, draws: int = 19, *, importance: int = 0, x: PairData | None = None, seed: int = 0,
    on_progress: Progress = silent,
) -> Calibration:  # fmt: skip
    r"""Compare q(z | x) with the posterior of the model on data that the model makes (simulation-based calibration).

    For z* ~ p(z), x ~ p(x | z*), the latent z* is an exact sample of the posterior of x. If q(z | x) is that posterior,
    the rank of every coordinate of z* among L samples of q is uniform on 0 .. L. Codes and bits are ranked by how rare
    they are among z* and the samples together; ties are broken at random. All coordinates are tested jointly by the
    rank of the distance of z* to a reference point, which gives the expected coverage of regions of q (TARP). The
    reference of a row is the z* of that of the rows before it whose x is nearest: so a q that ignores x, whose ranks
    are uniform, is found as well. Holm's method holds the probability that an exact posterior is not called fine in any
    coordinate, or jointly, at 5 %.

    With `importance` = K each of the L samples is also chosen from K of q, by the weights p(x, z) / q(z | x): what is
    still off then is off in IWAE bounds and importance-weighted posteriors, too.

    Warning: the result says nothing on whether the model fits data, nor on how good q is on data unlike the model's. A
    bias of q that differs in sign from row to row shows as too narrow.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
        https://arxiv.org/abs/1804.06788
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023),
        https://arxiv.org/abs/2302.03026

    Arguments:
        pair: any Pyro pair whose model can make x, and whose guide samples its latents. Global latents are sampled once
            from the guide, and are given.
        rows: number of rows to simulate.
        draws: number L of samples of q(z | x) for every row.
        importance: number K of samples from which each weighted one is chosen; 0 for no weighted ones.
        x: rows of data `(m, *event)` from which covariates are taken, and whatever else the model reads; it makes x
            itself anew. Needed only where it reads any.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows done, rows).

    Returns:
        Calibration: estimates, with a test of every coordinate and of all jointly.

    Raises:
        DataError: a count is too small; the model has no likelihood, or is determined by its latents; latents are
            points, masked or summed out; the programs run on given rows only; or the model observes something else than
            its data.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, _ = example_pair()
        >>> [test.name for test in calibration(pair, rows=100).guide]
        ['z[0]', 'z[1]', 'all jointly']
    """
    few = rows < 2 or draws < 2 or importance < 0
    refuse(few, "refused.few_ranks", rows=rows, draws=draws, importance=importance)
    taken = draws * max(1, importance)
    latents = sum(shape.numel for shape in pair.structure.shapes.values())
    told = f"{rows:,} rows with {taken:,} samples of each"
    require_room(pair, "calibration", rows + 2 * taken, 2 * rows * draws * latents, told)
    like = _template(pair, rows, x, seed)
    points = [name for name in pair.layout.latents if name in pair.structure.points and not pair.structure.determined]
    reasons = texts("refused.calibration", pair=pair, points=points)
    refuse(reasons, "".join(reasons[:1]))
    chunk = max(1, pair.structure.rows_at_once(max(1, NUMBERS // like[0].numel())) // taken)
    parts, done = [], 0
    with quiet(pair, like, seed), same_globals(pair, like):
        require_likelihood(pair, "calibration")
        for rows_at_once in like.split(chunk):
            names, made = _simulated(pair, rows_at_once, draws, importance)
            parts.append(made)
            on_progress(done := done + len(rows_at_once), rows)
        seen, true, plain, weighted = (torch.cat(column, -2) for column in zip(*parts, strict=True))
        reference = true[_nearest_before(seen)]
        reference[0] = 0
        tests = [_tests(true, z, reference, names) for z in (plain, weighted)]
    return Calibration(rows, draws, importance, tests[0], tests[1] if importance else ())


def _template(pair: Pair, rows: int, x: PairData | None, seed: int) -> Tensor:
    """Return rows to run the model on, `(rows, *event)`: some of `x` at random, or zeros where it reads none."""
    if x is not None:
        x = accept(pair, x, known=False)
        return x[torch.randint(len(x), (rows,), generator=seeds.generator(seed, seeds.ANALYSIS, 5)).to(x.device)]
    wanted = "calibration: expected rows of data, for the model reads"
    read = ", ".join(pair.frame.covariates) or ("several arguments" if pair.arguments is not None else "")
    refuse(read, f"{wanted} {read}; got none. Pass x=..., of which all but x itself is kept.")
    like = accept(pair, pair.frame.blank(rows))
    made = []
    for number in (0, 1) if not pair.declared else ():
        with instead(ProgramError, f"{wanted} them: {{problem}} Pass x=..."), quiet(pair, like, seed):
            nodes = samples(pair.simulate(like[:2] + number))
        made.append([node["value"] for node in nodes.values()])
    refuse(made and not all(map(torch.equal, *made)), f"{wanted} them; got none. Pass x=..., some rows of data.")
    return like


def _simulated(pair: Pair, like: Tensor, draws: int, importance: int) -> tuple[dict[str, bool], tuple[Tensor, ...]]:
    """Simulate a row for each of `like`, and sample its posterior, with and without importance weights.

    Returns:
        The D coordinates of all latents (see `_coordinates`); and rows `(n, elements)`, the latents that made them
        `(n, D)`, and samples of q(z | x) `(L, n, D)`, plain and weighted.
    """
    x, values = simulated(pair, like, "calibration")
    pool = max(1, importance)
    tiled = x.repeat(draws * pool, *(1,) * (x.dim() - 1))
    if importance:
        guide_trace, model_trace = pair.traces(tiled)
        terms = terms_of((guide_trace, model_trace), pair.layout, 0, False, None)
        weights = log_weights(terms, pair.layout.shared).nan_to_num(nan=-torch.inf).reshape(draws, pool, len(x))
    else:
        guide_trace, weights = pair.guide_trace(tiled), torch.zeros(draws, pool, len(x), device=x.device)
    names, z = _coordinates(pair, guide_trace)
    z = z.reshape(draws, pool, len(x), -1)
    chosen = (weights - torch.empty_like(weights).exponential_().log()).argmax(1)  # by weight (Gumbel-max)
    weighted = z.gather(1, chosen[:, None, :, None].expand(-1, 1, -1, z.shape[-1]))[:, 0]
    _, true = _coordinates(pair, pair.model_trace(x, values))
    return names, (x.reshape(len(x), -1), true, z[:, 0], weighted)


def _coordinates(pair: Pair, trace: Trace) -> tuple[dict[str, bool], Tensor]:
    """Return all coordinates of the latents of a trace: by name, whether it is a code or bit; and values `(n, D)`.

    The values are float64; one-hots are indices.
    """
    nodes, found = samples(trace), []
    names: dict[str, bool] = {}
    for name in pair.layout.latents:
        refuse(name not in nodes or is_masked(nodes[name]), "refused.not_simulated", name=name)
        shape = site_shape(nodes[name], pair.layout)
        flat, sizes = shape.flatten(nodes[name]["value"]).double(), (*shape.left, *shape.right)
        fn = nodes[name]["fn"]
        if isinstance(unwrapped(fn), distributions.OneHotCategorical | LogOneHot):
            flat, sizes = flat.unflatten(1, (-1, sizes[-1])).argmax(-1).double(), sizes[:-1]
        places = product(*(range(size) for size in sizes if size > 1))
        code = is_code(fn) or isinstance(unwrapped(fn), distributions.Bernoulli)
        names |= {f"{name}[{', '.join(map(str, at))}]" if at else name: code for at in places}
        found.append(flat)
    return names, torch.cat(found, 1)


def _tests(true: Tensor, z: Tensor, reference: Tensor, names: Mapping[str, bool]) -> tuple[RankTest, ...]:
    """Return the tests of every coordinate of samples `(L, n, D)`, and of all jointly.

    A code, which has no order, is ranked by how rare it is among the samples and the true one together.
    """
    both, codes = torch.cat([z, true[None]]), torch.tensor(list(names.values()), device=z.device)
    scale = both.flatten(0, 1).std(0).clamp(min=1e-300)
    alike = sum_over([(both == one).double() for one in both])
    placed = torch.where(codes, -alike, both)
    parts = torch.where(codes, (both != reference).double(), ((both - reference) / scale).square())
    ranks = [_ranks(values[-1], values[:-1]) for values in (placed, parts.sum(-1, keepdim=True))]
    *found, joint = rank_tests(np.concatenate(ranks, 1), len(z), [*names, JOINT])
    tests = [t.of_distances(_disagreement(alike[..., d])) if names[t.name] else t for d, t in enumerate(found)]
    return (*tests, joint.of_distances(joint.width))


def _disagreement(alike: Tensor) -> Estimate:
    """Return how often two samples differ, over how often a sample and the true code do, with a delta-method error.

    Arguments:
        alike: number of codes among all samples and the true one, the last, that are as each of them, `(L + 1, n)`.
    """
    samples = len(alike) - 1
    off = 1 - (alike[-1] - 1) / samples
    own = (samples - (alike[:-1].sum(0) - alike[-1] + 1) / samples) / (samples - 1)
    if not (total := float(off.sum())):
        return Estimate(1.0)
    value = float(own.sum()) / total
    return Estimate(value, float((own - value * off).std()) * math.sqrt(len(own)) / total)


def _ranks(true: Tensor, z: Tensor) -> np.typing.NDArray[np.int64]:
    """Return the ranks of true values `(n, D)` among samples `(L, n, D)`, `(n, D)`; ties are broken at random."""
    below, ties = (z < true).sum(0), (z == true).sum(0)
    return np.asarray((below + (torch.rand(true.shape, device=true.device) * (ties + 1)).long()).cpu().numpy())


def _nearest_before(x: Tensor) -> Tensor:
    """Return for every row of x `(n, elements)` the index of the nearest of the rows before it; 0 for the first.

    As no row serves those before it, the ranks of all rows are independent.
    """
    x = x.float().nan_to_num()
    found = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    for start in range(1, len(x), 500):
        apart = torch.cdist(x[start : start + 500], x)
        found.append(apart.masked_fill(torch.ones_like(apart, dtype=torch.bool).triu(start), torch.inf).argmin(1))
    return torch.cat(found)
