"""Structure of a pair (arguments, sites, shapes), read once by running it and checked against every batch."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.component import Shape
from pvae.distributions import Certain, LogOneHot, Rounded, twin
from pvae.errors import instead, refuse
from pvae.pair.layout import Layout, SiteShape, Traces, is_point, joined, samples, unwrapped
from pvae.util import Record, field, replace

ROWS_OF_A_BATCH = 1000
"""Largest number of rows in one batch of an analysis."""
PROBABILITIES_AT_ONCE = 2**20
"""Largest number of code probabilities in one batch of an analysis (8 MiB in float64, held in a dozen copies)."""


class Unpacking(Record):
    """Auxiliary site of one latent, and the transform from its values to those of the latent.

    `AutoNormal`, `AutoLowRankMultivariateNormal`, `EasyGuide` and others sample an unconstrained auxiliary site a and
    set z = T(a) by `Delta(z, log_density)`, whose density is minus the log Jacobian of T: log q(z) = log q(a) +
    log_density.
    """

    auxiliary: str
    transform: td.Transform


Unpacked = Mapping[str, Unpacking]
"""Unpacked latents of a guide that have an auxiliary site of their own, by name."""


class Structure(Record):
    """Properties of a pair that hold for any weights and any batch; relaxed latents are described as discrete codes."""

    event: Shape
    """Shape of a row of data."""
    layout: Layout
    """Names of the sites of the pair, and position of the data plate."""
    guide_sites: frozenset[str]
    """Names of all sample sites of the guide."""
    model_sites: frozenset[str]
    """Names of all sample sites of the model."""
    model_only: tuple[str, ...]
    """Latents of the model inside the data plate that the guide does not sample."""
    points: frozenset[str]
    """Latents whose posterior in the guide is a point mass (Delta)."""
    determined: tuple[str, ...]
    """Observed sites that are a deterministic function of the latents (Delta likelihood)."""
    codes: frozenset[str]
    """Latents of the guide that are discrete codes."""
    bounds: frozenset[str]
    """Latents whose prior scores a lower bound on its log density (`is_bound`), by samples of its own."""
    states: int
    """Number of joint states of the latents, of guide and model, that the loss enumerates; 1 if there are none."""
    parameters_per_row: Mapping[str, int]
    """Size of each latent's parameters in one row: D of a vector, grid positions times K (probabilities) of codes."""
    shapes: Mapping[str, SiteShape]
    """Position of the row dimension in values of each latent inside the data plate."""
    elements: int | None
    """Number of observed elements of one row; None unless every observed site is discrete."""
    nodes: tuple[frozenset[str], frozenset[str]]
    """Names of all trace nodes of the guide, and of the model."""
    rows: int | None = None
    """Number of rows, where the programs run on this number only (parameters for every row); None for any number."""
    dtype: torch.dtype | None = None
    """Type of the data where the programs run on whole numbers or booleans; None for floating-point numbers."""
    guide_only: tuple[str, ...] = ()
    """Latents of the guide that the model lacks: the pair then has no ELBO."""
    moves: bool = False
    """True if batches were found to differ in their sites."""
    unpacked: Unpacked = field(default_factory=dict)
    """Latents of the guide that are transforms of auxiliary sites (AutoGuides), by name."""

    @property
    def estimated(self) -> tuple[str, ...]:
        """Latents that the guide sets to a point where no flow determines x: the total is then a log joint density."""
        names = () if self.determined else (*self.layout.latents, *self.layout.shared)
        return tuple(name for name in names if name in self.points)

    @property
    def total(self) -> str:
        """Name of reconstruction - KL as a metric: "elbo", or "log_joint" where the guide has `estimated` points."""
        return "log_joint" if self.estimated else "elbo"

    def rows_at_once(self, most: int | None = None) -> int:
        """Return the largest batch size, at most `most`, with up to `PROBABILITIES_AT_ONCE` parameters per latent."""
        if self.rows is not None:
            return self.rows
        widest = max((self.parameters_per_row[name] for name in self.layout.latents), default=1)
        return max(1, min(most or ROWS_OF_A_BATCH, PROBABILITIES_AT_ONCE // widest))

    def few(self, x: Tensor, count: int = 2) -> Tensor:
        """Return the first rows of a batch, or all where the programs run on all only."""
        return x if self.rows is not None else x[:count]

    def knows(self, guide_trace: Trace | None, model_trace: Trace | None = None) -> bool:
        """Return whether all sites of the traces of a batch are known; a batch may lack some (ragged sequences).

        A known site that is absent from a batch counts 0 there, as one whose rows are all masked.
        """
        pairs = ((guide_trace, self.nodes[0], self.guide_sites), (model_trace, self.nodes[1], self.model_sites))
        return all(t is None or t.nodes.keys() == nodes or sites.issuperset(samples(t)) for t, nodes, sites in pairs)

    def joined(self, other: Self) -> Self:
        """Return the structure with the sites of both, which two batches of one pair have."""
        sets = ("guide_sites", "model_sites", "points", "codes", "bounds")
        both = {name: getattr(self, name) | getattr(other, name) for name in sets}
        for name in ("model_only", "determined"):
            both[name] = tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))
        return replace(
            self, **both, layout=joined(self.layout, other.layout), states=max(self.states, other.states),
            parameters_per_row={**other.parameters_per_row, **self.parameters_per_row},
            shapes={**other.shapes, **self.shapes}, elements=self.elements if self.elements == other.elements else None,
            nodes=(self.nodes[0] | other.nodes[0], self.nodes[1] | other.nodes[1]), moves=True,
        )  # fmt: skip


