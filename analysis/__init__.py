"""What a fitted pair says: surgery of its ELBO, evidence, collapse, report; for any Pyro pair."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvae.analysis.aggregated import AggregatedPosterior
    from pvae.analysis.collapse import Collapse, collapse
    from pvae.analysis.estimate import Estimate
    from pvae.analysis.evidence import Evidence, evidence
    from pvae.analysis.report import report
    from pvae.analysis.surgery import Surgery, surgery

_HOMES = {
    "AggregatedPosterior": "aggregated",
    "Collapse": "collapse",
    "Estimate": "estimate",
    "Evidence": "evidence",
    "Surgery": "surgery",
    "collapse": "collapse",
    "evidence": "evidence",
    "report": "report",
    "surgery": "surgery",
}
__all__ = [
    "AggregatedPosterior",
    "Collapse",
    "Estimate",
    "Evidence",
    "Surgery",
    "collapse",
    "evidence",
    "report",
    "surgery",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it lives; a function wins over the module of the same name."""
    if name in _HOMES:
        value = getattr(import_module(f"pvae.analysis.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pvae.analysis' has no attribute {name!r}")
