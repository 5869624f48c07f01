"""Table with one row per run: ELBO surgery and evidence on train and test, sample quality, gain over the first run.

    python tests/soak/measure.py OUT.csv RUN... [--samples 500] [--rows 10000] [--train-evidence 0] [--draws 0]
                                                    [--device cpu]
    python tests/soak/measure.py OUT.csv          (prints OUT.csv as the Markdown tables of README.md)

`gain` is the difference of the bound on log p(x) from that of the first run in the table on the same data, paired over
test data; `gain_error` is its standard error over them. A run that has a row is not measured again, so that the test
data are scored once. Values are nats per datum. Other columns `_error` are Monte Carlo errors with the data fixed; of
surgery they are conservative, since one posterior sample per datum cannot separate Monte Carlo noise from the spread
over data. `_gap` is the importance-weighted bound on log p(x) minus the ELBO of the same data: a lower bound on
KL(q(z|x) || p(z|x)).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import torch
from safetensors.torch import load_file, save_file

from pvae import Run
from pvae.analysis import evidence, surgery
from pvae.analysis.decompose.result import SURGERY_TERMS
from pvae.analysis.samples.quality import sample_quality
from pvae.training.launch import pick_device
from pvae.util.seeds import subset

MEASURED_TERMS = (*SURGERY_TERMS, "marginal_kl_upper", "train_gain")


def fitted(run: Run) -> dict[str, object]:
    """Return columns that identify a run and its data, and describe its fit: epochs, seconds, device, parameters ..."""
    status, manifest, train = run.status, run.files.manifest, run.plan.train
    validated = run.metrics.query("split == 'validation'")
    total = "elbo" if "elbo" in validated else "log_joint"
    figure = validated.get(manifest.get("figure", total), validated[total])
    kept = validated.iloc[int(figure.argmax()) if train.keep == "best" else -1]
    return {
        "run": run.name, "id": run.path.name, "data": run.data.source, "fingerprint": run.data.fingerprint[:16],
        "epochs": status["epoch"], "best_epoch": kept["epoch"], "fit_seconds": status["seconds"],
        "device": manifest["device"], "threads": manifest["threads"], "engine": status["engine"],
        "precision": manifest.get("precision", train.precision),
        "parameters": sum(p.numel() for p in run.pair.parameters()), "validation_elbo": kept[total],
    }  # fmt: skip


def anatomy(run: Run, rows: int, train_rows: int) -> dict[str, object]:
    """Return the ELBO surgery of train and test data as columns: its terms with errors, and each latent's KL, nats."""
    train, test = run.data.train.x, run.data.test.x[subset(len(run.data.test), rows, 0)]
    found = {
        "train": surgery(run.pair, train[subset(len(train), train_rows, 0)], seen=True),
        "test": surgery(run.pair, test, train=train),
    }
    row: dict[str, object] = {}
    for split, s in found.items():
        for term in MEASURED_TERMS:
            figure = getattr(s, term)
            if figure is not None:
                row |= {f"{split}_{term}": figure.value, f"{split}_{term}_error": figure.standard_error}
        for name, latent in s.latents.items():
            row[f"{split}_kl_{name}"] = latent.kl.value
    return row


def bounded(run: Run, split: str, rows: int, samples: int) -> tuple[dict[str, object], torch.Tensor]:
    """Return the importance-weighted bound on log p(x) of some rows of a split, with diagnostics, and that of each row.

    The columns are the mean bound and its error, its gap to the ELBO, the median effective sample size, and the
    proportion of rows whose k-hat exceeds its limit.
    """
    x = run.data.split(split).x
    found = evidence(run.pair, x[subset(len(x), rows, 0)], samples=samples)
    figures = {
        "iwae": found.iwae.value, "iwae_error": found.iwae.standard_error, "gap": found.gap,
        "ess_median": float(found.ess.median()), "khat_share": found.khat_share, "evidence_rows": found.n,
    }  # fmt: skip
    return {f"{split}_{name}": value for name, value in figures.items()}, found.log_p.cpu()


def sampled(run: Run, draws: int) -> dict[str, object]:
    """Return the quality of samples of a run compared with test data: classifier accuracy, distances, coverage ..."""
    found = sample_quality(run, "test", draws)
    f, sharp = found.fidelity, found.sharpness_of_means
    measured = found.test.accuracy, found.distances.frechet, f.precision, f.recall, f.coverage, sharp
    return {name: None if e is None else e.value for name, e in zip(TABLES["Samples"], measured, strict=True)}


