"""Counts of cells: pvae's zoo entry `cells` beside scvi-tools on the same split, with the same sizes of networks.

    python tests/bench/cells.py smfish.h5ad [--seeds 3] [--out cells.csv] [--epochs 200]

The rows are split by `default_rng(0).permutation` into 80, 10 and 10 % (of 4530 cells 3624, 453 and 453). Both have 10
latents, one layer of 128, 200 epochs, batches of 128, and log p(x | sum of x): ELBO and IWAE (1000 samples) of the test
rows, nats per cell. Seconds are those of the processor, of the fit alone, in one thread. Where scvi-tools cannot be
imported, its row is the figure of an earlier measurement, of which the seconds were wall time beside other work.
"""

# A figure that may be None fails the script if it is.
# mypy: disable-error-code="union-attr"

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
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
MEASURED = {"negative binomial": (-74.00, 66.0), "zero-inflated": (-74.08, 66.0)}
"""ELBO and seconds of scvi-tools 1.4.2, one seed, measured on another day."""


def parts(adata: Any) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(adata))
    return np.split(order, [int(share * len(order)) for share in SPLIT])


def of_pvae(x: np.ndarray, split: list[np.ndarray], overrides: list[str], seed: int) -> dict[str, float]:
    train, validation, test = (x[rows] for rows in split)
    data = Dataset.from_tensors(train, validation=validation, test=test)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        run = pvae.fit("cells", *overrides, data=data, seed=seed, run_dir=folder, device="cpu", progress=False)
        seconds = time.process_time() - begin
        rows: Any = run.data.test.rows
        found = evidence(run.pair, rows, samples=1000)
    return {"elbo": found.elbo.value, "iwae": found.iwae.value, "seconds": seconds}


def of_scvi(adata: Any, split: list[np.ndarray], likelihood: str, seed: int, epochs: int) -> dict[str, float]:
    """Return the figures of scvi-tools: its ELBO of one sample, and its own importance-weighted bound."""
    import scvi  # type: ignore[import-not-found]

    scvi.settings.seed = seed
    train, validation, test = split
    scvi.model.SCVI.setup_anndata(adata)
    kind = {"negative binomial": "nb", "zero-inflated": "zinb"}[likelihood]
    model = scvi.model.SCVI(adata, n_latent=10, n_layers=1, n_hidden=128, gene_likelihood=kind)
    indices = [train, validation, test]
    begin = time.process_time()
    model.train(epochs, accelerator="cpu", batch_size=128, datasplitter_kwargs={"external_indexing": indices})
    seconds = time.process_time() - begin
    elbo = float(model.get_elbo(indices=test))
    iwae = float(model.get_marginal_ll(indices=test, n_mc_samples=1000))
    return {"elbo": -abs(elbo), "iwae": -abs(iwae), "seconds": seconds}


def rows(adata: Any, seeds: int, epochs: int) -> Iterator[dict[str, Any]]:
    x, split = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, np.float32), parts(adata)
    for likelihood, overrides in VARIANTS.items():
        for seed in range(seeds):
            found = of_pvae(x, split, [*overrides, f"train.epochs={epochs}"], seed)
            yield {"model": "pvae", "likelihood": likelihood, "seed": seed, **found}
            if likelihood in MEASURED and find_spec("scvi"):
                found = of_scvi(adata, split, likelihood, seed, epochs)
                yield {"model": "scvi-tools", "likelihood": likelihood, "seed": seed, **found}
    for likelihood, (elbo, seconds) in MEASURED.items() if not find_spec("scvi") else ():
        yield {"model": "scvi-tools, earlier", "likelihood": likelihood, "elbo": elbo, "seconds": seconds}


def main() -> None:
    import anndata

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", default="cells.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, ["model", "likelihood", "seed", "elbo", "iwae", "seconds"], lineterminator="\n")
        table.writeheader()
        for row in rows(anndata.read_h5ad(args.path), args.seeds, args.epochs):
            table.writerow({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
