"""A declaration as a Pyro script.

Parts that torch or Pyro have are written out; others that stand alone are built by name from their classes in pvae.
Where a part reads the other side of the pair (a codebook, the model's prior, training data), all parts come from the
pair that pvae builds. The statements of `model` and `guide` are written out in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.experiment.pyro_script.page import ELBOS
from pvae.experiment.pyro_script.pair import PairScript
from pvae.experiment.pyro_script.plain import NotPlainError, PlainScript

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment


def pyro_script(experiment: Experiment, x: Shape) -> str:
    """Return a declaration as a Python script for Pyro, for data of event shape `x`.

    Raises:
        DeclarationError: the objective is no ELBO that `pyro.infer.SVI` minimises.
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
