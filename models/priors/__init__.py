"""Priors p(z), a file for each close family; every module of this folder is imported, so that kinds register."""

from pvae.component import load_members
from pvae.models.priors.base import Prior

load_members(__name__)
