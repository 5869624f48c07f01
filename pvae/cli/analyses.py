"""Commands that take a run apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.cli.app import (
    DATA_DIR,
    DEVICE,
    JSON,
    ROWS,
    RUN,
    RUN_DIR,
    RUNS,
    SEED,
    SPLIT,
    app,
    beside,
    emit,
    open_run,
    rows_of,
    say,
    tell,
)
from pvae.errors import DeclarationError


@app.command()
def surgery(
    run: RUN,
    split: Annotated[str, typer.Option("--split", help="train, validation, test; both: train and test.")] = "test",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws per datum.")] = 1,
    rows: ROWS = None,
    components: Annotated[
        int | None, typer.Option("--components", min=2, help="Rows behind q_agg, at random; I_q gets two bounds.")
    ] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="Also one row for each label.")] = False,
    seed: SEED = 0,
    device: DEVICE = "cpu",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Take the ELBO apart: reconstruction, mutual information, marginal KL, and what a better prior can win."""
    from pvae.analysis import surgery as take_apart
    from pvae.analysis.decompose.result import Surgery, class_table, side_by_side
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir, device)
    names = ("train", "test") if split == "both" else (split,)
    found: dict[str, Surgery] = {}
    train = None
    with ProgressBar(samples * len(names), "surgery", show=not as_json) as bar:
        for i, name in enumerate(names):
            x, labels = rows_of(opened, name, rows, seed)
            found[name] = take_apart(
                opened.pair, x, samples=samples, seed=seed, labels=labels, train=train, components=components,
                on_progress=lambda done, _, i=i: bar.update(i * samples + done, ""),  # type: ignore[misc]
            )  # fmt: skip
            train = x
    if as_json and split != "both":
        emit({"run": str(opened.path), "split": split, **found[split].to_dict()})
        return
    if as_json:
        emit({"run": str(opened.path), "splits": {name: s.to_dict() for name, s in found.items()}})
        return
    say(side_by_side(found) if split == "both" else found[split])
    for name, s in found.items() if by_class else ():
        say(class_table(s, name, opened.data.label_names) if s.classes else f"{name} has no labels")


METHODS = ("iwae", "prior", "ais", "bracket")


@app.command()
def evidence(
    run: RUN,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="iwae: importance samples of the guide; prior: of the prior; ais: annealed; bracket: annealed both "
            "ways on simulated data.",
        ),
    ] = "iwae",
    split: SPLIT = "test",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Importance samples per datum.")] = 5000,
    temperatures: Annotated[int, typer.Option("--temperatures", min=1, help="Of ais and bracket.")] = 200,
    chains: Annotated[int, typer.Option("--chains", min=1, help="Of ais and bracket, per datum.")] = 16,
    rows: ROWS = None,
    seed: SEED = 0,
    device: DEVICE = "cpu",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Bound log p(x) from below by importance samples (IWAE), or by annealing."""
    from pvae import analysis
    from pvae.util.progress import ProgressBar

    if method not in METHODS:
        raise DeclarationError(f"--method: expected one of {', '.join(METHODS)}; got {method!r}.")
    opened = open_run(run, run_dir, data_dir, device)
    x, _ = rows_of(opened, split, rows, seed)
    with ProgressBar(100, method, show=not as_json) as bar:
        common = {"seed": seed, "on_progress": bar.report}
        anneal = {"temperatures": temperatures, "chains": chains, **common}
        result: Any
        if method in ("iwae", "prior"):
            bound = analysis.evidence if method == "iwae" else analysis.prior_evidence
            result = bound(opened.pair, x, samples=samples, **common)  # type: ignore[arg-type]
        elif method == "ais":
            result = analysis.ais(opened.pair, x, **anneal)  # type: ignore[arg-type]
        else:
            result = analysis.bracket(opened.pair, x, rows=min(rows or 100, len(x)), **anneal)  # type: ignore[arg-type]
    if as_json:
        emit({"run": str(opened.path), "split": split, "method": method, **result.to_dict()})
    else:
        say(result)


@app.command()
def gap(
    run: RUN,
    split: SPLIT = "test",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the refinement of q, for every datum.")] = 300,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Use this many rows, drawn at random by the seed.")] = 200,
    seed: SEED = 0,
    device: DEVICE = "cpu",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Split log p(x) - ELBO: what a richer guide would win, and what a better encoder would."""
    from pvae.analysis import gap as split_gap
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir, device)
    x, _ = rows_of(opened, split, rows, seed)
    with ProgressBar(100, "gap", show=not as_json) as bar:
        result = split_gap(opened.pair, x, steps=steps, seed=seed, on_progress=bar.report)
    if as_json:
        emit({"run": str(opened.path), "split": split, **result.to_dict()})
    else:
        say(result)


