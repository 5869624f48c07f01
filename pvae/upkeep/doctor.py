"""Command `doctor`: checks of the installation and the machine, with one line of advice for each problem.

Imports only the standard library; each check imports the packages it needs, so that a failing import fails the check.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pvae.errors import near, text
from pvae.upkeep import machine
from pvae.upkeep.machine import CheckArguments, pip
from pvae.util.checks import Check, Checks, attempt
from pvae.util.provenance import installed_version

if TYPE_CHECKING:
    from torch import Tensor

EXTRA_MODULES = {
    "parquet": "pyarrow", "cells": "anndata", "onnx": "onnx", "tensorboard": "tensorboardX", "mlflow": "mlflow",
    "cluster": "submitit", "search": "optuna",
}  # fmt: skip
"""Importable module of each optional extra of pvae."""
KNOWN_VARIABLES = ("PVAE_RUN_DIR", "PVAE_DATA_DIR", "PVAE_OFFLINE")
ARVIZ_REQUIREMENT = "arviz>=0.23.4,!=1.0.*,!=1.1.*,<2"
ELBO_ROUNDING_NATS = 1e-9
"""Largest accepted error (nats, float64) of the ELBO of the check."""


def python(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if Python turns warnings into errors, or if its output encoding is not UTF-8."""
    text, encoding, advice = f"{platform.python_version()} on {platform.platform()}", sys.stdout.encoding, ""
    if "error" in sys.warnoptions:
        text, advice = f"{text}, warnings are errors", "Leave out -W error and PYTHONWARNINGS."
    elif encoding and encoding.lower().replace("-", "") not in ("utf8", "utf8sig"):
        text, advice = f"{text}, output in {encoding}", "Set PYTHONUTF8=1 or LANG=C.UTF-8 to see names as they are."
    yield Check.judged("python", "warning", text, advice)


def packages(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if a package that pvae requires is not installed."""
    needed = [line for line in requires("pvae-pyro") or [] if "extra ==" not in line]
    found = {name: installed_version(name) for name in (re.split(r"[^A-Za-z0-9._-]", line)[0] for line in needed)}
    missing = [name for name, there in found.items() if there is None]
    text = f"{', '.join(missing)} missing" if missing else f"all {len(found)} that pvae requires"
    yield Check.judged("packages", "failed", text, "pip install -U pvae-pyro" if missing else "", found)


def torch(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if torch is too old; an import error is raised."""
    import torch

    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10)
    advice = "Install torch 2.10 or newer." if old else ""
    yield Check.judged("torch", "failed", f"{torch.__version__}, built for {built}", advice, facts)


def pyro(_: CheckArguments) -> Iterator[Check]:
    """Yield a check with Pyro's version; an import error is raised."""
    import pyro

    yield Check("pyro", "ok", pyro.__version__, facts={"version": pyro.__version__})