def read_structure(
    traces: Traces, layout: Layout, event: Shape, count: int, unpacked: Unpacked, spread: Collection[str]
) -> Structure:
    """Return the structure of a pair, read off one trace of each program on `count` rows and its layout.

    `spread` names Delta latents that are no points, as they move with auxiliary sites.
    """
    guide, model = map(samples, traces)
    latents = {name: guide[name]["fn"] for name in (*layout.latents, *layout.shared)}
    twins = {name: twin(fn) if name in layout.relaxed else fn for name, fn in latents.items()}
    hidden = {name: node for name, node in model.items() if name not in guide and not node["is_observed"]}
    summed = [(guide | model)[name]["fn"] for name in (*layout.expected, *layout.enumerated)]
    observed = [model[name] for name in layout.observed]
    return Structure(
        event=event, layout=layout, guide_sites=frozenset(guide), model_sites=frozenset(model),
        model_only=tuple(name for name, node in hidden.items() if layout.holds(node)),
        points=frozenset(name for name, fn in twins.items() if is_point(fn) and name not in spread),
        determined=tuple(name for name in layout.observed if is_point(model[name]["fn"])),
        codes=frozenset(name for name, fn in twins.items() if is_code(fn)),
        bounds=frozenset(name for name, node in model.items() if getattr(unwrapped(node["fn"]), "is_bound", False)),
        states=math.prod(int(fn.enumerate_support(expand=False).shape[0]) for fn in summed),
        parameters_per_row={name: numbers_of(twins[name]) for name in layout.latents},
        shapes={name: SiteShape.of(twins[name].shape(), twins[name], layout) for name in layout.latents},
        elements=_discrete_elements(observed, count), nodes=(frozenset(traces[0].nodes), frozenset(traces[1].nodes)),
        unpacked=unpacked,
    )  # fmt: skip


def is_code(fn: Any) -> bool:
    """Return whether a distribution is over discrete codes: categorical, one-hot, or deterministic (nearest code)."""
    return isinstance(unwrapped(fn), td.Categorical | td.OneHotCategorical | LogOneHot | Certain)


def numbers_of(fn: Any) -> int:
    """Return the size of a site's parameters in one row: D of a vector, grid positions times K of codes."""
    one = unwrapped(fn)
    wide = one.logits.shape[-1] if isinstance(one, td.Categorical) else one.states if isinstance(one, Certain) else 1
    return int(fn.event_shape.numel()) * wide


def _discrete_elements(observed: Sequence[Mapping[str, Any]], rows: int) -> int | None:
    with suppress(NotImplementedError):  # a distribution that does not say
        if all(isinstance(n["fn"], Rounded) or unwrapped(n["fn"]).support.is_discrete for n in observed):
            return sum(n["value"].numel() // rows for n in observed)
    return None


TOLERANCE = 1e-3
"""Largest difference, nats relative to 1 + size, of the two ways to score an unpacked latent."""


def read_unpacked(guide_trace: Trace, model_trace: Trace) -> dict[str, Unpacking]:
    """Return the unpacked latents of a guide, each with one auxiliary site of its own, checked by their densities."""
    guide, model = samples(guide_trace), samples(model_trace)
    auxiliary = {n: node for n, node in guide.items() if node["infer"].get("is_auxiliary") and not node["is_observed"]}
    points = [n for n, node in guide.items() if n in model and n not in auxiliary and is_point(node["fn"])]
    tried = ((n, _explained(z, auxiliary[z], guide[n], model[n]["fn"])) for n in points for z in auxiliary)
    found = {name: made for name, made in tried if made is not None}
    used = [made.auxiliary for made in found.values()]
    return {name: made for name, made in found.items() if used.count(made.auxiliary) == 1}


def _explained(name: str, source: Any, node: Any, prior: Any) -> Unpacking | None:
    """Return the unpacking of an auxiliary site `name` into a Delta site; None unless value and density agree."""
    with suppress(Exception):  # a discrete support, or a transform of another shape
        made = Unpacking(name, td.biject_to(prior.support))
        if torch.equal(made.transform(source["value"]), node["value"]):
            one = _pushed(source["fn"], made).log_prob(node["value"])
            other = source["fn"].log_prob(source["value"]) + node["fn"].log_prob(node["value"])
            if one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * (1 + other.abs())).all()):
                return made
    return None


