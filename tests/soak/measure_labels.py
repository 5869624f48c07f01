"""Test errors of M2, and of M1 + M2, on MNIST with few labels (Kingma et al., 2014, https://arxiv.org/abs/1406.5298).

    python tests/soak/measure_labels.py TABLE.csv MNIST.npz [--labels 100 1000] [--seeds 3] [--only M2]

MNIST.npz has x_train, y_train, x_test, y_test. The first 50 000 training images are fitted, of which `data.labelled`
keep their label, the same for both methods: as many of each class, chosen by the seed. M2 is fitted to the images. M1
is a VAE without labels, fitted once; M2 is then fitted to the means of its codes, of the coordinates that it uses.
Nothing is chosen on the test images: the last weights count. `error` is that of q(y | x) given the intensities of test
images, in percent, `binarised` that given binary images drawn from them, which are what the fits see; `seconds` are of
the clock. Rows that a table has are not fitted again.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

import pvae
from pvae.experiment.experiment import Experiment
from pvae.training.evaluation import classified

SPLITS = {"train": [0, 50_000], "validation": [50_000, 60_000], "test": [60_000, 70_000]}
RESNET = {"network": {"kind": "resnet", "channels": 32, "blocks": 2}}
USED = 0.05
"""Smallest variance over training images of the mean of a coordinate that M1 uses."""


def gated(*widths: int) -> dict[str, Any]:
    return {"network": {"kind": "gated_mlp", "hidden": [*widths], "init": "he"}}


def plain(*widths: int) -> dict[str, Any]:
    return {"network": {"kind": "mlp", "hidden": [*widths]}}


def trained(epochs: int, lr: float, **more: Any) -> dict[str, Any]:
    schedule = {"optimizer": {"kind": "adam", "lr": lr}, "schedule": {"kind": "cosine"}, "keep": "last"}
    fast = {"precision": "bfloat16", "engine": "compiled"}
    return {"epochs": epochs, "validate_every": epochs, "checkpoint_seconds": 600.0, **schedule, **fast, **more}


def images(path: Path) -> dict[str, Any]:
    kept = {"scale": "unit", "binarize": "dynamic", "splits": SPLITS, "shape": [1, 28, 28]}
    return {"source": "npz", "path": str(path), "x": "x", "y": "y", **kept}


def m2(data: dict[str, Any], labels: int, seed: int, z: int, **more: Any) -> Experiment:
    inferred, decoder = {"kind": "normal", "given": ["x", "y"], **more.pop("inferred")}, more.pop("decoder")
    return Experiment.from_dict({
        "data": {**data, "labelled": labels, "label_seed": seed}, "seed": seed,
        "latents": {
            "y": {"codes": 10, "observed": "label", "prior": "uniform"},
            "z": {"dim": z, "posterior": inferred},
        },
        "decoder": {"given": ["y", "z"], **decoder}, **more,
    })  # fmt: skip


def of_images(path: Path, labels: int, seed: int) -> Experiment:
    """Return M2 of images, of few coordinates so that y is used, whose networks start large so that z is used."""
    train = trained(EPOCHS["M2"][labels], 3e-3, batch_size=200, labelled=0.25, average=0.995)
    both = gated(64, 128)
    more = {"encoder": RESNET, "objective": {"classification": 100.0}, "train": train}
    return m2(images(path), labels, seed, 5, decoder=both, inferred=both, **more)


def codes(path: Path, folder: Path, kept: Path) -> Path:
    """Return the archive `kept`, made unless it is there: codes of a VAE fitted to the images, with their labels.

    They are those of the intensities, which have less noise than binary images drawn from them.
    """
    if kept.exists():
        return kept
    warm = {"kind": "linear", "epochs": EPOCHS["M1"] / 4}
    plan = Experiment.from_dict({
        "data": images(path), "latents": {"z": {"dim": 50}}, "encoder": plain(500, 500), "decoder": plain(500, 500),
        "objective": {"beta": warm}, "train": trained(EPOCHS["M1"], 1e-3, batch_size=200),
    })  # fmt: skip
    run = pvae.fit(plan, run_dir=folder, device="cpu", progress=False)
    found: dict[str, Any] = {}
    used = None
    grey = pvae.data.load(plan.data.model_copy(update={"binarize": "none"}))
    for split in grey.splits:
        z = pvae.analysis.encode(run, split.x, mean=True)["z"]
        used = z.var(0) > USED if used is None else used
        found |= {f"x_{split.name}": z[:, used].numpy(), f"y_{split.name}": split.y.numpy()}  # type: ignore[union-attr]
    np.savez(kept, **found)
    return kept


def of_codes(path: Path, labels: int, seed: int) -> Experiment:
    """Return M2 of codes, whose networks start small: weights of He nearly double its error."""
    data = {"source": "npz", "path": str(path), "x": "x", "y": "y", "scale": "standardise"}
    train = trained(EPOCHS["M1 + M2"][labels], 1e-3, batch_size=200, labelled=0.25, average=0.995, precision="float32")
    more = {
        "encoder": plain(200),
        "objective": {"kind": "trace_mean_field_elbo", "classification": 20.0},
        "train": train,
    }
    more["decoder"] = {**plain(200, 200), "likelihood": {"kind": "normal", "scale": "per_datum", "value": 1.0}}
    return m2(data, labels, seed, 10, inferred=plain(200, 200), **more)


METHODS = {"M2": of_images, "M1 + M2": of_codes}
EPOCHS: Any = {"M1": 20, "M2": {100: 10, 1000: 8}, "M1 + M2": {100: 6, 1000: 6}}


def percent_wrong(run: pvae.Run, binarize: str) -> float:
    """Return the error, in percent, of q(y | x) on the test rows, their images binarised as asked."""
    source = run.experiment.source
    data = pvae.data.load(source.model_copy(update={"binarize": binarize}))
    ((probs, label),) = classified(run.experiment, run.pair, run.experiment.conditioned(data).test).values()
    return round(100 * float((probs.argmax(1) != label).double().mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", choices=EPOCHS["M2"], default=[*EPOCHS["M2"]])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--codes", type=Path, help="Archive of the codes of M1, made unless it is there.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Any] = pandas.read_csv(asked.table).to_dict("records") if asked.table.exists() else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = {"M2": asked.mnist.resolve()}
        if asked.only != "M2":
            source["M1 + M2"] = codes(source["M2"], folder, asked.codes or folder / "codes.npz")
        for method in [asked.only] if asked.only else METHODS:
            for labels in asked.labels:
                for seed in range(asked.seeds):
                    if any((r["method"], r["labels"], r["seed"]) == (method, labels, seed) for r in rows):
                        continue
                    start = time.monotonic()
                    plan = METHODS[method](source[method], labels, seed)
                    run = pvae.fit(plan, run_dir=folder, device="cpu", progress=False)
                    spent = round(time.monotonic() - start)
                    drawn = percent_wrong(run, "dynamic") if method == "M2" else None
                    row = {"method": method, "labels": labels, "seed": seed, "epochs": EPOCHS[method][labels]}
                    rows.append({**row, "error": percent_wrong(run, "none"), "binarised": drawn, "seconds": spent})
                    print(rows[-1], flush=True)
                    pandas.DataFrame(rows).to_csv(asked.table, index=False)
    print(pandas.DataFrame(rows).groupby(["method", "labels"])["error"].agg(["mean", "std"]).round(2).to_string())


if __name__ == "__main__":
    main()
