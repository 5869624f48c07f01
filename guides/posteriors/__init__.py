"""Posteriors q(z | x), a file for each kind or close family; every module here is imported, so that kinds register."""

from pvae.component import load_members
from pvae.guides.posteriors.base import Posterior, PosteriorModule

load_members(__name__)
