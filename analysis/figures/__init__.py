"""Estimates with their kind and errors, and results made of them."""
