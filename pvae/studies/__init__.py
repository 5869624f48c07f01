"""Studies: many declarations in one file, run in parallel processes, found again by digest, and compared."""

from pvae.studies.study import Study, states, study

__all__ = ["Study", "states", "study"]
