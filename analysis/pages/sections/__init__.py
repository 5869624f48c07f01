"""Sections of a report in reading order: functions of an `Examination`; None if a section does not apply."""

from collections.abc import Callable, Mapping

from pvae.analysis.pages.document.blocks import PageSection
from pvae.analysis.pages.sections import (
    anatomy,
    appendix,
    codes,
    fit,
    guide,
    latents,
    probe,
    quality,
    reconstructions,
    samples,
    training,
    walks,
)
from pvae.analysis.pages.sections.examination import Examination

SECTIONS: Mapping[str, Callable[[Examination], PageSection | None]] = {
    "training": training.section,
    "fit": fit.section,
    "surgery": anatomy.section,
    "latents": latents.section,
    "codes": codes.section,
    "guide": guide.section,
    "samples": samples.section,
    "reconstructions": reconstructions.section,
    "traversals": walks.traversals,
    "interpolations": walks.interpolations,
    "sample quality": quality.section,
    "probe": probe.section,
    "declaration": appendix.declaration,
    "environment": appendix.environment,
    "left out": appendix.left_out,
}
"""Functions that compute the sections of a report, by name of the stage, in reading order."""
