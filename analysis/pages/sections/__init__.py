"""Sections of a report in reading order: functions of an `Examination`; None if a section does not apply."""

from collections.abc import Callable, Mapping

from pvae.analysis.pages.document.blocks import PageSection
from pvae.analysis.pages.sections import fit, latents, run, samples
from pvae.analysis.pages.sections.examination import Examination

SECTIONS: Mapping[str, Callable[[Examination], PageSection | None]] = {
    "training": run.training,
    "fit": fit.fit,
    "surgery": fit.anatomy,
    "latents": latents.latents,
    "codes": latents.codes,
    "guide": fit.guide,
    "calibration": fit.calibration,
    "samples": samples.samples,
    "reconstructions": samples.reconstructions,
    "traversals": samples.traversals,
    "interpolations": samples.interpolations,
    "sample quality": samples.quality,
    "probe": latents.probe,
    "declaration": run.declaration,
    "environment": run.environment,
    "left out": run.left_out,
}
"""Functions that compute the sections of a report, by name of the stage, in reading order."""
