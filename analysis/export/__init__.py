"""Posterior draws as labelled arrays for ArviZ and files."""
