"""ELBO surgery: every term of the decomposition of a mean ELBO."""