def _pushed(fn: Any, made: Unpacking) -> Any:
    """Return the distribution of a latent from that of its auxiliary site, itself where both have the same values."""
    inner = made.transform
    while isinstance(inner, td.IndependentTransform):
        inner = inner.base_transform
    same = inner == td.identity_transform or (isinstance(inner, td.ComposeTransform) and not inner.parts)
    return fn if same else dist.TransformedDistribution(fn, [made.transform])


def unpack(guide_trace: Trace, unpacked: Unpacked) -> Trace:
    """Return a trace of a guide in which unpacked latents have the transformed distribution of their auxiliary site."""
    if not unpacked:
        return guide_trace
    trace = guide_trace.copy()
    for name, made in unpacked.items():
        if made.auxiliary in trace.nodes:
            if name in trace.nodes:
                fn = _pushed(trace.nodes[made.auxiliary]["fn"], made)
                trace.nodes[name] = {**trace.nodes[name], "fn": fn, "infer": {}}
            trace.remove_node(made.auxiliary)
    return trace


PairData = Tensor | Sequence[Any] | Mapping[str, Any]
"""Data of a pair: a tensor, or several arguments as a sequence or a mapping of tensors."""


class Argument(Record):
    """Shape of one row of an argument, its type, and its name (None for a positional one)."""

    shape: Shape
    dtype: torch.dtype
    name: str | None = None


class Arguments(Record):
    """Arguments of the programs of a pair, `model(x, y)` or `model(x=x, y=y)`, as rows of bytes.

    All are cut into the same batches: every analysis and every fit sees one tensor `(n, bytes)`, and the programs get
    their arguments back, of their own shapes and types, bit for bit.

    Example:
        >>> x, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
        >>> arguments = Arguments.of((x, y))
        >>> rows = arguments.pack((x, y))
        >>> args, _ = arguments.unpack(rows[1:])
        >>> torch.equal(args[0], x[1:]), args[1].tolist()
        (True, [1, 1])
    """

    parts: tuple[Argument, ...]

    @classmethod
    def of(cls, data: Sequence[Any] | Mapping[str, Any]) -> Self:
        """Return the arguments that a tuple, a list or a dictionary of tensors stands for."""
        return cls(tuple(Argument(tuple(t.shape[1:]), t.dtype, name) for name, t in _named(data)))

    def pack(self, data: Sequence[Any] | Mapping[str, Any]) -> Tensor:
        """Return the arguments as rows of bytes, `(n, bytes)`.

        Raises:
            DataError: number, names, types or shapes of the arguments differ, or their numbers of rows.
        """
        given = _named(data)
        found = tuple(Argument(tuple(t.shape[1:]), t.dtype, name) for name, t in given)
        refuse(found != self.parts, f"x: expected the arguments {_words(self.parts)}; got {_words(found)}.")
        refuse(len(rows := {len(t) for _, t in given}) > 1, "pair.structure.rows", rows=rows)
        return torch.cat([t.contiguous().reshape(len(t), -1).view(torch.uint8) for _, t in given], 1)

    def unpack(self, rows: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the positional and the named arguments of rows of bytes, whatever numbers these are held as."""
        pieces = rows.to(torch.uint8).split([math.prod(part.shape) * part.dtype.itemsize for part in self.parts], -1)
        pairs = zip(self.parts, pieces, strict=True)
        values = [(p.name, t.contiguous().view(p.dtype).reshape(len(rows), *p.shape)) for p, t in pairs]
        return tuple(v for name, v in values if name is None), {name: v for name, v in values if name is not None}


def is_several(data: Any) -> bool:
    """Return whether data are several arguments: a dictionary, or a tuple or list that holds a tensor or an array."""
    rows = isinstance(data, tuple | list) and any(len(getattr(part, "shape", ())) > 0 for part in data)
    return rows or isinstance(data, dict)


def _named(data: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    items: Any = data.items() if isinstance(data, Mapping) else ((None, part) for part in data)
    said = "x: expected tensors or arrays as arguments; got something else: {problem}."
    with instead((TypeError, ValueError, RuntimeError), said):
        found = [(name, torch.as_tensor(part)) for name, part in items]
    refuse(not found or any(not t.dim() for _, t in found), "pair.structure.single")
    return found


def _words(parts: Sequence[Argument]) -> str:
    words = [f"{part.name or f'argument {i}'} {list(part.shape)} {part.dtype}" for i, part in enumerate(parts, 1)]
    return ", ".join(words)
