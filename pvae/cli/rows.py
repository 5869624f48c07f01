"""Commands that apply a run to rows of data: codes, scores, reconstructions, imputations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pvae
from pvae.cli.app import Shared, command, tell
from pvae.cli.making import background, given_of, keep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.analysis.samples.running import RowBlocks


@command("on_rows")
def encode(shared: Shared, run: str, mean: bool = False) -> None:
    """Encode rows: write their latents, and plot each latent beside samples from its prior."""
    _apply(shared, pvae.analysis.encode, run, _planes, mean=mean)


def _planes(blocks: RowBlocks[Any], found: Any) -> Mapping[str, Figure]:
    prior, part = pvae.analysis.sample(blocks.run, 1000, seed=blocks.seed), blocks.split
    labels = None if (y := part.labels) is None else y[blocks.chosen].cpu().numpy()
    return pvae.analysis.pages.plots.pictures.encoded(found, prior, labels, part.label_names)


@command("on_rows")
def reconstruct(shared: Shared, run: str, draw: bool = False, given: list[str] | None = None) -> None:
    """Encode rows and decode them again, with log p(x | z) of each; with --given, under other covariates."""
    _apply(shared, pvae.analysis.reconstruct, run, _rebuilt, mean=not draw, given=given_of(given))


def _rebuilt(blocks: RowBlocks[Any], found: Any) -> Figure | None:
    split = blocks.split
    seen = split.observed(split.rows[blocks.chosen]).double().cpu().numpy()
    behind = seen if split.name == "new" else background(blocks.run)
    return pvae.analysis.pages.plots.pictures.reconstructed(found, seen, behind)


@command("on_rows")
def score(shared: Shared, run: str, samples: int = 100) -> None:
    """Score rows: log p(x) with its error, each column or pixel, a p-value beside validation rows."""
    _apply(shared, pvae.analysis.score, run, samples=samples)


@command("on_rows")
def impute(shared: Shared, run: str, samples: int = 200, draws: int = 10, sweeps: int = 0) -> None:
    """Fill in the missing cells of rows of a table: estimates, intervals and draws; observed cells are untouched."""
    _apply(shared, pvae.analysis.impute, run, samples=samples, draws=draws, sweeps=sweeps)


def _apply(
    shared: Shared, make: Callable[..., Any], run: str, picture: Callable[..., Any] | None = None, **options: Any
) -> None:
    """Apply an analysis to rows of a file, or of a split of the run's data, and write what it makes of each.

    The file has the format of its ending; without one, it is an .npz beside a picture, or a CSV if there is none.
    """
    from pvae.analysis.export.rows import write
    from pvae.analysis.samples.running import RowBlocks
    from pvae.util import seeds

    (opened, split), name = shared.open_rows(run), make.__name__
    stem, chosen = f"{name}-{split.name}", seeds.subset(len(split), shared.rows, shared.seed)
    path = shared.out or opened.files.analysis / (stem if picture else f"{stem}.csv")
    with shared.bar(name) as bar:
        blocks = RowBlocks(make, opened, split, chosen, seed=shared.seed, on_progress=bar.report, **options)
        if picture and path.suffix in ("", ".png"):
            keep(shared, opened, stem, blocks.whole(), lambda found: picture(blocks, found))
            return
        like = shared.data if shared.data and {shared.data.suffix, path.suffix} == {".h5ad"} else None
        write(path, blocks.parts(), blocks.origin, like)
    for key, why in blocks.absent.items():
        tell(f"note: no {key}: {why}", err=True)
    kind = path.suffix[1:]
    shared.answer({"run": str(opened.path), "rows": len(chosen), kind: str(path)}, f"{kind}: {path}")
