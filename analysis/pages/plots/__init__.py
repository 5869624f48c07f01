"""Plots: pure functions from numbers to matplotlib figures, without pyplot and global settings."""

from pvae.analysis.pages.plots.anatomy import WaterfallStep, inference_steps, waterfall, waterfall_steps
from pvae.analysis.pages.plots.bars import code_maps, code_use, units
from pvae.analysis.pages.plots.base import figure, nats, plain, png
from pvae.analysis.pages.plots.curves import duel, history, importance, khats, series, training
from pvae.analysis.pages.plots.latents import Cloud, class_name, groups, leading, marginals, plane
from pvae.analysis.pages.plots.pictures import Rebuilt, gallery, reconstructions, samples
from pvae.analysis.pages.plots.runs import differences, overlaid, rate_distortion, together
from pvae.analysis.pages.plots.sheets import encoded, interpolated, is_shown, reconstructed, sampled, traversed
from pvae.analysis.samples.sharpness import is_image

__all__ = [
    "Cloud", "Rebuilt", "WaterfallStep", "class_name", "code_maps", "code_use", "differences", "duel", "encoded",
    "figure", "gallery", "groups", "history", "importance", "inference_steps", "interpolated", "is_image", "is_shown",
    "khats", "leading", "marginals", "nats", "overlaid", "plain", "plane", "png", "rate_distortion", "reconstructed",
    "reconstructions", "sampled", "samples", "series", "together", "training", "traversed", "units", "waterfall",
    "waterfall_steps",
]  # fmt: skip