TABLES: dict[str, tuple[str, ...]] = {
    "Test": ("test_iwae", "gain", "test_elbo", "test_gap", "test_reconstruction", "test_mutual_information",
             "test_marginal_kl", "test_marginal_kl_upper", "test_khat_share"),
    "Train": ("train_iwae", "train_gap", "train_elbo", "train_reconstruction", "train_mutual_information",
              "train_marginal_kl", "train_marginal_kl_upper"),
    "Samples": ("told_apart", "frechet", "precision_of_samples", "recall", "coverage", "sharpness_of_means"),
    "Fit": ("epochs", "best_epoch", "minutes", "device", "threads", "parameters"),
}  # fmt: skip
"""Columns of each Markdown table of README.md, by the name of the table."""
TITLES = {
    "test_iwae": "log p(x)", "test_elbo": "ELBO", "test_mutual_information": "I_q", "test_marginal_kl": "marginal KL",
    "test_marginal_kl_upper": "at most", "test_khat_share": "k-hat",
    "frechet": "Fréchet",
}  # fmt: skip


def pages(frame: pandas.DataFrame) -> Iterator[str]:
    """Yield the Markdown tables of the measured runs; a value that a run lacks is an empty cell."""
    frame = frame.assign(minutes=frame["fit_seconds"] / 60)
    for name, wanted in TABLES.items():
        columns = [column for column in wanted if column in frame and frame[column].notna().any()]
        plain = {c: c.removeprefix(f"{name.lower()}_").replace("_", " ") for c in columns}
        lines = [(name, *(TITLES.get(c.replace("train", "test"), plain[c]) for c in columns))]
        lines += [(row["run"], *(_cell(row, c) for c in columns)) for _, row in frame.iterrows()]
        head, *rows = (f"| {' | '.join(line)} |" for line in lines)
        if columns:
            yield "\n".join((head, "|---" * (len(columns) + 1) + "|", *rows))


def _cell(row: pandas.Series, column: str) -> str:
    value = row[column]
    if pandas.isna(value):
        return ""
    if column == "device":
        return str(value)
    if column in ("epochs", "best_epoch", "minutes", "threads", "parameters"):
        return f"{value:.0f}"
    if column in TABLES["Samples"]:
        return f"{value:.1f}" if column == "frechet" else f"{value:.3f}"
    return f"{value:.2f} ± {row['gain_error']:.2f}" if column == "gain" else f"{value:.2f}"


def main() -> None:
    """Measure the runs that have no row in the table yet, and add their rows; without runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--train-rows", type=int, default=50_000)
    parser.add_argument("--train-evidence", type=int, default=0, help="training rows whose evidence is asked for")
    parser.add_argument("--draws", type=int, default=0, help="draws set beside as many test data")
    parser.add_argument("--device", default="cpu", help="where figures are computed: auto, cpu or cuda")
    asked = parser.parse_args()
    rows: list[Any] = pandas.read_csv(asked.out).to_dict("records") if asked.out.exists() else []
    if not asked.runs:
        print("\n\n".join(pages(pandas.DataFrame(rows))))
    for name in asked.runs:
        run = Run.load(name, root=asked.root)
        if run.status["state"] != "finished":
            parser.error(f"{name}: expected a run that is finished; it is {run.status['state']}")
        if any(row.get("id") == run.path.name for row in rows):
            print(f"{name}: measured already")
            continue
        run.to(pick_device(asked.device))
        row = fitted(run)
        scored = (row["fingerprint"], asked.samples, min(asked.rows, len(run.data.test)))
        alike = [r for r in rows if tuple(r.get(k) for k in ("fingerprint", "samples", "test_evidence_rows")) == scored]
        at = log_p_of(asked.root, alike[0]) if alike else None
        if at is not None and not at.is_file():
            parser.error(f"{name}: expected {at}, which measuring {alike[0]['run']} wrote; got none. Name a new table.")
        row |= anatomy(run, asked.rows, asked.train_rows)
        scores, log_p = bounded(run, "test", asked.rows, asked.samples)
        row |= scores | {"samples": asked.samples}
        kept = log_p_of(asked.root, row)
        kept.parent.mkdir(exist_ok=True)
        save_file({"log_p": log_p}, kept)
        if at is not None:
            difference = log_p - load_file(at)["log_p"]
            row |= {"gain": float(difference.mean()), "gain_error": float(difference.std() / len(difference) ** 0.5)}
        if asked.train_evidence:
            row |= bounded(run, "train", asked.train_evidence, asked.samples)[0]
        if asked.draws:
            row |= sampled(run, asked.draws)
        rows.append(row)
        pandas.DataFrame(rows).round(4).to_csv(asked.out, index=False)
        print(pandas.DataFrame(rows).T.to_string(), flush=True)


def log_p_of(root: str, row: dict[str, Any]) -> Path:
    """Return the path of the file with a run's bound on log p(x) of every test datum, for paired differences."""
    name = f"log_p_{row['test_evidence_rows']}_{row['samples']}.safetensors"
    return Path(root) / row["run"] / row["id"] / "analysis" / name


if __name__ == "__main__":
    main()
