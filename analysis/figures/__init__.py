"""Figures with their kind and error, and how they are printed."""
