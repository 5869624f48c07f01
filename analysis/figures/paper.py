"""Tables for papers: figures of several runs or splits as CSV or LaTeX."""

import math
from collections.abc import Mapping
from typing import Any

import pandas

Found = Mapping[str, Mapping[str, Any]]


def _parts(figure: Any) -> tuple[float, float]:
    """Return value and standard error of a number, or of an estimate as a dict; NaN where there is none."""
    found = figure if isinstance(figure, Mapping) else {"value": figure}
    value, error = map(found.get, ("value", "standard_error"))
    return math.nan if value is None else float(value), math.nan if error is None else float(error)


def csv(found: Found) -> str:
    """Return figures as CSV: a row for each term, and columns of value and standard error for each run or split.

    Example:
        >>> print(csv({"test": {"elbo": {"value": -30.25, "standard_error": 0.02}, "n": 447}}))
        term,test,test error
        elbo,-30.25,0.02
        n,447.0,
        <BLANKLINE>
    """
    columns = {}
    for name, figures in found.items():
        parts = {term: _parts(figure) for term, figure in figures.items()}
        columns[name], columns[f"{name} error"] = ({term: part[i] for term, part in parts.items()} for i in (0, 1))
    return str(pandas.DataFrame(columns).to_csv(index_label="term"))


def latex(found: Found) -> str:
    r"""Return figures as a LaTeX table (package booktabs): a row for each term, a column for each run or split.

    Example:
        >>> print(latex({"test": {"marginal_kl": {"value": 0.5, "standard_error": 0.02}}}))
        \begin{tabular}{lr}
        \toprule
         & test \\
        \midrule
        marginal\_kl & $0.50 \pm 0.02$ \\
        \bottomrule
        \end{tabular}
        <BLANKLINE>
    """
    cells = {name: {term: _typeset(figure) for term, figure in figures.items()} for name, figures in found.items()}
    table = pandas.DataFrame(cells)
    style = table.fillna("--").style.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    return str(style.to_latex(hrules=True, column_format="l" + "r" * table.shape[1]))


def _typeset(figure: Any) -> str:
    value, error = _parts(figure)
    if not math.isfinite(value):
        return "--"
    return f"${value:.2f} \\pm {error:.2f}$" if error and math.isfinite(error) else f"${value:.2f}$"
