"""Tiny runs of every zoo entry, and their reports, made once: one worker runs all tests that share them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

import pvae
from pvae.analysis import report
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run

FOLDER = TemporaryDirectory(prefix="pvae-zoo-")
FEW_ROWS = {
    "digits": ["data.splits.train=[0, 200]", "data.splits.validation=[1000, 1060]", "data.splits.test=[1350, 1410]"],
    "toy": ["data.rows=200"],
}
SMALL: dict[str, int] = {"blocks": 1, "layers": 2, "width": 8, "heads": 2, "components": 8, "critic_steps": 1}


def shrunken(value: Any, *, in_latents: bool = False) -> Any:
    """A declaration with small networks, few layers, components and codes; everything else as it was."""
    if isinstance(value, list):
        return [shrunken(item, in_latents=in_latents) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if key == "hidden":
            item = [16] * min(len(item), 1)
        elif key == "channels" and item is not None:
            item = 4 if isinstance(item, int) else [4] * len(item)
        elif key == "codes" and in_latents and isinstance(item, int):
            item = min(item, 16)
        elif isinstance(item, int) and key in SMALL:
            item = min(item, SMALL[key])
        found[key] = shrunken(item, in_latents=in_latents or key == "latents")
    return found


def declared(name: str, *overrides: str) -> Experiment:
    """A zoo entry made tiny."""
    whole = Experiment.load(name)
    small = Experiment.from_dict(shrunken(whole.model_dump(mode="json", exclude_none=True)))
    second = [] if whole.refit is None else ["refit.train.epochs=2", "refit.train.engine=eager"]
    few = FEW_ROWS[str(whole.data.source)]  # type: ignore[attr-defined]
    return small.with_overrides(*few, *second, "train.engine=eager", "train.schedule=constant", *overrides)


def fit(name: str, folder: Path, epochs: int) -> Run:
    return pvae.fit(declared(name, f"train.epochs={epochs}"), run_dir=folder, progress=False)


@cache
def tiny_run(name: str) -> Run:
    """An entry fitted for two epochs. Tests leave it as it is."""
    return fit(name, Path(FOLDER.name), 2)


LAID_OUT = {"vae", "vae_normal", "hvae", "vq_vae", "gan"}
"""Entries whose pictures are laid out, which takes a third of the time of a report; those of the others are drawn."""
LAY_OUT = ConstrainedLayoutEngine.execute


@contextmanager
def hasty(*, laid_out: bool = True) -> Iterator[None]:
    """Reports in which every section is made after a moment's work; other tests hold the worth of their figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", LAY_OUT if laid_out else lambda *_: None)
        patch.setattr(import_module("pvae.analysis.samples.features"), "EXPOSURES", 400)
        patch.setattr(import_module("pvae.analysis.samples.probe"), "LINEAR_STEPS", 20)
        patch.setattr(import_module("pvae.analysis.pages.plots.clouds"), "MARGINALS", 2)
        patch.setattr(import_module("pvae.analysis.pages.sections.fit"), "REFINED_ROWS", 3)
        patch.setattr(import_module("pvae.analysis.pages.sections.examination"), "MODEL_SAMPLES", 200)
        yield


def brief(run: Run, *, laid_out: bool = True, **options: Any) -> Path:
    """A report after a moment's work."""
    with hasty(laid_out=laid_out):
        return report(run, **{"samples": 2, "evidence_samples": 30, "gap_steps": 3} | options)


@cache
def tiny_report(name: str) -> Path:
    """The page of an entry. Tests leave it as it is."""
    return brief(tiny_run(name), laid_out=name in LAID_OUT)
