"""Bounds and estimates of log p(x): importance sampling, annealed importance sampling, and inference gaps."""
