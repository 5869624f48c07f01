"""Training objectives: losses computed from the ELBO terms of a model/guide pair."""
