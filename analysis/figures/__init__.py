"""Estimates with their errors and kind (exact, bound, estimate), and the base class of results made of them."""
