"""Posteriors q(z | x), a file for each kind or close family."""
