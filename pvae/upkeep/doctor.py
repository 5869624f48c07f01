"""Command `doctor`: checks of the installation and the machine, with one line of advice for each problem."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pvae.upkeep import arithmetic, machine, packages
from pvae.upkeep.packages import CheckArguments
from pvae.util.checks import Check, Checks, attempt

CHECKS: dict[str, Callable[[CheckArguments], Iterable[Check]]] = {
    "python": packages.python,
    "packages": packages.packages,
    "torch": packages.torch,
    "devices": machine.devices,
    "threads": machine.threads,
    "pyro": packages.pyro,
    "compiler": machine.compiler,
    "run_dir": machine.run_dir,
    "lock": machine.lock,
    "space": machine.space,
    "cache": machine.cache,
    "home": machine.home,
    "temporary": machine.temporary,
    "data": machine.data,
    "extras": packages.extras,
    "variables": packages.variables,
    "elbo": arithmetic.elbo,
    "determinism": arithmetic.determinism,
    "plots": packages.plots,
    "arviz": packages.arviz,
}
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
    with ThreadPoolExecutor(1) as pool:
        imports = pool.submit(packages.import_in_child)  # takes longest, so it starts first and is read last
        given = CheckArguments(Path(run_dir), Path(data_dir) if data_dir else None, imports)
        found = [check for name, ask in CHECKS.items() for check in attempt(name, partial(ask, given))]
    return Checks("doctor", tuple(found), {"python": platform.python_version(), "platform": platform.platform()})
