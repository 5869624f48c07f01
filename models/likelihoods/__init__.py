"""Likelihoods p(x | z), a file for each close family."""
