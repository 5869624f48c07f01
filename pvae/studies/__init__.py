"""Studies: one file that declares many fits, which run in parallel processes and whose results are compared."""

from pvae.studies.study import Study, states, study