def extras(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that lists the optional extras that are installed."""
    there = {extra: find_spec(module) is not None for extra, module in EXTRA_MODULES.items()}
    names = [name for name, found in there.items() if found]
    yield Check("extras", "ok", f"{', '.join(names) or 'none'} of {', '.join(there)}", facts=there)


def variables(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns about environment variables that begin with PVAE_ and are unknown."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("PVAE_")}
    text = ", ".join(f"{name}={value}" for name, value in found.items()) or "none is set"
    unknown = ", ".join(f"{name}{near(name, KNOWN_VARIABLES)}" for name in found if name not in KNOWN_VARIABLES)
    yield Check.judged("variables", "warning", text, f"pvae does not know {unknown}." if unknown else "", found)


def elbo(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if the ELBO of a linear Gaussian model differs from its exact value.

    The guide is the true posterior, so that every sample of the ELBO is log p(x).
    """
    from numpy.random import default_rng

    from pvae.analysis.truths.linear import linear_vae
    from pvae.training.evaluation import evaluate

    truth = linear_vae(default_rng(0).standard_normal((64, 2)), 1)
    found, exact = evaluate(truth.pair.adopt(truth.x), truth.x, 0, closed=())["elbo"], truth.exact["elbo"]
    right = abs(found - exact) <= ELBO_ROUNDING_NATS
    advice = "" if right else "Trust no figure of this installation: see pvae selfcheck, and install torch anew."
    yield Check.judged("elbo", "failed", f"{found:.9f} nats per datum; exactly {exact:.9f}", advice)


def determinism(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if the same seed gives different gradients."""
    first, second = _gradients(), _gradients()
    text, advice = "same seed, same bits of the loss and all gradients (eager, on the CPU)", ""
    if not first.equal(second):
        text = f"same seed, gradients that differ by up to {float((first - second).abs().max()):.1e}"
        advice = "Runs are not resumed bit for bit here: set OMP_NUM_THREADS=1, and look again."
    yield Check.judged("determinism", "failed", text, advice)


def _gradients() -> Tensor:
    """Return loss and gradients of a small VAE with fixed seeds, as one vector; the global random state is restored."""
    import torch

    from pvae.experiment.experiment import Experiment
    from pvae.objectives.base import Loss
    from pvae.util import seeds

    experiment = Experiment.from_dict({"latents": {"z": {"dim": 4}}})
    pair = experiment.build((16, 16))
    parameters = list(pair.parameters())
    with torch.random.fork_rng(devices=[]):
        seeds.set_noise(0, torch.device("cpu"))
        x = torch.rand(128, 16, 16).round()
        loss = Loss(experiment.objective, pair, len(x))(x)[0]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients if g is not None)])


def plots(_: CheckArguments) -> Iterator[Check]:
    """Yield a check with matplotlib's version, without which no report can be drawn; an import error is raised."""
    import matplotlib.pyplot

    yield Check("plots", "ok", matplotlib.__version__, facts={"version": matplotlib.__version__})


def arviz(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that warns if ArviZ cannot be imported or has an unsupported version."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what it announces on its first import of the day
            import arviz
    except Exception as problem:  # of any class: versions that do not fit each other clash
        found = f"import arviz: {type(problem).__name__}: {problem}; Posterior.to_arviz will not work"
        advice = text("upkeep.doctor.import_failed", kind=type(problem).__name__, install=pip(ARVIZ_REQUIREMENT))
        yield Check("arviz", "warning", found, advice)
        return
    found = str(arviz.__version__)
    generation = "xarray.DataTree" if int(found.partition(".")[0]) >= 1 else "arviz.InferenceData"
    old = found.startswith(("1.0", "1.1"))
    told = f"{found}, which pvae does not work with" if old else f"{found} ({generation})"
    facts = {"version": found, "generation": generation}
    yield Check.judged("arviz", "warning", told, pip(ARVIZ_REQUIREMENT) if old else "", facts)


CHECKS: dict[str, Callable[[CheckArguments], Iterable[Check]]] = {
    ask.__name__: ask
    for ask in (
        python, packages, torch, machine.devices, machine.threads, machine.precision, pyro, machine.compiler,
        machine.run_dir, machine.space, machine.cache, machine.temporary, machine.data, extras, variables,
        elbo, determinism, plots, arviz,
    )
}  # fmt: skip
"""All checks by name, in the order of the report; `data` yields one for each data source, `data.<source>`."""


def doctor(run_dir: str | Path = "runs", data_dir: str | Path | None = None) -> Checks:
    """Return the results of all checks of the installation and the machine; leaves no files and downloads nothing.

    A check that raises an error counts as failed. All checks together take seconds.

    Arguments:
        run_dir: folder in which runs will be kept.
        data_dir: folder in which data files are looked for first.

    Returns:
        Results of the checks, with the names in `CHECKS`.
    """
    given = CheckArguments(Path(run_dir), Path(data_dir) if data_dir else None)
    found = [check for name, ask in CHECKS.items() for check in attempt(name, partial(ask, given))]
    return Checks("doctor", tuple(found), {"python": platform.python_version(), "platform": platform.platform()})
