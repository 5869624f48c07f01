"""Plots: pure functions from numbers to matplotlib figures, without pyplot and global settings."""
