"""Common parts of sampling, encoding and decoding: results that can be saved, runs over rows in chunks and blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, dataclass_transform

import pandas
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor, distributions

from pvae.analysis.aggregate.entry import accept, quiet, same_globals
from pvae.analysis.export.rows import Origin, Part, write
from pvae.analysis.export.sites import numpy_of, rows_of, safe_names
from pvae.analysis.figures.estimate import misdeclared, refuse, text
from pvae.data.split import Split
from pvae.distributions.relaxed import twin
from pvae.errors import DeclarationError, near
from pvae.graph.site import OBSERVED
from pvae.pair import Layout, Pair, unwrapped
from pvae.runs.run import Run
from pvae.util import Progress, Record, group, seeds, silent

T = TypeVar("T")

CHUNK_ROWS = 250
"""Largest number of rows that are sampled, encoded or decoded at a time."""
CHUNK_NUMBERS = 2**20
"""Largest number of data elements in a chunk: its rows times the elements of a row."""


# ---------------------------------------------------------------------- results


def known_name(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> str:
    """Return `name` if it is one of `names`; else raise a DeclarationError that suggests the most similar one."""
    misdeclared(name not in names, f"{what}: expected one of {', '.join(names)}; got {name!r}{near(name, names)}.")
    return name


@dataclass_transform(frozen_default=True, eq_default=False)
class Generated(Record, eq=False, repr=False):
    """Base class of results that consist of named tensors on the CPU and can be saved.

    Every subclass is a frozen dataclass.
    """

    origin: Origin = field(default=Origin(), kw_only=True)  # noqa: RUF009
    """Number, id, split and label of every row, where the result is one of rows of data."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, eq=False, repr=False)(cls)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the result under the keys that `save` writes: `<field>`, in a dict `<field>/<name>`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = [named(key, v) if isinstance(v, dict) else {key: v} for key, v in values.items()]
        return {key: t for part in parts for key, t in part.items() if isinstance(t, Tensor)}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the result as NumPy arrays, under the same keys."""
        return {key: numpy_of(t) for key, t in self.tensors().items()}

    def to_frame(self) -> pandas.DataFrame:
        """Return a result that has one entry a row as a data frame, indexed by the ids of the rows, else their numbers.

        A latent `z` has columns `z0`, `z1`, ...; rows of a table have its columns, in its units and words.
        """
        (found,) = self.origin.frames([self.tensors()])
        return found.set_index(found.columns[0]) if self.origin.columns else found.rename_axis("row")

    def save(self, path: str | Path) -> Path:
        """Write the result to a file atomically, and return its path.

        An `.npz`, for `numpy.load(path, allow_pickle=False)`, has the keys of `arrays`, and `row`, `id`, `split` and
        `label` where they are known. A result that has one entry a row is also written as `.csv`, `.parquet` or
        `.h5ad`, see `pvae.analysis.export.rows.write`.
        """
        write(Path(path), [self.tensors()], self.origin)
        return Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key} {list(t.shape)}' for key, t in self.tensors().items())})"


def named(what: str, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors that are not None under keys `<what>/<name>`, with names of ASCII letters, digits and `_`."""
    names = safe_names({name: () for name in values})
    return {f"{what}/{names[name]}": t for name, t in values.items() if t is not None}


# ---------------------------------------------------------------------- runs of model and guide


def distribution_mean(fn: Any) -> Tensor:
    """Return the mean of a distribution, `(batch, *event)`; of a categorical one, the expected index.

    Raises:
        NotImplementedError: the distribution has no mean.
    """
    base = unwrapped(fn)
    if isinstance(base, distributions.Categorical):
        return base.probs @ torch.arange(base.probs.shape[-1], dtype=base.probs.dtype, device=base.probs.device)
    mean = fn.mean
    if not isinstance(mean, Tensor) or (not torch.compiler.is_exporting() and bool(mean.isnan().any())):
        raise NotImplementedError(f"{type(base).__name__} has no mean")
    return mean


def is_discrete(fn: distributions.Distribution) -> bool:
    """Return True if the values of a distribution are discrete."""
    with suppress(NotImplementedError):
        return bool(getattr(fn.support, "is_discrete", False))
    return False


def centre(fn: Any) -> Tensor | None:
    """Return the mean of a distribution, or the mode of a discrete one, `(batch, *event)`; None if unknown."""
    with suppress(NotImplementedError, AttributeError):
        return fn.mode.nan_to_num(0.0) if is_discrete(fn) else distribution_mean(fn)  # of an even Bernoulli it is NaN
    return None


