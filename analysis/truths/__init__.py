"""Test models whose ELBO terms and evidence are known exactly, and checks of the estimators against them."""
