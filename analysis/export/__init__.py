"""Posterior samples as labelled arrays for ArviZ and NetCDF files."""
