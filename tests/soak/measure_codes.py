"""Table with one row per run with discrete codes: ELBO in nats and bits per dimension, code usage, sample quality.

    python tests/soak/measure_codes.py OUT.csv RUN... [--rows 10000] [--pictures FOLDER]
    python tests/soak/measure_codes.py OUT.csv --study analysis/studies/codes.toml [--rows 2000]

A second-stage run, whose prior was fitted to the codes of a first run, is compared with this first run, whose prior is
uniform and gives every image the same KL. Values are nats per datum unless their names give another unit. Samples are
means of p(x | codes) with codes sampled from the prior, as many as there are rows; their quality is measured for
second-stage runs only.

With a study its cases are fitted here, one after the other in one process, and measured without samples: a row has the
label and the seed of its case, and the seconds of the processor. Cases that the table has are not fitted again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

import pvae
from pvae import Run
from pvae.analysis import surgery
from pvae.analysis.pages.plots import base, pictures
from pvae.analysis.samples.encode import reconstruct
from pvae.analysis.samples.quality import sample_quality
from pvae.analysis.samples.sample import sample
from pvae.pair.code_usage import code_usage
from pvae.studies.cases import Declared
from pvae.studies.sweep import FIRST
from pvae.util.seeds import subset


def row_of(run: Run, first: Run | None, rows: int, *, samples: bool) -> dict[str, object]:
    """Return the table row of a run: ELBO surgery, code usage, the KL of its first-stage run, and sample quality.

    The KL is included if `first`, the first-stage run, is given, sample quality if `samples` is true.
    """
    row: dict[str, object] = {"run": run.name, "epochs": run.status["epoch"], "fit_seconds": run.status["seconds"]}
    for name in ("train", "test"):
        x = run.data.split(name).x
        x = x[subset(len(x), rows, 0)]
        found = surgery(run.pair, x, population=None)
        row |= {f"{name}_{term}": getattr(found, term).value for term in ("elbo", "reconstruction", "kl")}
        bits = found.bits_per_dimension
        row[f"{name}_bits_per_dim"] = None if bits is None else bits.value
    row |= {f"test_kl_{latent}": level.kl.value for latent, level in found.latents.items()}  # now those of test
    row["test_error"] = found.total.standard_error
    if first is not None:
        before = surgery(first.pair, x, population=None)
        bits = before.bits_per_dimension
        row |= {"first_seconds": first.status["seconds"], "uniform_kl": before.kl.value}
        row["uniform_bits_per_dim"] = None if bits is None else bits.value
    row |= code_usage(run.pair, x)
    if samples:
        f = sample_quality(run, "test", rows, mean=True).fidelity
        relative = f.relative_confidence
        shares = [share.value for share in f.shares.values()]
        row |= {"relative_confidence": None if relative is None else relative.value}
        row |= {"least_share": min(shares), "largest_share": max(shares)} if shares else {}
        row |= {"precision": f.precision.value, "recall": f.recall.value, "coverage": f.coverage.value}
    return row


def first_of(run: Run, root: str) -> Run | None:
    """Return the first stage of a run; None if it is one itself."""
    parent = (run.files.manifest.get("parent") or {}).get("run")
    return None if parent is None else Run.load(parent, root=root)


def study(name: str, out: Path, rows: int, root: str, picture: Path | None = None) -> None:
    """Fit the cases of a study whose rows the table has not, and add a row of each to it.

    `picture` is the folder of an image of test data, their reconstructions and samples of each case, as means.
    """
    torch.set_num_threads(1)
    table: list[Any] = pandas.read_csv(out).to_dict("records") if out.exists() else []
    for case in (case for case in Declared.load(name).cases if case.stage == FIRST):
        if any((row["case"], row["seed"]) == (case.label, case.seed) for row in table):
            continue
        cpu = time.process_time()
        run = pvae.fit(case.experiment, run_dir=root, progress=False)
        spent, first = time.process_time() - cpu, first_of(run, root)
        row = {"case": case.label, "seed": case.seed, "cpu_seconds": round(spent, 1)}
        table.append(row | row_of(run, first, rows, samples=False))
        pandas.DataFrame(table).round(4).to_csv(out, index=False)
        print(pandas.DataFrame(table[-1:]).T.to_string(), flush=True)
    if picture:
        runs = {row["case"]: Run.load(row["run"], root=root) for row in table}
        x = next(iter(runs.values())).data.test.x
        x = x[:: len(x) // 10][:10]  # neighbours may overlap
        images = {"data": x.numpy()}
        for label, run in runs.items():
            images[f"{label}, reconstructed"] = reconstruct(run, x).x.numpy()
            images[f"{label}, samples"] = sample(run, 10, mean=True).x.numpy()
        figure = pictures.gallery(np.stack([*images.values()]), 0.0, 1.0, [*images])
        (picture / f"{Path(name).stem}.png").write_bytes(base.png(figure))


def main() -> None:
    """Measure the given runs, write the table, and with `--pictures` also an image of samples of second-stage runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--study")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pictures", type=Path)
    asked = parser.parse_args()
    if asked.study:
        study(asked.study, asked.out, asked.rows, asked.root, asked.pictures)
    table = []
    for name in asked.runs:
        run = Run.load(name, root=asked.root)
        first = first_of(run, asked.root)
        table.append(row_of(run, first, asked.rows, samples=first is not None))
        pandas.DataFrame(table).round(4).to_csv(asked.out, index=False)
        print(pandas.DataFrame(table[-1:]).T.to_string(), flush=True)
        if asked.pictures and first is not None:
            figure = pictures.sampled(sample(run, 40, mean=True), run.data.train.data[:1000].double().numpy())
            assert figure is not None  # noqa: S101 - these data are images
            (asked.pictures / f"{run.experiment.name}.png").write_bytes(base.png(figure))


if __name__ == "__main__":
    main()
