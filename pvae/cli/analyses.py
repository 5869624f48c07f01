"""Commands that analyse a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.cli.app import (
    ON_RUN,
    ON_RUN_AND_DEVICE,
    Device,
    Mean,
    RowCount,
    RunName,
    SampleCount,
    SeedOption,
    Shared,
    SplitName,
    beside,
    command,
    emit,
    rows_of,
    say,
)
from pvae.errors import DeclarationError


@command(ON_RUN_AND_DEVICE)
def surgery(
    shared: Shared,
    run: RunName,
    split: Annotated[str, typer.Option("--split", help="train, validation, test; both: train and test.")] = "test",
    samples: SampleCount = 1,
    rows: RowCount = None,
    components: Annotated[
        int | None, typer.Option("--components", min=2, help="Rows behind q_agg, at random; I_q gets two bounds.")
    ] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="Also one row for each label.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Decompose the ELBO: reconstruction, mutual information, marginal KL, and what a better prior can gain."""
    from pvae.analysis import surgery as decompose
    from pvae.analysis.decompose.result import Surgery, class_table, side_by_side

    opened = shared.open_on_device(run)
    names = ("train", "test") if split == "both" else (split,)
    found: dict[str, Surgery] = {}
    train = None
    with shared.bar("surgery", samples * len(names)) as bar:
        for i, name in enumerate(names):
            x, labels = rows_of(opened, name, rows, seed)
            found[name] = decompose(
                opened.pair, x, samples=samples, seed=seed, labels=labels, train=train, components=components,
                on_progress=lambda done, _, i=i: bar.update(i * samples + done, ""),  # type: ignore[misc]
            )  # fmt: skip
            train = x
    if shared.as_json:
        figures = {name: s.to_dict() for name, s in found.items()}
        more = {"splits": figures} if split == "both" else {"split": split, **figures[split]}
        emit({"run": str(opened.path), **more})
        return
    say(side_by_side(found) if split == "both" else found[split])
    for name, s in found.items() if by_class else ():
        say(class_table(s, name, opened.data.label_names) if s.classes else f"{name} has no labels")


METHODS = ("iwae", "prior", "ais", "bracket")


@command(ON_RUN_AND_DEVICE)
def evidence(
    shared: Shared,
    run: RunName,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="iwae: importance samples of the guide; prior: of the prior; ais: annealed; bracket: annealed both "
            "ways on simulated data.",
        ),
    ] = "iwae",
    split: SplitName = "test",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Importance samples per datum.")] = 5000,
    temperatures: Annotated[int, typer.Option("--temperatures", min=1, help="Temperatures of ais and bracket.")] = 200,
    chains: Annotated[int, typer.Option("--chains", min=1, help="Chains per datum of ais and bracket.")] = 16,
    rows: RowCount = None,
    seed: SeedOption = 0,
) -> None:
    """Bound log p(x) from below by importance samples (IWAE), or by annealing."""
    from pvae import analysis

    if method not in METHODS:
        raise DeclarationError(f"--method: expected one of {', '.join(METHODS)}; got {method!r}.")
    opened = shared.open_on_device(run)
    x, _ = rows_of(opened, split, rows, seed)
    with shared.bar(method) as bar:
        common: dict[str, Any] = {"seed": seed, "on_progress": bar.report}
        anneal = {"temperatures": temperatures, "chains": chains, **common}
        result: Any
        if method in ("iwae", "prior"):
            bound = analysis.evidence if method == "iwae" else analysis.prior_evidence
            result = bound(opened.pair, x, samples=samples, **common)
        elif method == "ais":
            result = analysis.ais(opened.pair, x, **anneal)
        else:
            result = analysis.bracket(opened.pair, x, rows=min(rows or 100, len(x)), **anneal)
    shared.answer({"run": str(opened.path), "split": split, "method": method, **result.to_dict()}, result)


@command(ON_RUN_AND_DEVICE)
def gap(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Refinement steps of q for every datum.")] = 300,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to use, chosen at random by the seed.")] = 200,
    seed: SeedOption = 0,
) -> None:
    """Split log p(x) - ELBO into the gap of the variational family and the gap of the encoder."""
    from pvae.analysis import gap as split_gap

    opened = shared.open_on_device(run)
    x, _ = rows_of(opened, split, rows, seed)
    with shared.bar("gap") as bar:
        result = split_gap(opened.pair, x, steps=steps, seed=seed, on_progress=bar.report)
    shared.answer({"run": str(opened.path), "split": split, **result.to_dict()}, result)


