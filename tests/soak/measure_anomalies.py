"""Scores of planted anomalies and imputation errors on a messy table of 20 000 rows, beside scikit-learn's.

    python tests/soak/measure_anomalies.py OUT.csv [--seeds 3]

The table has numbers, counts, categories, a date and ids, driven by four hidden causes, and 8 % of its cells are
missing. A model is fitted to a CSV of it; the run is copied to another folder, the data are removed, and it is applied
to CSVs of new rows, whose ids stay with them. In a tenth of these rows the cells are permuted within their columns, so
that every marginal stays: log p(x) has to tell them by what columns say about each other.
IsolationForest (one-hots, medians for missing cells) is fitted on the same rows.
Imputation: 10 % of the observed numbers of clean new rows are hidden; errors are in standard deviations of their
columns, as the fit transforms them.
"""

# A figure that may be None fails the script if it is.
# mypy: disable-error-code="union-attr, index, arg-type"

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.metrics import roc_auc_score

import pvae
from pvae.experiment.experiment import Experiment

ROWS, NEW, MISSING, ODD, HIDDEN = 20_000, 3000, 0.08, 0.1, 0.1
CITIES, PLANS = ("Aachen", "Bari", "Cork", "Delft", "Espoo", "Faro"), ("basic", "plus", "pro")
NUMBERS = ("age", "income", "spend", "weight", "visits", "calls", "since")
IMPUTERS = {"iterative, ridge": IterativeImputer, "k nearest": KNNImputer, "mean": SimpleImputer}
MASK = {"missing": "mask"}
COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"type": "continuous", **MASK},
    "income": {"type": "continuous", "transform": "log", **MASK},
    "spend": {"type": "continuous", "transform": "log1p", "likelihood": "student_t", **MASK},
    "weight": {"type": "continuous", **MASK},
    "visits": {"type": "count", "likelihood": "negative_binomial", **MASK},
    "calls": {"type": "count", **MASK},
    "city": {"type": "categorical", "levels": list(CITIES), **MASK},
    "plan": {"type": "categorical", "levels": list(PLANS), **MASK},
    "member": {"type": "binary", "values": ["no", "yes"], **MASK},
    "since": {"type": "continuous", "time": "days", **MASK},
}


def table(seed: int) -> pandas.DataFrame:
    """Return rows of all columns and an id, without missing cells."""
    random = np.random.default_rng(seed)
    z = random.standard_normal((ROWS, 4))

    def noisy(signal: np.ndarray, noise: float) -> np.ndarray:
        return signal + noise * random.standard_normal(ROWS)

    def level(*signals: np.ndarray) -> np.ndarray:
        return np.argmax([s + random.gumbel(size=ROWS) for s in signals], 0)

    turn = [2 * np.cos(angle) * z[:, 0] + 2 * np.sin(angle) * z[:, 1] for angle in np.linspace(0, 5.2, 6)]
    days = noisy(3000 + 900 * z[:, 2] - 300 * z[:, 0], 200).round()
    return pandas.DataFrame({
        "customer": [f"c{seed}-{i:05d}" for i in range(ROWS)],
        "age": noisy(45 + 9 * z[:, 0] + 4 * z[:, 1] ** 2, 3).round(1),
        "income": np.exp(noisy(10 + 0.4 * z[:, 0] - 0.5 * z[:, 3], 0.15)).round(2),
        "spend": np.expm1(np.abs(noisy(4 + 0.8 * z[:, 1] + 0.6 * z[:, 3], 0.2))).round(2),
        "weight": noisy(70 + 8 * z[:, 2] * np.sign(z[:, 3]) + 5 * z[:, 1], 3).round(1),
        "visits": random.poisson(np.exp(1.5 + 0.7 * z[:, 2] + 0.4 * z[:, 0])),
        "calls": random.poisson(np.exp(1 - 0.8 * z[:, 3])),
        "city": np.array(CITIES)[level(*turn)],
        "plan": np.array(PLANS)[level(0 * z[:, 0], 2 * z[:, 3], 2 * z[:, 3] + 2 * z[:, 1] - 1)],
        "member": np.array(["no", "yes"])[(noisy(z[:, 2] + z[:, 3], 0.5) > 0).astype(int)],
        "since": (np.datetime64("2010-01-01") + days.astype("timedelta64[D]")).astype(str),
    })  # fmt: skip


def prepared(seed: int) -> tuple[pandas.DataFrame, np.ndarray]:
    """Return the table with missing cells, whose last rows are new, and True for those whose cells were permuted."""
    frame, random = table(seed), np.random.default_rng(seed + 1000)
    odd = np.arange(ROWS) >= ROWS - NEW * ODD
    for name in COLUMNS:
        frame.loc[odd, name] = random.permutation(frame.loc[odd, name].to_numpy())
        frame[name] = frame[name].astype(object).where(random.random(ROWS) >= MISSING, None)
    return frame, odd


