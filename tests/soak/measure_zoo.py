"""Table with one row for each system of the zoo: fitted small to Fashion-MNIST, in at most two minutes of one core.

    python tests/soak/measure_zoo.py analysis/results/zoo.csv analysis/results/zoo [NAME...]

Each system keeps its prior, posterior, likelihood and objective; it is given Fashion-MNIST (10 000 training images) in
place of its own small data, and few epochs; `declared` says what else changes. The row has the ELBO surgery of 2000
test images in nats per image (bits per dimension where images have grey levels), and the accuracy of a classifier
between samples and test images (0.5 is chance). The folder gets one picture of samples for each system. A system that
has a row is not fitted again, so that the command goes on where it stopped. The figures compare systems fitted alike
for a short time; longer fits stand in `published.csv` and `tokens.csv`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image

import pvae
from pvae.analysis import sample, surgery, two_sample
from pvae.analysis.pages.plots.pictures import tiles
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from pvae.util import toml

TRAIN, TEST, DRAWS = 10_000, 2_000, 1_000
EPOCHS = {"aggregated": 3, "em_mixture": 4, "flow_dequantised": 5, "flow_variational": 4, "gan": 20, "kmeans": 5,
          "semi_supervised": 4}  # fmt: skip
TERMS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl", "log_joint")
WORDS = ["t-shirt top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def smaller(value: Any) -> Any:
    """Return part of a declaration with narrower residual networks; all else as it was."""
    if isinstance(value, list):
        return [smaller(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: smaller(item) for key, item in value.items()}
    return found | {"channels": 16, "blocks": 1} if found.get("kind") == "resnet" else found


def declared(name: str) -> Experiment:
    """Return a system of the zoo for Fashion-MNIST, in few epochs; a flow on the plane keeps its own data."""
    plan = smaller(toml.read(zoo.FOLDER / f"{name}.toml"))
    plan["name"] = f"zoo_{name}"
    grids = "resnet" in str(plan.get("encoder"))
    epochs = EPOCHS.get(name, 3 if grids else 12)
    plan["train"] |= {"epochs": epochs, "engine": "eager", "validate_every": max(epochs // 4, 1)}
    if plan["data"]["source"] == "toy":
        return Experiment.from_dict(plan).with_overrides("train.epochs=12")
    plan["data"] |= {"source": "fashion_mnist", "splits": {"train": [0, TRAIN]}}
    if "labelled" in plan["data"]:
        plan["data"]["labelled"] = 1000
    if "words" in plan.get("covariates", {}):
        plan["covariates"]["words"]["words"] = WORDS
    for latent in plan["latents"].values():
        if "grid" in latent and grids:
            latent["grid"] = [4, 4] if latent["grid"] == [2, 2] else [7, 7]
        if isinstance(latent.get("temperature"), dict):
            latent["temperature"]["epochs"] = epochs * 2 / 3
        if latent.get("posterior", {}).get("kind") == "dequantised":
            latent["dim"] = 784
    likelihood = plan["decoder"]["likelihood"]
    if "levels" in likelihood:
        likelihood["levels"] = 256
    beta = plan.get("objective", {}).get("beta")
    if isinstance(beta, dict):
        beta["epochs"] = epochs / 4
    if "refit" in plan:
        plan["refit"]["train"] |= {"epochs": 3}
    return Experiment.from_dict(plan)


def measured(run: Run, name: str) -> dict[str, object]:
    """Return the table row of a run."""
    test, plan = run.data.test, run.experiment
    row: dict[str, object] = {
        "system": name, "data": run.data.source, "likelihood": plan.decoder.likelihood.kind,
        "epochs": plan.train.epochs, "parameters": sum(p.numel() for p in run.pair.parameters()),
    }  # fmt: skip
    try:
        found = surgery(run.pair, test.rows[:TEST])
    except pvae.PvaeError as error:
        print(f"{name}: {error}", flush=True)
    else:
        for term in TERMS:
            figure = getattr(found, term)
            if figure is not None:
                row |= {term: figure.value}
        row["elbo_error"] = found.total.data_error if hasattr(found.total, "data_error") else None
        bits = found.bits_per_dimension
        row["bits_per_dimension"] = None if bits is None else bits.value
    drawn = sample(run, DRAWS)
    row["told_apart"] = two_sample(test.observed(test.rows[:DRAWS]), drawn.x).accuracy.value
    return row


def picture(run: Run) -> Image.Image:
    """Return 60 samples as one small picture: means of p(x | z), or points of the plane."""
    x = sample(run, 60 if len(run.shape) == 3 else 2000, mean=True).x.numpy()
    if len(run.shape) == 3:
        low, high = run.data.train.observed(run.data.train.rows[:1000]).aminmax()
        sheet = tiles(x, 12, float(low), float(high)).mean(-1)
    else:
        counts = np.histogram2d(x[:, 1], x[:, 0], bins=90, range=[[-4, 4], [-4, 4]])[0]
        sheet = 1 - np.kron(np.minimum(counts / 4, 1), np.ones((3, 3)))[::-1]
    return Image.fromarray((255 * sheet).astype(np.uint8)).quantize(16)


def main() -> None:
    """Fit, measure and draw the systems that have no row in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.pictures.mkdir(exist_ok=True)
    rows: list[Any] = pandas.read_csv(asked.out).to_dict("records") if asked.out.exists() else []
    for name in asked.names or zoo.names():
        if any(row["system"] == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            run = pvae.fit(declared(name), run_dir=folder, device="cpu", progress=False)
            seconds = time.process_time() - begun
            rows.append(measured(run, name) | {"seconds": round(seconds)})
            picture(run).save(asked.pictures / f"{name}.png", optimize=True)
        pandas.DataFrame(rows).sort_values("system").round(4).to_csv(asked.out, index=False)
        print(pandas.DataFrame(rows[-1:]).T.to_string(), flush=True)


if __name__ == "__main__":
    main()