@command(ON_RUN_AND_DEVICE, name="two-sample")
def two_sample(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    rows: RowCount = None,
    mean: Mean = False,
    neighbours: Annotated[
        int, typer.Option("-k", min=1, help="Neighbour whose distance is the radius of the balls of precision.")
    ] = 5,
    seed: SeedOption = 0,
) -> None:
    """Compare samples with data: classifier two-sample test accuracy, precision and coverage."""
    from pvae.analysis.samples.quality import QUALITY_STAGES, sample_quality

    opened = shared.open_on_device(run)
    with shared.bar("two-sample", len(QUALITY_STAGES)) as bar:
        found = sample_quality(opened, split, rows, seed, mean=mean, k=neighbours, on_progress=bar.report)
    shared.answer({"run": str(opened.path), **found.to_dict()}, found)


@command(ON_RUN)
def copying(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    rows: RowCount = None,
    mean: Mean = False,
    seed: SeedOption = 0,
) -> None:
    """Test whether samples copy training rows: are they nearer to them than held-out data are?"""
    from pvae.analysis import copying as measure

    opened = shared.open(run)
    with shared.bar("copying") as bar:
        found = measure(opened, split, rows, seed, mean=mean, on_progress=bar.report)
    shared.answer({"run": str(opened.path), "split": split, **found.to_dict()}, found)


@command(ON_RUN)
def probe(shared: Shared, run: RunName, split: SplitName = "test", rows: RowCount = None, seed: SeedOption = 0) -> None:
    """Predict the labels from the latents, and from the data, with the same simple classifiers."""
    from pvae.analysis import probe as predict

    opened = shared.open(run)
    with shared.bar("probe") as bar:
        found = predict(opened, split, rows, seed, on_progress=bar.report)
    shared.answer({"run": str(opened.path), **found.to_dict()}, found)


@command(ON_RUN)
def critic(
    shared: Shared, run: RunName, split: SplitName = "train", rows: RowCount = None, seed: SeedOption = 0
) -> None:
    """Estimate KL(q_agg || p) from samples alone, also for an autoencoder, whose posterior has no density."""
    from pvae.analysis import critic as estimate

    opened = shared.open(run)
    x, _ = rows_of(opened, split, rows, seed)
    with shared.bar("critic") as bar:
        found = estimate(opened, x, seed, on_progress=bar.report)
    shared.answer({"run": str(opened.path), "split": split, **found.to_dict()}, found)


@command(["data_dir", "as_json"])
def counterexamples(
    shared: Shared,
    data: Annotated[str, typer.Option("--data", help="digits, fashion_mnist, mnist.")] = "digits",
    out: Annotated[Path | None, typer.Option("--out", help="Also write a CSV: its path without suffix.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Show with two textbook models on real data that good samples do not imply a high likelihood, nor the reverse."""
    from pvae.analysis import counterexamples as study
    from pvae.data import load
    from pvae.data.sources.base import Data
    from pvae.util.files import write_atomic

    known = [name for name in ("digits", "fashion_mnist", "mnist") if name in Data.members]
    if data not in known:
        raise DeclarationError(f"--data: expected one of {', '.join(known)}; got {data!r}.")
    with shared.bar("counterexamples") as bar:
        found = study(load(Data.parse(data), data_dir=shared.data_dir), seed, on_progress=bar.report)
    if out is not None:
        write_atomic(beside(out, ".csv"), found.models().round(4).to_csv())
    shared.answer(found.to_dict(), found)


@command(["as_json"])
def selfcheck(shared: Shared, device: Device = "auto", seed: SeedOption = 0) -> None:
    """Check surgery, evidence and gaps on this machine, on models whose exact values are known."""
    from pvae.analysis.truths.selfcheck import selfcheck as measure
    from pvae.training.launch import pick_device

    with shared.bar("selfcheck") as bar:
        found = measure(str(pick_device(device)), seed, on_progress=bar.report)
    shared.answer(found.to_dict(), found)
    if not found.ok:
        typer.echo(found.summary(), err=True)
        raise typer.Exit(1)


@command(ON_RUN_AND_DEVICE)
def posterior(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Samples of the guide per datum.")] = 100,
    rows: RowCount = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; analysis/posterior-SPLIT.nc unless said.")
    ] = None,
) -> None:
    """Export samples of the guide, with densities and diagnostics, as NetCDF for ArviZ."""
    opened = shared.open_on_device(run)
    with shared.bar("posterior", draws) as bar:
        found = opened.posterior(split, draws, rows, seed, on_progress=bar.report)
    path = found.save(out or opened.files.analysis / f"posterior-{split}.nc")
    summary = found.summary()
    data = {"run": str(opened.path), "split": split, "file": str(path), "summary": summary.to_dict("index")}
    shared.answer(data, summary.to_string(float_format="{:.3f}".format, max_rows=40))
    shared.tell(f"posterior: {path}")
