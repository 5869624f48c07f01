"""Counts of cells: pvae's zoo entry `cells` beside scvi-tools on the same split, with the same sizes of networks.

    python tests/bench/cells.py smfish.h5ad [--peer PYTHON] [--seeds 3] [--epochs 180]
        [--out cells.csv] [--only NAME ..]

The rows are split by `default_rng(0).permutation` into 80, 10 and 10 % (of 4530 cells 3624, 453 and 453). Both have 10
latents, one layer of 128, batches of 128, and log p(x | sum of x): ELBO and IWAE (1000 samples) of the test rows, nats
per cell. scvi-tools is fitted for 200 epochs, pvae for --epochs. `seconds` are those of the processor, of the fit alone
in one thread, `wall` those of the clock. PYTHON is an interpreter that has scvi-tools (1.4.2), whose fits alternate
with those of pvae, each in a process of its own (`cells_peer.py`): its `elbo` and `iwae` are computed there in float64,
`peer_elbo` (one sample) and `peer_iwae` by its own functions. --only takes names of `VARIANTS`.
"""

# A figure that may be None fails the script if it is.
# mypy: disable-error-code="union-attr"

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pvae
from pvae.analysis import evidence
from pvae.data import Dataset

SPLIT = (0.8, 0.9)
VARIANTS = {
    "negative binomial": [],
    "zero-inflated": ["decoder.likelihood.kind=zero_inflated_negative_binomial"],
    "negative binomial, dispersion from the decoder": ["decoder.likelihood.dispersion=decoder"],
    "Poisson": ["decoder.likelihood.kind=poisson"],
    "negative binomial, size learned": ["decoder.likelihood.size=learned"],
}
"""Overrides of the zoo entry; all but the last are given the sum of x, whose log p(x) is another density."""
PEERS = {
    "negative binomial": {
        "scvi-tools": ["nb"],
        "scvi-tools, KL in 50 epochs, no dropout": ["nb", "50", "0"],
    },
    "zero-inflated": {
        "scvi-tools": ["zinb"],
        "scvi-tools, KL in 50 epochs, no dropout": ["zinb", "50", "0"],
    },
}
"""Fits of scvi-tools beside those of a variant: by its defaults (the weight of the KL reaches 1/2 in 200 epochs), and
with settings that suit the ELBO better."""
PEER_EPOCHS = 200
COLUMNS = ["model", "likelihood", "seed", "elbo", "iwae", "seconds", "wall", "peer_elbo", "peer_iwae"]


def parts(x: np.ndarray) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(x))
    return np.split(order, [int(share * len(order)) for share in SPLIT])


def of_pvae(x: np.ndarray, split: list[np.ndarray], overrides: list[str], seed: int) -> dict[str, float]:
    train, validation, test = (x[rows] for rows in split)
    data = Dataset.from_tensors(train, validation=validation, test=test)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        run = pvae.fit("cells", *overrides, data=data, seed=seed, run_dir=folder, device="cpu", progress=False)
        wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
        rows: Any = run.data.test.rows
        found = evidence(run.pair, rows, samples=1000)
    return {"elbo": found.elbo.value, "iwae": found.iwae.value, "seconds": cpu, "wall": wall}


def of_peer(python: str, x: np.ndarray, split: list[np.ndarray], settings: list[str], seed: int) -> dict[str, float]:
    """Return the figures of scvi-tools, fitted by another interpreter."""
    kind, *rest = settings
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.npz"
        train, validation, test = split
        np.savez(path, x=x, train=train, validation=validation, test=test)
        script = str(Path(__file__).with_name("cells_peer.py"))
        command = [python, "-W", "ignore", script, str(path), kind, str(seed), str(PEER_EPOCHS), *rest]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(x: np.ndarray, only: Sequence[str], seeds: int, epochs: int, peer: str | None) -> Iterator[dict[str, Any]]:
    split = parts(x)
    for seed in range(seeds):
        for likelihood in only:
            about = {"likelihood": likelihood, "seed": seed}
            found = of_pvae(x, split, [*VARIANTS[likelihood], f"train.epochs={epochs}"], seed)
            yield {"model": "pvae", **about, **found}
            for name, settings in PEERS.get(likelihood, {}).items() if peer else ():
                yield {"model": name, **about, **of_peer(peer or "", x, split, settings, seed)}


def main() -> None:
    import anndata

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--peer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=180)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", default="cells.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = anndata.read_h5ad(args.path).X
    x = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, np.float32)
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows(x, args.only, args.seeds, args.epochs, args.peer):
            table.writerow({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
