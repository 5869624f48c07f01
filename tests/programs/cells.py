"""Cells of the table of programs: works, or the reason for which an analysis is refused."""

from tests.programs.table import COLUMNS, PROGRAMS

WORKS = "works"
REASONS = {
    "log joint": "a Delta on a continuous latent: the surgery's total is named a log joint at the point, no ELBO",
    "given points": "global latents are points: the evidence is that of the data given them",
    "points": r"expected posterior densities; got a point for",
    "globals": r"expected latents of single data only; got global",
    "summed out": r"summed out exactly, so there is no gap",
    "no normal": r"expected a guide whose \S+ is built on a normal",
    "rows": r"parameters for each of \d+ rows",
    "no plate": r"expected x to be observed inside a plate over the rows of a batch; got no such plate",
    "nothing to fit": r"expected at least one parameter to learn; got none",
    "no run": "there is no run, as it is not fitted",
}
"""Reasons by their name in the table; those of refusals are the words of the error."""
NO_REFUSAL = ("log joint", "given points", "no run")
"""Reasons that only say what a figure is, or that there is nothing to ask."""

GLOBAL = {"gap": "globals"}
SUMMED = {"gap": "summed out"}
DISCRETE = {"gap": "no normal"}
ROWS = {"fit": "rows", "posterior": "no run", "report": "no run"}
POINTS = {"surgery": "log joint", "evidence": "given points"}

CELLS: dict[str, dict[str, str]] = {
    "relaxed one-hot VAE": DISCRETE,
    "EasyGuide": DISCRETE,
    "pyroVED jiVAE": DISCRETE,
    "pyroVED ssiVAE": DISCRETE,
    "SS-VAE, some labels": DISCRETE,
    "SS-VAE M2, summed": DISCRETE,
    "SS-VAE M2, drawn": DISCRETE,
    "HMM, ragged": SUMMED,
    "HMM, plate of tones": SUMMED,
    "capture-recapture": SUMMED,
    "AIR": DISCRETE,
    "mixture, AutoDelta": {**GLOBAL, **POINTS},
    "mixture, parameters": SUMMED,
    "mixture, enumerated guide": DISCRETE,
    "mixture, AutoNormal": GLOBAL,
    "LDA": GLOBAL,
    "LDA of counts": DISCRETE,
    "Poisson factorisation": GLOBAL,
    "deep exponential family": GLOBAL,
    **{name: GLOBAL for name in PROGRAMS if name.startswith("regression")},
    "regression, AutoDelta": {**GLOBAL, **POINTS},
    "regression, AutoLaplace": {**GLOBAL, **POINTS},
    "regression, Laplace at its mode": {**GLOBAL, "fit": "nothing to fit", "posterior": "no run", "report": "no run"},
    "regression, list with Delta": {**GLOBAL, **POINTS},
    "rows, AutoNormal": ROWS,
    "rows, AutoDiagonalNormal": {**GLOBAL, **ROWS},
    "rows, AutoDelta": {"surgery": "log joint", "evidence": "points", "gap": "no normal", **ROWS},
    "declared full size": GLOBAL,
    "global and local": GLOBAL,
    "eight schools": {**GLOBAL, **ROWS},
    "baseball": GLOBAL,
    "plates beside and inside": GLOBAL,
    "Bayesian network": GLOBAL,
    "coin": GLOBAL,
    "coin, a site per toss": {
        **dict.fromkeys(("check", "fit", "surgery", "evidence", "gap"), "no plate"),
        **dict.fromkeys(("posterior", "report"), "no run"),
    },
    "reparametrised effects": {**GLOBAL, **ROWS},
    "Dirichlet process mixture": {**GLOBAL, **ROWS},
    "HMM, AutoDelta": {**GLOBAL, **POINTS},
    "codes in a plate": DISCRETE,
    "Gaussian HMM": GLOBAL,
    "hierarchical messenger": {**GLOBAL, **ROWS},
}
"""Cells that are not plainly `works`, by program and column."""


def cell(name: str, column: str) -> str:
    """The cell of a column of a program."""
    return CELLS.get(name, {}).get(column, WORKS)


def refusal(name: str, column: str) -> str | None:
    """The words with which an analysis of a program is refused; None where it works."""
    found = cell(name, column)
    return None if found == WORKS or found in NO_REFUSAL else REASONS[found]


def written() -> str:
    """The table in Markdown, as `tests/README.md` holds it."""
    lines = ["| program | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in PROGRAMS:
        lines.append(f"| {name} | " + " | ".join(cell(name, column) for column in COLUMNS) + " |")
    reasons = [
        f"- {name}: {what.replace(chr(92) + 'S+', 'z').replace(chr(92) + 'd+', 'n')}" for name, what in REASONS.items()
    ]
    return "\n".join([*lines, "", *reasons])
