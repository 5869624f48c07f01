"""One row for each run: ELBO, its parts on train and test, evidence, and the paired gain over the first run.

    python analysis/results/measure.py OUT.csv RUN... [--samples 500] [--rows 10000]

The first run is the reference of the paired differences. Figures are nats per datum; `_error` is their Monte Carlo
error with the data fixed, except for `gain_error`, the standard error of the paired difference over the test data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas
import torch

from pvae import Run
from pvae.analysis import evidence, surgery
from pvae.seeds import subset

TERMS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl", "marginal_kl_upper", "train_gain")


def row_of(run: Run, samples: int, rows: int, train_rows: int) -> tuple[dict[str, object], torch.Tensor]:
    """Figures of a run, and log p(x) of every test datum."""
    train, test = run.data.train.x, run.data.test.x[subset(len(run.data.test), rows, 0)]
    found = {
        "train": surgery(run.pair, train[subset(len(train), train_rows, 0)]),
        "test": surgery(run.pair, test, train=train),
    }
    bound = evidence(run.pair, test, samples=samples)
    row: dict[str, object] = {
        "run": run.name,
        "epochs": run.status["epoch"],
        "fit_seconds": run.status["seconds"],
        "threads": run.files.manifest["threads"],
        "engine": run.status["engine"],
    }
    for split, s in found.items():
        for term in TERMS:
            figure = getattr(s, term)
            if figure is not None:
                row |= {f"{split}_{term}": figure.value, f"{split}_{term}_error": figure.standard_error}
        for name, latent in s.latents.items():
            row[f"{split}_kl_{name}"] = latent.kl.value
    last = bound.iwae
    row |= {"iwae": last.value, "iwae_error": last.standard_error, "iwae_samples": samples}
    return row, bound.log_p


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--train-rows", type=int, default=50_000)
    asked = parser.parse_args()
    rows, reference = [], None
    for name in asked.runs:
        row, log_p = row_of(Run.load(name, root=asked.root), asked.samples, asked.rows, asked.train_rows)
        reference = log_p if reference is None else reference
        difference = log_p - reference
        row |= {"gain": float(difference.mean()), "gain_error": float(difference.std() / len(difference) ** 0.5)}
        rows.append(row)
        pandas.DataFrame(rows).round(4).to_csv(asked.out, index=False)
        print(pandas.DataFrame(rows).T.to_string(), flush=True)


if __name__ == "__main__":
    main()
