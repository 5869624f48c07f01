"""Check of the installation and the machine, with one line of advice for each problem."""

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
"""All checks in the order of the report; `data` gives one for each source, `data.<source>`."""


def doctor(run_dir: str | Path = "runs", data_dir: str | Path | None = None) -> Checks:
    """Check everything that pvae needs of a machine; nothing is left behind or downloaded.

    A check that raises any error is a failed check. It takes seconds.

    Arguments:
        run_dir: folder in which runs are to be kept.
        data_dir: folder to look for data in first.

    Returns:
        Checks by the stable names of `CHECKS`.
    """
    with ThreadPoolExecutor(1) as pool:
        imports = pool.submit(packages.import_in_child)  # takes longest, so it starts first and is read last
        given = CheckArguments(Path(run_dir), Path(data_dir) if data_dir else None, imports)
        found = [check for name, ask in CHECKS.items() for check in attempt(name, partial(ask, given))]
    return Checks("doctor", tuple(found), {"python": platform.python_version(), "platform": platform.platform()})
