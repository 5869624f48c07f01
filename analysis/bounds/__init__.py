"""Bounds and estimates of log p(x): importance sampling, annealing, the gaps of inference."""
