"""Model/guide pairs: two Pyro programs as one Module, with the layout, densities and ELBO terms of their traces."""

from pvae.pair.code_usage import SILENT, Tally, Undrawn, codebook_of, in_use, perplexity, revival, silence, tallies
from pvae.pair.densities import Unweighed, certainty, full_size, is_masked, log_prob, members, rows_first, sum_over
from pvae.pair.dependencies import Dependencies
from pvae.pair.enumeration import JointStates, eliminated, read_joint_states
from pvae.pair.layout import Layout, SiteShape, is_point, samples, site_shape, unwrapped
from pvae.pair.pair import CHECKED_ROWS, Pair
from pvae.pair.pathwise import Estimator
from pvae.pair.problems import ProgramError, require_bound
from pvae.pair.running import PARTICLES, evaluating, quiet, tiled
from pvae.pair.structure import ROWS_OF_A_BATCH, PairData, is_code, numbers_of
from pvae.pair.terms import Terms, terms_of
