"""Table of objectives on data with missing cells: the ELBO beside the missing-data importance-weighted bound (MIWAE).

    python -m tests.soak.measure_missing OUT.csv [--masks 3] [--data wine ...]
    python -m tests.soak.measure_missing OUT.csv --print    (as the Markdown table of analysis/results/README.md)

The tables, masks (half of the cells, completely at random) and declarations are those of `measure_imputation`, which
were chosen with the objective `iwae`. A random fifth of the rows is held out, a tenth chooses the epoch, the others are
fitted. On the held-out rows: log p of the observed cells, nats a row, by 5000 importance samples; and the root mean
square error of the missing ones, in standard deviations of their columns, imputed by 2000 importance samples. The ELBO
has one sample of z, and 20 as the importance-weighted bound has.
"""

# A figure that may be None fails the script if it is.
# mypy: disable-error-code="union-attr"

import argparse
import itertools
import tempfile
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

from pvae.analysis import impute, score
from tests.soak.measure_imputation import CHOICES, CHOSEN, MIWAE, SOURCES, cells, fitted

OBJECTIVES: dict[str, Mapping[str, Any]] = {
    "ELBO": {"kind": "trace_elbo"},
    "ELBO, 20 samples": {"kind": "trace_elbo", "particles": 20},
    "MIWAE, 20 samples": MIWAE,
}


def measured(name: str, mask: int, objective: str, folder: str) -> dict[Hashable, Any]:
    """Return the row of a data set, a mask and an objective."""
    x, full, unit = cells(name, mask)
    start = time.monotonic()
    order = np.random.default_rng(mask).permutation(len(x))
    held, validation, train = np.split(order, [len(x) // 5, len(x) // 5 + len(x) // 10])
    run = fitted(x[train], CHOICES[CHOSEN[name]], folder, x[validation], mask, OBJECTIVES[objective])
    rows = torch.tensor(x[held])
    log_p = score(run.pair, rows, samples=5000).log_p
    made = impute(run.pair, rows, samples=2000, draws=1).x.double().numpy()
    gap = ((made - full[held]) / unit)[np.isnan(x[held])]
    found: dict[Hashable, Any] = {"log_p": float(log_p.mean()), "rmse": float(np.sqrt((gap**2).mean()))}
    return {"data": name, "mask": mask, "objective": objective, **found, "seconds": round(time.monotonic() - start, 1)}


def page(frame: pandas.DataFrame) -> str:
    """Return the Markdown table: a row per objective, mean and standard error over masks per data set."""
    names = list(frame["data"].unique())
    heads = [f"{name}, {figure}" for name in names for figure in ("log p", "error")]
    lines = ["| objective | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for objective in OBJECTIVES:
        rows = [frame[(frame["data"] == name) & (frame["objective"] == objective)] for name in names]
        shown = [f"{row[key].mean():.{n}f} ± {row[key].sem():.{n}f}" for row in rows for key, n in FIGURES]
        lines.append(f"| {objective} | {' | '.join(shown)} |")
    return "\n".join(lines)


FIGURES = (("log_p", 2), ("rmse", 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--masks", type=int, default=3)
    parser.add_argument("--data", nargs="+", default=list(SOURCES))
    parser.add_argument("--print", action="store_true", dest="shown")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = pandas.read_csv(asked.table).to_dict("records") if asked.table.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for mask, name, objective in itertools.product(range(asked.masks), asked.data, OBJECTIVES):
            known = any((r["data"], r["mask"], r["objective"]) == (name, mask, objective) for r in rows)
            if not (asked.shown or known):
                rows.append(measured(name, mask, objective, folder))
                print(rows[-1], flush=True)
                pandas.DataFrame(rows).to_csv(asked.table, index=False)
    if asked.shown:
        print(page(pandas.DataFrame(rows)))


if __name__ == "__main__":
    main()
