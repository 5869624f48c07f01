"""Priors p(z), a file for each kind or close family."""
