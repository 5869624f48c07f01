"""Tiny run, and its model-guide pair, for the examples in docstrings."""

import tempfile
from functools import cache

import torch

import pvae
from pvae.pair.pair import Pair
from pvae.runs.run import Run

_folder = cache(tempfile.TemporaryDirectory)
"""Function that returns a temporary folder, which is removed when the process ends."""


@cache
def example_run() -> Run:
    """Return a run of a VAE with two latent coordinates, fitted for one epoch to 2000 rows of two labelled clusters.

    The run is stored in a temporary folder, and is fitted once per process.
    """
    y = torch.arange(2000) % 2
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) + 4 * y[:, None]
    parts = {"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": {"kind": "normal"}}}
    plan = pvae.Experiment.from_dict({**parts, "train": {"epochs": 1, "batch_size": 500}})
    data = pvae.Dataset.from_tensors(x, y, test=(x[:400], y[:400]))
    return pvae.fit(plan, data=data, run_dir=_folder().name, device="cpu", progress=False)


def example_pair() -> tuple[Pair, torch.Tensor]:
    """Return the model-guide pair of `example_run`, and its test rows `(n, 3)`."""
    run = example_run()
    return run.pair, run.data.test.x
