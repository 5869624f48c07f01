"""The sections of a report, in reading order; each is a function of a `Case` that gives None where it means nothing."""

from collections.abc import Callable, Mapping

from pvae.analysis.pages.document.document import Section
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
from pvae.analysis.pages.sections.examination import Case

SECTIONS: Mapping[str, Callable[[Case], Section | None]] = {
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
"""By name; a new one is one function and one row."""
