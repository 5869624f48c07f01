"""Distributions that Pyro lacks: codes, relaxed codes, determined values, exponential families."""
