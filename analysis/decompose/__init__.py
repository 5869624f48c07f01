"""ELBO surgery: the aggregated posterior and every term of the decomposition."""
