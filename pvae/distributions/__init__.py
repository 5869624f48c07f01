"""Distributions that Pyro lacks: codes, relaxed codes, deterministic values, batches of exponential families."""

from pvae.distributions.base import Batched, Determined, Event, FactoredNormal, Rounded, UnitNormal, lattice, unwrapped
from pvae.distributions.bijections import Bijection, near_identity
from pvae.distributions.codes import MAX_STATES, Certain, bits, code_grid
from pvae.distributions.exact import ExactPoisson, ExactStudentT, doubled, has_gamma, log_density
from pvae.distributions.exponential import FullRankNormals, Members, Mixture, Normals
from pvae.distributions.exponential_codes import IMPOSSIBLE, ROW_COST, CertainCodes, Codes, Product, product
from pvae.distributions.relaxed import KL, Coordinates, Discretised, LogOneHot, RelaxedCodes, is_relaxed, twin

__all__ = [
    "Batched", "Bijection", "Certain", "CertainCodes", "Codes", "Determined", "Discretised", "Event", "ExactPoisson",
    "ExactStudentT", "FactoredNormal", "Coordinates", "FullRankNormals", "IMPOSSIBLE", "KL", "LogOneHot",
    "MAX_STATES", "Members", "Mixture", "Normals", "Product", "ROW_COST", "RelaxedCodes", "Rounded",
    "UnitNormal", "bits", "code_grid", "doubled", "has_gamma", "is_relaxed", "lattice",
    "log_density", "near_identity", "product", "twin", "unwrapped",
]  # fmt: skip
