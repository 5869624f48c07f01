"""Distributions that Pyro lacks: codes, relaxed codes, deterministic values, batches of exponential families."""

from pvae.distributions.base import Batched, Determined, Event, FactoredNormal, Rounded, UnitNormal, lattice, unwrapped
from pvae.distributions.bijections import Bijection, near_identity
from pvae.distributions.codes import MAX_STATES, Certain, bits, code_grid
from pvae.distributions.exact import ExactPoisson, ExactStudentT, doubled, has_gamma, log_density
from pvae.distributions.exponential import FullRankNormals, Members, Mixture, Normals
from pvae.distributions.exponential_codes import IMPOSSIBLE, ROW_COST, CertainCodes, Codes, Product, product
from pvae.distributions.relaxed import KL, Coordinates, Discretised, LogOneHot, RelaxedCodes, is_relaxed, twin