def plain(x: np.ndarray) -> np.ndarray:
    """Return rows as scikit-learn needs them: categories as one-hots, missing cells as NaN."""
    frame = pandas.DataFrame(x, columns=list(COLUMNS))
    hot = pandas.get_dummies(frame, columns=["city", "plan"], dtype=float)
    return hot.to_numpy(float)


def measured(seed: int) -> list[dict[str, object]]:
    """Return the figures of one table."""
    frame, odd = prepared(seed)
    old, ids = ROWS - NEW, "customer"
    hidden = {"network": {"kind": "mlp", "hidden": [128, 128]}}
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        here, away = Path(folder, "here"), Path(folder, "away")
        here.mkdir()
        away.mkdir()
        frame[:old].to_csv(here / "old.csv", index=False)
        frame[old:].to_csv(away / "new.csv", index=False)
        plan = Experiment.from_dict({
            "data": {"source": "csv", "path": str(here / "old.csv"), "id": ids, "columns": COLUMNS},
            "latents": {"z": {"dim": 6}},
            "encoder": hidden, "decoder": {**hidden, "likelihood": "columns"},
            "objective": {"kind": "iwae", "particles": 8},
            "train": {"epochs": 30, "batch_size": 200, "optimizer": {"kind": "adam", "lr": 3e-3},
                      "schedule": {"kind": "cosine"}},
        })  # fmt: skip
        run = pvae.fit(plan, run_dir=here, device="cpu", progress=False)
        train = run.data.train.x
        run.score(run.data.test, samples=100)  # where the data are, so that the run keeps those of validation rows
        path = shutil.copytree(run.path, away / "run")
        shutil.rmtree(here)
        run = pvae.Run.load(path)
        new, odd, found = run.rows(away / "new.csv").x, odd[old:], run.score(away / "new.csv", samples=100)
        named = found.to_frame().reset_index()
        assert [*named["id"]] == [*frame[ids][old:]]
        forest = IsolationForest(n_estimators=200, random_state=seed, n_jobs=1)
        median = SimpleImputer(strategy="median").fit(plain(train.numpy()))
        forest.fit(median.transform(plain(train.numpy())))
        other = -forest.score_samples(median.transform(plain(new.numpy())))

        def add(figure: str, method: str, value: float) -> None:
            rows.append({"seed": seed, "figure": figure, "method": method, "value": float(value)})

        for method, value in {"pvae": -found.log_p.numpy(), "isolation forest": other}.items():
            add("AUROC", method, roc_auc_score(odd, value))
        add("p below .05, clean rows", "pvae", (found.p_value[torch.tensor(~odd)] < 0.05).double().mean())
        clean, random = new[torch.tensor(~odd)][:1000], np.random.default_rng(seed)
        places = [list(COLUMNS).index(name) for name in NUMBERS]
        gone = torch.zeros(clean.shape, dtype=torch.bool)
        gone[:, places] = torch.tensor(random.random((len(clean), len(places))) < HIDDEN)
        gone &= ~clean.isnan()
        holed = frame[old:][~odd][:1000]
        holed = holed.assign(**{name: holed[name].mask(gone[:, i].numpy()) for i, name in enumerate(COLUMNS)})
        holed.to_csv(away / "holes.csv", index=False)
        filled = {"pvae": run.impute(away / "holes.csv", draws=1).mean.numpy()[:, places]}
        numbers = [
            i for i, name in enumerate(name for name in COLUMNS if name not in ("city", "plan")) if name in NUMBERS
        ]
        holes, known = plain(clean.masked_fill(gone, torch.nan).numpy()), plain(train.numpy()[:5000])
        for method, imputer in IMPUTERS.items():
            filled[method] = imputer().fit(known).transform(holes)[:, numbers]
        for method, x in filled.items():
            gap = (x - clean.numpy()[:, places]) / np.nanstd(train.numpy()[:, places], 0)
            add("RMSE of hidden numbers", method, np.sqrt((gap[gone.numpy()[:, places]] ** 2).mean()))
    print(*rows, f"{time.monotonic() - start:.0f} s", sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(asked.seeds) for row in measured(seed)]
    frame = pandas.DataFrame(rows)
    frame.to_csv(asked.table, index=False)
    print(frame.groupby(["figure", "method"], sort=False)["value"].agg(["mean", "sem"]).round(3).to_string())


if __name__ == "__main__":
    main()
