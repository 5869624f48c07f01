"""Generative models p(x, z): priors, decoders, likelihoods and the Pyro model of a declared graph."""
