"""Conversion of a declaration into a Pyro script.

Components that torch or Pyro provide are written out; others are constructed from their pvae classes. If a component
needs other components of the pair (a codebook, the model's prior) or training data, all of them come from the pair
that pvae builds. The statements of `model` and `guide` are written out in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.experiment.pyro_script.page import ELBOS
from pvae.experiment.pyro_script.parts import NotPlainError
from pvae.experiment.pyro_script.programs import PairScript, PlainScript

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment


def pyro_script(experiment: Experiment, x: Shape) -> str:
    """Return the source of a Python script that fits a declaration in Pyro, for data of event shape `x`.

    Raises:
        DeclarationError: the objective is not an ELBO that `pyro.infer.SVI` can minimise.
    """
    objective: Any = experiment.objective
    if objective.kind not in ELBOS or objective.free_bits:
        free = f" with free_bits = {objective.free_bits:g}" if objective.free_bits else ""
        raise DeclarationError(
            f"objective: expected {' or '.join(ELBOS)}, without free bits, for a script that runs pyro.infer.SVI; got "
            f"{objective.kind}{free}. Fit this declaration with pvae fit."
        )
    pair = experiment.build(x)
    try:
        return PlainScript(experiment, pair).text()
    except NotPlainError:
        return PairScript(experiment, pair).text()
