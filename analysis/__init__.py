"""What a fitted pair says: surgery of its ELBO, evidence, gaps, collapse, report; for any Pyro pair.

Functions bear the names of their modules, so they are bound here, eagerly: the import system would otherwise
put a module in a function's place as soon as somebody imports it.
"""

from pvae.analysis.aggregated import AggregatedPosterior
from pvae.analysis.ais import Annealed, Bracket, ais, bracket
from pvae.analysis.anatomy import LatentSurgery, Surgery
from pvae.analysis.collapse import Collapse, collapse
from pvae.analysis.estimate import Estimate
from pvae.analysis.evidence import Evidence, PriorEvidence, evidence, prior_evidence
from pvae.analysis.gain import Gain, gain
from pvae.analysis.gap import Gap, gap
from pvae.analysis.groups import Posterior
from pvae.analysis.posterior import posterior
from pvae.analysis.report import report
from pvae.analysis.selfcheck import SelfCheck, selfcheck
from pvae.analysis.surgery import surgery

__all__ = [
    "AggregatedPosterior",
    "Annealed",
    "Bracket",
    "Collapse",
    "Estimate",
    "Evidence",
    "Gain",
    "Gap",
    "LatentSurgery",
    "Posterior",
    "PriorEvidence",
    "SelfCheck",
    "Surgery",
    "ais",
    "bracket",
    "collapse",
    "evidence",
    "gain",
    "gap",
    "posterior",
    "prior_evidence",
    "report",
    "selfcheck",
    "surgery",
]
