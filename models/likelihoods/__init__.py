"""Likelihoods p(x | h), a file for each close family; every module here is imported, so that kinds register."""

from pvae.component import load_members
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule, ReaderModule

load_members(__name__)
