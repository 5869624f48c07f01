"""Declare a latent-variable model as a small graph; fit it by SVI; see where every nat of its ELBO goes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvae import analysis as analysis, data as data, guides as guides, models as models
    from pvae.data import Dataset as Dataset
    from pvae.errors import DataError as DataError, DeclarationError as DeclarationError, PvaeError as PvaeError
    from pvae.experiment.experiment import Experiment as Experiment
    from pvae.pair.pair import Pair as Pair
    from pvae.runs.run import Run as Run
    from pvae.studies.study import Study as Study, study as study
    from pvae.training.fit import fit as fit
    from pvae.training.resume import refit as refit, resume as resume
    from pvae.upkeep.clean import clean as clean
    from pvae.upkeep.verify import verify as verify

__version__ = "0.2.0"

_NAMES = {
    "data": ("Dataset",), "errors": ("DataError", "DeclarationError", "PvaeError"),
    "experiment.experiment": ("Experiment",), "pair.pair": ("Pair",), "runs.run": ("Run",),
    "studies.study": ("Study", "study"), "training.fit": ("fit",), "training.resume": ("refit", "resume"),
    "upkeep.clean": ("clean",), "upkeep.verify": ("verify",),
}  # fmt: skip
_HOMES = {name: f"pvae.{home}" for home, names in _NAMES.items() for name in names}
_ROOMS = ("analysis", "data", "guides", "models")


def __getattr__(name: str) -> Any:
    """Import a public name where it lives, on first use: `import pvae` alone stays cheap."""
    if name == "__all__":
        return sorted([*_HOMES, *_ROOMS])
    if name in _ROOMS:
        return import_module(f"pvae.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_ROOMS])
