"""Sections of a report in reading order: functions of an `Examination`; None if a section does not apply."""

from pvae.analysis.pages.sections import fit, glance, latents, samples

SECTIONS = {made.__name__.replace("_", " "): made for made in (
    fit.training, fit.fit, fit.surgery, latents.latents, latents.codes, latents.labels, fit.guide, fit.calibration,
    samples.samples, samples.least_probable, samples.reconstructions, samples.traversals, samples.interpolations,
    samples.sample_quality, latents.probe, latents.groups, glance.glance, fit.declaration, fit.environment,
    fit.left_out,
)}  # fmt: skip
