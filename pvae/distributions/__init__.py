"""Distributions that Pyro lacks: codes, relaxed codes, deterministic values, batches of exponential families."""
