"""Commands that analyse runs, and those that write HTML pages on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

import pvae
from pvae.cli.app import Shared, command, rows_of
from pvae.errors import misdeclared
from pvae.util import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.pair.pair import Pair
    from pvae.runs.run import Run


def on_rows(analyse: Callable[..., Any], shared: Shared, rows: int | None, **asked: Any) -> Callable[..., Any]:
    """Return a function of a run that applies an analysis of a pair to `rows` rows of the split, or all."""

    def measured(opened: Run, **bar: Any) -> Any:
        x = rows_of(opened, shared.split, rows, shared.seed)[1]
        return analyse(opened.pair, x, seed=shared.seed, **asked, **bar)

    return measured


@command("rows", "on_run_and_device", "for_papers")
def surgery(
    shared: Shared, run: str, split: str = "test", samples: int = 1, components: int | None = None,
    by_class: bool = False, population: bool = False, labelled: bool = False,
) -> None:  # fmt: skip
    """Decompose the ELBO: reconstruction, mutual information, marginal KL; what a better prior wins on new data."""
    from pvae.analysis.decompose.result import Surgery, class_table, side_by_side

    opened, names = shared.open(run, shared.device), ("train", "test") if split == "both" else (split,)
    found: dict[str, Surgery] = {}
    given: dict[str, Any] = {"components": components, "population": "full" if population else "rows"}
    rows, seed = shared.rows, shared.seed
    train = rows_of(opened, "train", rows, seed)[1] if population and split not in ("train", "both") else None
    with shared.bar("surgery", samples * len(names)) as bar:
        for i, name in enumerate(names):
            chosen, x, labels = rows_of(opened, name, rows, seed)
            x = opened.labelled(opened.data.split(name), others=True)[chosen] if labelled else x
            watch = partial(lambda i, done, _: bar.update(i * samples + done, ""), i)
            asked = {"labels": labels, "train": train, "seen": name == "train", "on_progress": watch, **given}
            found[name] = pvae.analysis.surgery(opened.pair, x, samples=samples, seed=seed, **asked)
            train = x
    figures = {name: s.to_dict() for name, s in found.items()}
    more = {"splits": figures} if split == "both" else {"split": split, **figures[split]}
    tables: list[Any] = []
    for name, s in found.items() if by_class else ():
        tables.append(class_table(s, name, opened.data.label_names) if s.classes else f"{name} has no labels")
    shown = side_by_side(found) if split == "both" else found[split]
    shared.answer({"run": str(opened.path), **more}, shown, *tables, columns={k: s.figures() for k, s in found.items()})


METHODS = {"iwae": "evidence", "prior": "prior_evidence", "ais": "ais", "bracket": "bracket"}
"""Function of `pvae.analysis` for each method of `pvae evidence`."""


@command("split", "rows", "on_run_and_device")
def evidence(
    shared: Shared, run: str, method: str = "iwae", samples: int = 5000, temperatures: int = 200, chains: int = 16
) -> None:
    """Bound log p(x) from below by importance samples (IWAE), or by annealing."""
    misdeclared(method not in METHODS, f"--method: expected one of {', '.join(METHODS)}; got {method!r}.")

    def bound(pair: Pair, x: Tensor, **asked: Any) -> Any:
        more = {"samples": samples} if method in ("iwae", "prior") else {"temperatures": temperatures, "chains": chains}
        more |= {"rows": min(shared.rows or 100, len(x))} if method == "bracket" else {}
        return getattr(pvae.analysis, METHODS[method])(pair, x, **more, **asked)

    shared.measure(run, method, on_rows(bound, shared, shared.rows), split=shared.split, method=method)


@command("split", "on_run_and_device")
def gap(shared: Shared, run: str, steps: int = 300, rows: int = 200) -> None:
    """Split log p(x) - ELBO into the gap of the variational family and the gap of the encoder."""
    shared.measure(run, "gap", on_rows(pvae.analysis.gap, shared, rows, steps=steps), split=shared.split)


@command("split", "on_run_and_device")
def gradients(shared: Shared, run: str, rows: int = 100, draws: int = 100) -> None:
    """Compare estimators of the gradient: bias, variance, signal-to-noise ratio, seconds, for each group of weights."""
    compared = partial(pvae.analysis.gradients, split=shared.split, rows=rows, draws=draws, seed=shared.seed)
    shared.measure(run, "gradients", compared, split=shared.split)


@command("on_run_and_device")
def calibration(
    shared: Shared, run: str, rows: int = 1000, draws: int = 19, importance: int = 0, split: str = "train"
) -> None:
    """Test on data that the model makes whether q(z | x) is its posterior, or too narrow, too wide, shifted."""

    def calibrated(opened: Run, **bar: Any) -> Any:
        x = None if split == "none" else rows_of(opened, split, rows, shared.seed)[1]
        return pvae.analysis.calibration(opened.pair, rows, draws, importance=importance, x=x, seed=shared.seed, **bar)

    shared.measure(run, "calibration", calibrated, split=split)


@command("split", "rows", "on_run_and_device", name="two-sample")
def two_sample(shared: Shared, run: str, mean: bool = False, neighbours: int = 5) -> None:
    """Compare samples with data: classifier two-sample test accuracy, precision and coverage."""
    from pvae.analysis.samples.quality import QUALITY_STAGES, sample_quality

    quality = partial(sample_quality, split=shared.split, rows=shared.rows, seed=shared.seed, mean=mean, k=neighbours)
    shared.measure(run, "two-sample", quality, len(QUALITY_STAGES))


@command("split", "rows", "on_fitted")
def copying(shared: Shared, run: str, mean: bool = False) -> None:
    """Test whether samples copy training rows: are they nearer to them than held-out data are?"""
    copied = partial(pvae.analysis.copying, split=shared.split, rows=shared.rows, seed=shared.seed, mean=mean)
    shared.measure(run, "copying", copied, split=shared.split)


@command("split", "rows", "on_fitted")
def probe(shared: Shared, run: str) -> None:
    """Predict the labels from the latents, and from the data, with the same simple classifiers."""
    shared.measure(run, "probe", partial(pvae.analysis.probe, split=shared.split, rows=shared.rows, seed=shared.seed))


@command("rows", "on_fitted")
def critic(shared: Shared, run: str, split: str = "train") -> None:
    """Estimate KL(q_agg || p) from samples alone, also for an autoencoder, whose posterior has no density."""
    shared.measure(run, "critic", on_rows(pvae.analysis.critic, replace(shared, split=split), shared.rows), split=split)


@command("rows", "seed", "out", "data", "as_json")
def audit(
    shared: Shared, functions: str, noise: float | None = None,
    likelihood: Literal["normal", "bernoulli", "discretized_logistic"] = "normal", scale: float | None = None,
    levels: int = 256, codes: int | None = None,
) -> None:  # fmt: skip
    """Examine an autoencoder that pvae did not fit: scale, use and information of its latents, reconstruction.

    --out also writes a page, one HTML file.
    """
    from pvae.analysis.pages.audit import page_of
    from pvae.cli.handwritten import load_arguments, load_names

    encode, decode, *_ = (*load_names(functions), None)
    asked: dict[str, Any] = {"likelihood": likelihood, "scale": scale, "levels": levels, "codes": codes, "noise": noise}
    asked |= {"rows": shared.rows, "seed": shared.seed}
    found = pvae.analysis.audit(encode, decode, load_arguments(shared.data, None), **asked)
    if shared.out is not None:
        write_atomic(shared.out, page_of(found, functions).to_html())
    shared.answer(found.to_dict(), found)


@command("as_json")
def selfcheck(shared: Shared, device: str = "auto", seed: int = 0) -> None:
    """Check surgery, evidence and gaps on this machine, on models whose exact values are known."""
    from pvae.training.launch import pick_device

    found = shared.watched("selfcheck", pvae.analysis.selfcheck, str(pick_device(device)), seed)
    shared.answer(found.to_dict(), found)
    if not found.ok:
        typer.echo(found.summary(), err=True)
        raise typer.Exit(1)


@command("split", "rows", "on_run_and_device")
def posterior(shared: Shared, run: str, draws: int = 100, out: Path | None = None) -> None:
    """Export samples of the guide, with densities and diagnostics, as NetCDF for ArviZ."""
    opened = shared.open(run, shared.device)
    found = shared.watched("posterior", opened.posterior, shared.split, draws, shared.rows, shared.seed, total=draws)
    path = found.save(out or opened.files.analysis / f"posterior-{shared.split}.nc")
    summary = found.summary()
    data = {"run": str(opened.path), "split": shared.split, "file": str(path), "summary": summary.to_dict("index")}
    shared.answer(data, summary.to_string(float_format="{:.3f}".format, max_rows=40), f"posterior: {path}")


# ---------------------------------------------------------------------- HTML pages


@command("split", "on_fitted")
def report(
    shared: Shared, run: str, evidence_samples: int = 500, gap_steps: int = 200, figures: bool = False,
    population: bool = False,
) -> None:  # fmt: skip
    """Write the report of a run: one HTML file, its numbers as JSON and CSV."""
    from pvae.analysis.pages.document.document import claimed
    from pvae.analysis.pages.report import examine
    from pvae.analysis.pages.sections.examination import Examination
    from pvae.cli.handwritten import is_pair_file

    opened = shared.open_as_it_is(run) if is_pair_file(run) else shared.open(run)
    asked: dict[str, Any] = {"evidence_samples": evidence_samples, "gap_steps": gap_steps, "seed": shared.seed}
    exam = Examination(opened, shared.split, population="full" if population else "rows", **asked)
    with claimed(opened.files.report):
        found = shared.watched("report", examine, exam)
        path = found.write(opened.files.report, figures=figures)
    shared.answer({"file": str(path), **found.to_dict(), "run": str(opened.path)}, found, f"report: {path}")


@command("split", "out", "on_fitted")
def explore(shared: Shared, run: str, latent: str | None = None, rows: int = 20_000, samples: int = 10) -> None:
    """Write one HTML file to look around in: a map of a latent, the data behind its points, what sliders decode."""
    opened, part = shared.open_rows(run)
    asked: dict[str, Any] = {"latent": latent, "rows": rows, "samples": samples, "out": shared.out, "seed": shared.seed}
    path = shared.watched("explore", pvae.analysis.explore, opened, split=part, **asked)
    shared.answer({"run": str(opened.path), "file": str(path)}, f"explorer: {path}")


@command("split", "on_fitted", "for_papers")
def compare(
    shared: Shared, runs: list[str], evidence_samples: int = 500, out: Path = Path("comparison"), figures: bool = False
) -> None:
    """Compare runs on the same data: one HTML file with a column for each, paired differences, rate and distortion."""
    from pvae.analysis.pages.comparison.comparison import Comparison
    from pvae.analysis.pages.document.document import claimed
    from pvae.analysis.pages.report import examine_runs

    opened = [shared.open(run) for run in runs]
    comparison = Comparison(opened, split=shared.split, evidence_samples=evidence_samples, seed=shared.seed)
    with claimed(out):
        found = shared.watched("compare", examine_runs, comparison, " and ".join(comparison.exams), "")
        path = found.write(out, figures=figures)
    numbers = found.to_dict()
    shared.answer({"file": str(path), **numbers}, found, f"comparison: {path}", columns=numbers["figures"])
