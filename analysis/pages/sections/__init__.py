"""Sections of a report in reading order: functions of an `Examination`; None if a section does not apply."""

from collections.abc import Callable, Mapping

from pvae.analysis.pages.document.blocks import PageSection
from pvae.analysis.pages.sections import fit, latents, samples
from pvae.analysis.pages.sections.examination import Examination

MADE = (
    fit.training, fit.fit, fit.surgery, latents.latents, latents.codes, fit.guide, fit.calibration, samples.samples,
    samples.reconstructions, samples.traversals, samples.interpolations, samples.sample_quality, latents.probe,
    fit.declaration, fit.environment, fit.left_out,
)  # fmt: skip
SECTIONS: Mapping[str, Callable[[Examination], PageSection | None]] = {f.__name__.replace("_", " "): f for f in MADE}
