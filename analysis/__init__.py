"""Analyses of a fitted pair: surgery of its ELBO, evidence, gaps, collapse, samples, report; for any Pyro pair.

The names are bound eagerly: some functions have the name of a folder or module, which the import system would
otherwise put in their place.
"""

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.audits.audit import Audit, audit
from pvae.analysis.bounds.ais import Annealed, Bracket, ais, bracket
from pvae.analysis.bounds.calibration import Calibration, calibration
from pvae.analysis.bounds.evidence import evidence, prior_evidence
from pvae.analysis.bounds.gap import Gap, gap
from pvae.analysis.bounds.gradients import Gradients, gradients
from pvae.analysis.bounds.rate_distortion import RateDistortion, rate_distortion
from pvae.analysis.bounds.weights import Evidence, PriorEvidence
from pvae.analysis.decompose.collapse import Collapse, collapse
from pvae.analysis.decompose.result import LatentSurgery, Surgery
from pvae.analysis.decompose.surgery import Gain, gain, surgery
from pvae.analysis.export.datasets import PosteriorDraws as Posterior
from pvae.analysis.export.posterior import posterior
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.comparison.comparison import Paired, elbos, paired
from pvae.analysis.pages.explorer import explore
from pvae.analysis.pages.report import compare, report
from pvae.analysis.samples.copying import Copying, copying, data_copying
from pvae.analysis.samples.critic import CriticKL, critic
from pvae.analysis.samples.distances import Distances, distances, frechet, kernel_distance
from pvae.analysis.samples.encode import Encoding, LatentCode as Code, Reconstructions, encode, reconstruct
from pvae.analysis.samples.features import Features, features, sharpness
from pvae.analysis.samples.fidelity import Fidelity, fidelity
from pvae.analysis.samples.impute import Imputations, impute
from pvae.analysis.samples.probe import Probe, probe
from pvae.analysis.samples.quality import SampleQuality, TwoSample, sample_quality, two_sample
from pvae.analysis.samples.sample import Samples, sample
from pvae.analysis.samples.score import Scores, score
from pvae.analysis.samples.traversal import Interpolation, Traversal, interpolate, traverse
from pvae.analysis.truths.selfcheck import SelfCheck, selfcheck

__all__ = [
    "AggregatedPosterior", "Annealed", "Audit", "Bracket", "Calibration", "Code", "Collapse", "Copying", "CriticKL",
    "Distances", "Encoding", "Estimate", "Evidence", "Features", "Fidelity", "Gain", "Gap", "Gradients", "Imputations",
    "Interpolation", "LatentSurgery", "Paired", "Posterior", "PriorEvidence", "Probe", "RateDistortion",
    "Reconstructions", "SampleQuality", "Samples", "Scores", "SelfCheck", "Surgery", "Traversal", "TwoSample", "ais",
    "audit", "bracket", "calibration", "collapse", "compare", "copying", "critic", "data_copying", "distances",
    "elbos", "encode", "evidence", "explore", "features", "fidelity", "frechet", "gain", "gap", "gradients", "impute",
    "interpolate", "kernel_distance", "paired", "posterior", "prior_evidence", "probe", "rate_distortion",
    "reconstruct", "report", "sample", "sample_quality", "score", "selfcheck", "sharpness", "surgery", "traverse",
    "two_sample",
]  # fmt: skip
