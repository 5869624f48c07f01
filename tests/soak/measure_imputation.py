"""Table of imputation errors: pvae fitted under masks by importance weighting (MIWAE), beside scikit-learn's imputers.

    python tests/soak/measure_imputation.py OUT.csv [--masks 5] [--data wine ...]
    python tests/soak/measure_imputation.py OUT.csv --print    (as the Markdown table of analysis/results/README.md)

Wine, breast cancer and iris of scikit-learn, half of the cells missing completely at random. Columns are standardised
by their observed cells; an error is the root mean square over the missing cells, in standard deviations of the whole
column. All imputers see the same cells, of all rows. The declaration of a data set is the one of `CHOICES` whose fit on
four fifths of the rows has the highest log p of the observed cells of the other rows, mask 0 (`--choose` prints these):
no missing cell is looked at. Under masks the objective `iwae` is the bound of MIWAE (Mattei and Frellsen, 2019): the
likelihood of the observed columns alone.
"""

# A figure that may be None fails the script if it is.
# mypy: disable-error-code="union-attr, arg-type"

import argparse
import itertools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from sklearn import datasets
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import pvae
from pvae.analysis import impute, score
from pvae.data import Dataset
from pvae.experiment.experiment import Experiment

SOURCES = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer, "iris": datasets.load_iris}
DIMS = {"wine": (2, 4), "breast_cancer": (4, 8), "iris": (1, 2)}
KINDS = list(itertools.product(((), (64,)), ("normal", "student_t")))
CHOICES = {f"dim {d}, hidden {list(h)}, {kind}": (d, h, kind) for d in (1, 2, 4, 8) for h, kind in KINDS}
CHOSEN = {
    "wine": "dim 2, hidden [64], student_t",
    "breast_cancer": "dim 4, hidden [64], student_t",
    "iris": "dim 2, hidden [64], normal",
}
MIWAE: Mapping[str, Any] = {"kind": "iwae", "particles": 20}
EXPOSURES = 60_000
"""Number of rows that a fit sees, with repetitions."""


def cells(name: str, mask: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return standardised rows with NaN for the cells that are missing, all cells on the same scale, and its units."""
    x = SOURCES[name]().data
    gone = np.random.default_rng(mask).random(x.shape) < 0.5
    seen = np.where(gone, np.nan, x)
    loc, scale = np.nanmean(seen, 0), np.nanstd(seen, 0)
    return (seen - loc) / scale, (x - loc) / scale, x.std(0) / scale


def fitted(
    x: np.ndarray,
    choice: tuple[int, tuple[int, ...], str],
    folder: str,
    validation: np.ndarray,
    seed: int = 0,
    objective: Mapping[str, Any] = MIWAE,
) -> pvae.Run:
    """Return the run of a fit to rows with missing cells."""
    dim, hidden, likelihood = choice
    kind = {"type": "continuous", "transform": "none", "missing": "mask", "likelihood": likelihood}
    decoder = {"kind": "mlp", "hidden": list(hidden)}
    columns = {f"c{i}": kind for i in range(x.shape[1])}
    plan = Experiment.from_dict({
        "seed": seed,
        "data": {"source": "frame", "columns": columns},
        "latents": {"z": {"dim": dim}},
        "encoder": {"network": {"kind": "mlp", "hidden": [64]}},
        "decoder": {"network": decoder, "likelihood": {"kind": "columns", "floor": 0.05}},
        "objective": dict(objective),
        "train": {"epochs": round(EXPOSURES / len(x)), "batch_size": 64, "engine": "eager",
                  "optimizer": {"kind": "adam", "lr": 5e-3}, "schedule": {"kind": "cosine"}, "validate_every": 10},
    })  # fmt: skip
    n, m = len(x), len(validation)
    frame = pandas.DataFrame(np.concatenate([x, validation, validation]), columns=list(columns))
    splits = {"train": [0, n], "validation": [n, n + m], "test": [n + m, n + 2 * m]}
    data = Dataset.from_frame(frame, columns, splits=splits)
    return pvae.fit(plan, data=data, run_dir=folder, device="cpu", progress=False)


def chosen(name: str, folder: str) -> dict[str, float]:
    """Return the mean log p of the observed cells of rows that the fit has not seen, by choice, nats per row."""
    x = cells(name, 0)[0]
    order = np.random.default_rng(1).permutation(len(x))
    held, train = x[order[: len(x) // 5]], x[order[len(x) // 5 :]]
    found = {}
    for key, choice in CHOICES.items():
        if choice[0] not in DIMS[name]:
            continue
        start = time.monotonic()
        run = fitted(train, choice, folder, held)
        found[key] = float(score(run.pair, torch.tensor(held), samples=500).log_p.mean())
        print(name, key, f"{found[key]:.3f} nats, {time.monotonic() - start:.0f} s", flush=True)
    return found


def imputed(method: str, name: str, x: np.ndarray, seed: int, folder: str) -> np.ndarray:
    """Return rows with their missing cells filled in by a method."""
    if method == "pvae":
        run = fitted(x, CHOICES[CHOSEN[name]], folder, x, seed)
        return impute(run, torch.tensor(x), samples=2000, draws=1).x.double().numpy()
    trees = {"n_estimators": 50, "n_jobs": 1, "random_state": seed}
    imputer = {
        "iterative, extra trees": IterativeImputer(ExtraTreesRegressor(**trees), max_iter=5, random_state=seed),
        "iterative, ridge": IterativeImputer(max_iter=20, random_state=seed),
        "k nearest": KNNImputer(n_neighbors=5),
        "mean": SimpleImputer(),
    }[method]
    return imputer.fit_transform(x)


METHODS = ("pvae", "iterative, extra trees", "iterative, ridge", "k nearest", "mean")


def measured(name: str, mask: int, method: str, folder: str) -> dict[str, object]:
    """Return the row of a data set, a mask and a method."""
    x, full, unit = cells(name, mask)
    start = time.monotonic()
    gap = ((imputed(method, name, x, mask, folder) - full) / unit)[np.isnan(x)]
    seconds = round(time.monotonic() - start, 1)
    return {"data": name, "mask": mask, "method": method, "rmse": float(np.sqrt((gap**2).mean())), "seconds": seconds}


def page(frame: pandas.DataFrame) -> str:
    """Return the Markdown table: a row per method, mean and standard error over masks per data set."""
    names = list(frame["data"].unique())
    lines = ["| imputation | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for method in METHODS:
        row = [frame[(frame["data"] == name) & (frame["method"] == method)]["rmse"] for name in names]
        lines.append(f"| {method} | " + " | ".join(f"{r.mean():.3f} ± {r.sem():.3f}" for r in row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--masks", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=list(SOURCES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--choose", action="store_true", help="print the validation log p of every choice instead")
    parser.add_argument("--print", action="store_true", dest="shown")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = pandas.read_csv(asked.table).to_dict("records") if asked.table.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.data if asked.choose else ():
            found = chosen(name, folder)
            print(name, max(found, key=lambda key: found[key]))
        for name, mask, method in itertools.product(asked.data, range(asked.masks), asked.methods):
            known = any((r["data"], r["mask"], r["method"]) == (name, mask, method) for r in rows)
            if not (asked.choose or asked.shown or known):
                rows.append(measured(name, mask, method, folder))
                print(rows[-1], flush=True)
                pandas.DataFrame(rows).to_csv(asked.table, index=False)
    if asked.shown:
        print(page(pandas.DataFrame(rows)))


if __name__ == "__main__":
    main()
