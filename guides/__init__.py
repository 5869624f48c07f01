"""Guides q(z | x): encoders, posteriors and the Pyro guide of a declared graph."""
