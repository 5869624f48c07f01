"""Table of objectives and gradient estimators: one small VAE with N(0, I), MNIST averaged to 14 x 14 pixels, K = 64.

    python -m tests.soak.measure_gradients OUT.csv MNIST.npz [--seeds 3]
    python -m tests.soak.measure_gradients OUT.csv --print    (as the Markdown table of analysis/results/README.md)

MNIST.npz has `x_train` and `x_test`, bytes. Every row has the same network, initial weights, batches, number of steps
and, but for the VAE with one sample, 64 samples for each image. Pixels are the means of 2 x 2 pixels, binarised anew
for each batch; test images are binarised once. On test images: log p(x) by importance sampling, the ELBO, the bound of
64 samples, the KL, and log p(x) - ELBO, the inference gap. Rows that are in the table are not fitted again.
"""

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

import pvae
from pvae.analysis import evidence, surgery
from pvae.experiment.experiment import Experiment

IWAE: Mapping[str, Any] = {"kind": "iwae", "particles": 64}
OBJECTIVES: dict[str, Mapping[str, Any]] = {
    "VAE": {"kind": "trace_elbo", "particles": 64},
    "IWAE": IWAE,
    "STL": {"kind": "trace_elbo", "particles": 64, "gradient": "stick_the_landing"},
    "DReG": {**IWAE, "gradient": "doubly_reparameterised"},
    "MIWAE(8, 8)": {**IWAE, "groups": 8},
    "PIWAE(8, 8)": {**IWAE, "groups": 8, "partially": True},
    "CIWAE(1/2)": {**IWAE, "elbo": 0.5},
    "VAE, one sample": {"kind": "trace_elbo"},
}
FIRST = ("VAE", "IWAE")
"""Rows that are fitted first, for all seeds: those that the claim is about."""
FIGURES = ("log_p", "bound_64", "elbo", "gap", "kl")
TRAIN, VALIDATION, TEST = 24_000, 500, 1000


def images(file: Path) -> np.ndarray:
    """Return training, validation and test images of 14 x 14 = 196 pixels in [0, 1], one after the other."""
    with np.load(file) as found:
        x = np.concatenate([found["x_train"][:TRAIN], found["x_test"][: VALIDATION + TEST]])
    return x.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32).reshape(-1, 196) / 255


def measured(x: np.ndarray, objective: str, seed: int, epochs: int, folder: str) -> dict[str, Any]:
    """Return the row of an objective and a seed."""
    cpu, n = time.process_time(), len(x) - VALIDATION - TEST
    network = {"kind": "mlp", "hidden": [100]}
    splits = {"train": [0, n], "validation": [n, n + VALIDATION], "test": [n + VALIDATION, len(x)]}
    plan = Experiment.from_dict({
        "seed": seed,
        "data": {"source": "npz", "path": "x.npz", "binarize": "dynamic", "splits": splits},
        "latents": {"z": {"dim": 10}},
        "encoder": {"network": network},
        "decoder": {"network": network, "likelihood": "bernoulli"},
        "objective": dict(OBJECTIVES[objective]),
        "train": {"epochs": epochs, "batch_size": 24, "engine": "eager", "optimizer": {"kind": "adam", "lr": 3e-3},
                  "schedule": {"kind": "cosine", "end": 0.02}, "keep": "last"},
    })  # fmt: skip
    run = pvae.fit(plan, data=torch.tensor(x), run_dir=folder, progress=False)
    fitted, rows = time.process_time() - cpu, run.data.test.x
    many, few = (evidence(run.pair, rows, samples=k) for k in (1000, 64))
    log_p, elbo, kl = many.iwae.value, many.elbo.value, surgery(run.pair, rows, samples=4).kl.value
    found = {"log_p": log_p, "bound_64": few.iwae.value, "elbo": elbo, "gap": log_p - elbo, "kl": kl}
    found["cpu_seconds"] = fitted
    return {"objective": objective, "seed": seed, **{name: round(value, 4) for name, value in found.items()}}


def spread(values: Any) -> str:
    """Return mean and standard error of a column, without the latter for a single seed."""
    return f"{values.mean():.2f} ± {values.sem():.2f}" if len(values) > 1 else f"{values.mean():.2f}"


def page(frame: pandas.DataFrame) -> str:
    """Return the Markdown table: a row per objective, mean and standard error over seeds."""
    heads = ("log p(x)", "bound, K = 64", "ELBO", "gap", "KL", "log p(x) - that of the VAE", "seeds", "CPU s")
    lines = ["| objective | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    own = frame[frame["objective"] == "VAE"].set_index("seed")["log_p"]
    for objective in (name for name in OBJECTIVES if name in set(frame["objective"])):
        rows = frame[frame["objective"] == objective].set_index("seed")
        shown = [spread(rows[name]) for name in FIGURES]
        shown.append("" if objective == "VAE" else spread((rows["log_p"] - own).dropna()))
        shown += [str(len(rows)), f"{rows['cpu_seconds'].mean():.0f}"]
        lines.append(f"| {objective} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("mnist", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--print", action="store_true", dest="shown")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Any] = pandas.read_csv(asked.table).to_dict("records") if asked.table.exists() else []
    later = [name for name in OBJECTIVES if name not in FIRST]
    order = [pair for names in (FIRST, later) for pair in itertools.product(range(asked.seeds), names)]
    known = {(row["seed"], row["objective"]) for row in rows}
    x = None if asked.shown else images(asked.mnist)
    with tempfile.TemporaryDirectory() as folder:
        for seed, objective in order:
            if x is not None and (seed, objective) not in known:
                rows.append(measured(x, objective, seed, asked.epochs, folder))
                pandas.DataFrame(rows).to_csv(asked.table, index=False)
                print(rows[-1], flush=True)
    print(page(pandas.DataFrame(rows)))


if __name__ == "__main__":
    main()
