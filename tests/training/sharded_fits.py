"""Fits in shards, for as many processes as torchrun starts: what they leave, as JSON on standard output.

torchrun --standalone --nproc-per-node 2 -m tests.training.sharded_fits FOLDER [NAME ...]
"""

import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvae
from pvae import analysis
from pvae.data import streamed
from pvae.runs import checkpoint
from pvae.runs.run import Run
from pvae.util import group
from pvae.util.files import follows
from tests.discrete import pairs
from tests.training.pairs import Fragile
from tests.zoo_runs import declared

SYSTEMS: dict[str, tuple[str, ...]] = {
    "vae": ("train.optimizer.kind=adamw", "train.clip_norm=3.0", "train.average=0.9", "train.batch_size=97"),
    "iaf_posterior": ("objective={kind='iwae', particles=3}",),
    "hvae": ("objective.free_bits=0.1",),
    "conditional": ("train.patience=1", "analysis={every=1, rows=50}"),
    "vamp": (),
    "exemplar": (),
    "aggregated": (),
    "flow_dequantised": (),
    "bernoulli_vae": ("train.alternate=1",),
    "gumbel_softmax_vae": ("train.nonfinite=skip",),
    "vq_vae": ("latents.c.posterior.restart=0.5",),
    "rvq": ("latents.c.posterior.dropout=0.5",),
    "autoencoder": (),
    "em_mixture": (),
    "semi_supervised": ("data.labelled=100",),
    "gan": ("objective.critic_steps=2", "objective.r1=0.1", "train.clip_norm=1.0"),
}
"""Declarations by zoo name, each with overrides that reach something of its own."""
OWN_DATA = ("handwritten", "streamed", "slow disk")
ANALYSED = ("vae", "hvae")


def fitted(name: str, folder: Path) -> Run:
    """Return a fit of three epochs in four shards: of a zoo entry made tiny, or of a hand-written pair."""
    few = ["train.epochs=3", "train.shards=4"]
    if name in pairs.QUANTISERS:
        return pairs.fitted(pairs.small(pairs.QUANTISERS[name].latent).with_overrides(*few), folder)
    if name == "handwritten":
        x = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
        return pvae.fit(Fragile().pair(), *few, "train.batch_size=25", data=x, run_dir=folder, progress=False)
    if name == "slow disk":
        patch, write, slept = pytest.MonkeyPatch(), checkpoint.write, itertools.chain((0.0, 0.7), itertools.repeat(0.0))

        def slowly(*arguments: Any, **named: Any) -> Path:
            time.sleep(0.0 if follows() else next(slept))
            return write(*arguments, **named)

        patch.setattr(checkpoint, "write", slowly)
        patch.setattr(group, "STEP_SECONDS", 0.3)
        few += [] if follows() else ["train.checkpoint_seconds=0.001"]
        run = pvae.fit(declared("vae", *few), run_dir=folder, progress=False)
        patch.undo()
        return run
    if name == "streamed":
        patch = pytest.MonkeyPatch()
        patch.setattr(streamed, "BLOCK_BYTES", 7 * 4 * 64)
        patch.setattr(streamed, "WINDOW", 3)
        name = f"x{os.environ.get('RANK', 0)}.npz"  # a file of its own for each process
        grey = np.random.RandomState(0).randint(0, 256, (300, 8, 8)).astype(np.uint8)
        np.savez(folder / name, x=grey, years=grey.mean((1, 2)))
        few += [f"data={{source='npz', path='{name}', scale='unit', binarize='dynamic', stream=true}}"]
        few += ["covariates={age={dim=1, of='years'}}", "decoder.given=['z', 'age']"]
        run = pvae.fit(declared("vae", *few), run_dir=folder, data_dir=folder, progress=False)
        patch.undo()
        return run
    return pvae.fit(declared(name, *few, *SYSTEMS[name]), run_dir=folder, progress=False)


def left_by(run: Run) -> dict[str, Any]:
    """Return a digest of all tensors of the last checkpoint, and the metrics but for the time they took."""
    digest = hashlib.sha256()
    for part, tensors in sorted(run.checkpoint.tensors.items()):
        for name, value in sorted(tensors.items()):
            digest.update(f"{part} {name} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.files.metrics_rows()]
    return {"tensors": digest.hexdigest(), "metrics": rows}


def figures(run: Run) -> dict[str, Any]:
    """Return every number of a surgery, an evidence, a gap and a posterior of a run."""
    x, train = run.data.test.x, run.data.train.x
    with group.joined(x.device):
        found = {
            "surgery": analysis.surgery(run.pair, x, train=train, samples=2).to_dict(),
            "of_few": analysis.surgery(run.pair, train, components=20, seen=True).to_dict(),
            "evidence": analysis.evidence(run.pair, x, samples=40).to_dict(),
            "gap": analysis.gap(run.pair, x[:6], steps=2, samples=4, evidence_samples=6).to_dict(),
        }
        drawn = run.posterior(draws=3)
        found["posterior"] = {
            f"{name}/{key}": drawn[name][key].values.astype(float).ravel().tolist()
            for name in ("posterior", "sample_stats", "diagnostics")
            for key in drawn[name]
        }
    return found


def main() -> None:
    """Fit, and print what is left, in the first process; with several, also figures of the first fits."""
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    runs = {name: fitted(name, Path(folder)) for name in names or [*SYSTEMS, *OWN_DATA]}
    found: dict[str, Any] = {name: left_by(run) for name, run in runs.items()}
    found["figures"] = {name: figures(run) for name, run in runs.items() if name in ANALYSED}
    if not follows():
        print(json.dumps(found))


if __name__ == "__main__":
    main()