@app.command("two-sample")
def two_sample(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    mean: Annotated[bool, typer.Option("--mean", help="Means of p(x | z), without the likelihood's noise.")] = False,
    neighbours: Annotated[int, typer.Option("-k", min=1, help="Which neighbour the balls of precision reach.")] = 5,
    seed: SEED = 0,
    device: DEVICE = "cpu",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Compare samples with data: can a classifier tell them apart, and what of the data do they reach?"""
    from pvae.analysis.samples.two_sample import STEPS, sample_quality
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir, device)
    with ProgressBar(len(STEPS), "two-sample", show=not as_json) as bar:
        found = sample_quality(opened, split, rows, seed, mean=mean, k=neighbours, on_progress=bar.report)
    if as_json:
        emit({"run": str(opened.path), **found.to_dict()})
    else:
        say(found)


@app.command()
def copying(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    mean: Annotated[bool, typer.Option("--mean", help="Means of p(x | z), without the likelihood's noise.")] = False,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Ask whether samples are copies of training rows: nearer to them than data not trained on are?"""
    from pvae.analysis import copying as look
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    with ProgressBar(100, "copying", show=not as_json) as bar:
        found = look(
            opened, split, rows, seed, mean=mean,
            on_progress=bar.report,
        )  # fmt: skip
    if as_json:
        emit({"run": str(opened.path), "split": split, **found.to_dict()})
    else:
        say(found)


@app.command()
def probe(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Read labels off the codes by simple readers, and off the data by the same."""
    from pvae.analysis import probe as read
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    with ProgressBar(100, "probe", show=not as_json) as bar:
        found = read(opened, split, rows, seed, on_progress=bar.report)
    if as_json:
        emit({"run": str(opened.path), **found.to_dict()})
    else:
        say(found)


@app.command()
def critic(
    run: RUN,
    split: SPLIT = "train",
    rows: ROWS = None,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Estimate KL(q_agg || p) from draws alone: also where the code is a point, and no density is known."""
    from pvae.analysis import critic as estimate
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    x, _ = rows_of(opened, split, rows, seed)
    with ProgressBar(100, "critic", show=not as_json) as bar:
        found = estimate(opened, x, seed, on_progress=bar.report)
    if as_json:
        emit({"run": str(opened.path), "split": split, **found.to_dict()})
    else:
        say(found)


@app.command()
def counterexamples(
    data: Annotated[str, typer.Option("--data", help="digits, fashion_mnist, mnist.")] = "digits",
    out: Annotated[Path | None, typer.Option("--out", help="Also write a CSV: its path without suffix.")] = None,
    seed: SEED = 0,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Show that samples and likelihood say little of each other: two textbook models on real data."""
    from pvae.analysis import counterexamples as study
    from pvae.data import load
    from pvae.data.sources.base import Data
    from pvae.util.files import write_atomic
    from pvae.util.progress import ProgressBar

    known = [name for name in ("digits", "fashion_mnist", "mnist") if name in Data.members]
    if data not in known:
        raise DeclarationError(f"--data: expected one of {', '.join(known)}; got {data!r}.")
    with ProgressBar(100, "counterexamples", show=not as_json) as bar:
        found = study(
            load(Data.parse(data), data_dir=data_dir), seed,
            on_progress=bar.report,
        )  # fmt: skip
    if out is not None:
        write_atomic(beside(out, ".csv"), found.models().round(4).to_csv())
    if as_json:
        emit(found.to_dict())
    else:
        say(found)


@app.command()
def selfcheck(device: DEVICE = "auto", seed: SEED = 0, as_json: JSON = False) -> None:
    """Measure models whose every figure is known exactly: are surgery, evidence and gaps right on this machine?"""
    from pvae.analysis.truths.selfcheck import selfcheck as measure
    from pvae.training.fit import pick_device
    from pvae.util.progress import ProgressBar

    with ProgressBar(100, "selfcheck", show=not as_json) as bar:
        found = measure(
            str(pick_device(device)),
            seed,
            on_progress=bar.report,
        )
    if as_json:
        emit(found.to_dict())
    else:
        say(found)
    if not found.ok:
        typer.echo(found.summary(), err=True)
        raise typer.Exit(1)


@app.command()
def posterior(
    run: RUN,
    split: SPLIT = "test",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws per datum.")] = 100,
    rows: ROWS = None,
    seed: SEED = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; analysis/posterior-SPLIT.nc unless said.")
    ] = None,
    device: DEVICE = "cpu",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Export draws of the guide, with densities and diagnostics, as NetCDF for ArviZ."""
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir, device)
    with ProgressBar(draws, "posterior", show=not as_json) as bar:
        found = opened.posterior(split, draws, rows, seed, on_progress=bar.report)
    path = found.save(out or opened.files.analysis / f"posterior-{split}.nc")
    summary = found.summary()
    if as_json:
        emit({"run": str(opened.path), "split": split, "file": str(path), "summary": summary.to_dict("index")})
        return
    tell(summary.to_string(float_format="{:.3f}".format, max_rows=40))
    tell(f"posterior: {path}")