class Centred(poutine.messenger.Messenger):
    """Pyro handler that sets latent sites to the mean of their distribution, or to the mode of a discrete one.

    Arguments:
        loose: values by name for latent sites whose mean or mode is unknown; without a value they are sampled.
    """

    def __init__(self, loose: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.loose = loose or {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or poutine.util.site_is_subsample(msg):
            return
        found = centre(twin(msg["fn"]))
        msg["value"] = self.loose.get(msg["name"]) if found is None else found


def opened(source: Any) -> Pair:
    """Return the model-guide pair of a run, or the given pair; raise if it is no pair, or has not yet seen data."""
    pair = source.pair if isinstance(source, Run) else source
    misdeclared(not isinstance(pair, Pair), f"Expected a pvae.Run or a pvae.Pair; got {type(pair).__name__}.")
    _ = pair.layout  # raises if it has seen no data
    return pair


def one_row(pair: Pair, x: Any, what: str = "traverse", todo: str = "Pass x[:1], or rows=x for the order.") -> Tensor:
    """Return one row of data as a batch `(1, *row)` that the pair accepts; raise DataError if x has several rows."""
    try:
        row = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        return accept(pair, x)  # raises with what is wrong
    found = accept(pair, row[None] if tuple(row.shape) == pair.frame.row else row)
    refuse(len(found) != 1, f"{what}: expected one row of data; got {len(found)}. {todo}")
    return found


@contextmanager
def analysed(pair: Pair, x: Tensor, seed: int, mean: bool = False) -> Iterator[None]:
    """Context for analyses: evaluation mode, no gradients, a noise seed, and one sample of the global latents.

    With `mean`, latents are set to the mean or mode of their distribution instead of being sampled, see `Centred`.
    """
    with quiet(pair, x, seed), Centred() if mean else nullcontext(), same_globals(pair, x):
        yield


def datum(layout: Layout, nodes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the site of x: that of this name, or the first observed one in the data plate, other than a factor."""
    inside = [nodes[name] for name in layout.observed if name in nodes and layout.holds(nodes[name])]
    return min(inside, key=lambda node: (isinstance(unwrapped(node["fn"]), Unit), node["name"] != OBSERVED))


def row_values(t: Any, node: Mapping[str, Any], layout: Layout, count: int) -> Tensor:
    """Return a site's value, or a parameter of the same shape, on the CPU with the rows first, `(count, ...)`."""
    return rows_of(torch.as_tensor(t), node, layout, count).cpu()


def decoded_mean(nodes: Mapping[str, Any], layout: Layout, count: int) -> Tensor:
    """Return E[x | z], `(count, *shape)`, from the sites of the model; raise DeclarationError if there is no mean."""
    node = datum(layout, nodes)
    with suppress(NotImplementedError):
        return row_values(distribution_mean(node["fn"]), node, layout, count)
    raise DeclarationError(text("refused.no_mean", fn=unwrapped(node["fn"])))


def by_chunks(make: Callable[[int, int], T], n: int, numbers: int, on_progress: Progress = silent) -> T:
    """Return `make(start, stop)` of consecutive chunks of n rows of `numbers` elements each, joined to one result."""
    parts, size = [], min(CHUNK_ROWS, max(1, CHUNK_NUMBERS // numbers))
    for start in range(0, n, size):
        stop = min(start + size, n)
        parts.append(make(start, stop))
        on_progress(stop, n)
    return cast(T, joined(parts))


def joined(parts: Sequence[Any]) -> Any:
    """Return results of successive chunks as one: tensors concatenated along the rows, in dicts and dataclasses too."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([*parts])
    if isinstance(first, dict):
        return {name: joined([part[name] for part in parts]) for name in first}
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: joined([getattr(part, f.name) for part in parts]) for f in fields(first)})
    return first


def observed_rows(split: Split, index: Tensor) -> Tensor:
    """Return the data x of the rows `index` of a split, without covariates, on the CPU, `(m, *shape)`."""
    return split.observed(split.rows[index.to(split.rows.device)]).cpu()


# ---------------------------------------------------------------------- rows in blocks


G = TypeVar("G", bound=Generated)

BLOCK_ROWS = 4096
"""Largest number of rows in a block."""
BLOCK_NUMBERS = 2**22
"""Largest number of data elements in a block."""


class RowBlocks(Generic[G]):
    """The results of an analysis for rows of a split, block by block, computed when they are asked for.

    Each block has noise of its own, so that the result of a row depends neither on the process that computes it nor on
    the blocks that are computed beside it. With global latents there is one block, of one sample of them.

    Arguments:
        make: analysis, a function of a run, rows `(m, *row)` and `seed`, whose result has one entry a row.
        run: the run.
        split: split that the rows are of.
        chosen: positions of the rows in the split, `(n,)`; None for all.
        seed: seed of the noise; the first block has that of `make` itself.
        on_progress: called with (rows done, n) after each block.
        mask: argument of `make` with one entry for each row of the split, of which a block gets its own; or None.
        options: further arguments of `make`.
    """

    def __init__(
        self, make: Callable[..., G], run: Run, split: Split, chosen: Tensor | None = None, *,
        seed: int = 0, on_progress: Progress = silent, mask: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        self.make, self.run, self.split = make, run, split
        self.seed, self.on_progress, self.options = seed, on_progress, options
        self.mask, self.absent = mask, dict[str, str]()
        self.chosen = torch.arange(len(split)) if chosen is None else chosen
        fewer = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // max(1, prod(split.rows.shape[1:]))))
        self.size = len(self.chosen) if run.pair.layout.shared else fewer
        self.origin = Origin.of(split, self.chosen, run.transforms)

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.size)

    def __getitem__(self, number: int) -> G:
        """Return the result of a block."""
        at = self.chosen[number * self.size : (number + 1) * self.size]
        seed = seeds.mix(self.seed, seeds.ANALYSIS, number) if number else self.seed
        masked = {} if self.mask is None else {"mask": torch.as_tensor(self.mask)[at]}
        found = self.make(self.run, self.split.rows[at], seed=seed, **masked, **self.options)
        self.absent |= getattr(found, "absent", {})
        self.on_progress(number * self.size + len(at), len(self.chosen))
        return found

    def whole(self) -> G:
        """Return the result of all rows."""
        result: G = replace(joined([self[number] for number in range(len(self))]), origin=self.origin)
        return result

    def parts(self) -> Iterator[Part]:
        """Yield the tensors of the blocks in order; every process gets all, and computes its share of them."""
        for start in range(0, len(self), group.size()):

            def own(i: int, start: int = start) -> dict[str, Tensor]:
                tensors = enumerate(self[start + i].tensors().items())  # of which processes exchange copies, unordered
                return {f"{place:04} {key}": t.clone() for place, (key, t) in tensors}

            for part in group.dealt(min(group.size(), len(self) - start), own):
                yield {key[5:]: part[key] for key in sorted(part)}
