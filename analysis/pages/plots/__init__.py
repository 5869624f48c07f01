"""Plots: pure functions from numbers to matplotlib figures, without pyplot and global settings."""

from pvae.analysis.pages.plots.anatomy import WaterfallStep, inference_steps, reach, waterfall, waterfall_steps
from pvae.analysis.pages.plots.base import MetricsRow, figure, nats, plain, png, set_caption, style
from pvae.analysis.pages.plots.codes import code_maps, code_use
from pvae.analysis.pages.plots.curves import duel, history, series, training
from pvae.analysis.pages.plots.latents import Cloud, class_name, groups, leading, marginals, plane
from pvae.analysis.pages.plots.pictures import Rebuilt, gallery, reconstructions, samples, tiles
from pvae.analysis.pages.plots.points import rate_distortion
from pvae.analysis.pages.plots.runs import differences, overlaid, together
from pvae.analysis.pages.plots.sheets import encoded, interpolated, is_shown, reconstructed, sampled, traversed
from pvae.analysis.pages.plots.trust import importance, khats
from pvae.analysis.pages.plots.units import units
from pvae.analysis.samples.sharpness import is_image

__all__ = [
    "Cloud",
    "Rebuilt",
    "MetricsRow",
    "WaterfallStep",
    "class_name",
    "code_maps",
    "code_use",
    "differences",
    "duel",
    "encoded",
    "figure",
    "gallery",
    "groups",
    "history",
    "importance",
    "inference_steps",
    "interpolated",
    "is_image",
    "is_shown",
    "khats",
    "leading",
    "marginals",
    "nats",
    "overlaid",
    "plain",
    "plane",
    "png",
    "rate_distortion",
    "reach",
    "reconstructed",
    "reconstructions",
    "sampled",
    "samples",
    "series",
    "set_caption",
    "style",
    "tiles",
    "together",
    "training",
    "traversed",
    "units",
    "waterfall",
    "waterfall_steps",
]
