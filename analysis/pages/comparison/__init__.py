"""Comparison of several runs on the same data: their measurements, and the sections of its page."""
