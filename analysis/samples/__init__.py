"""Samples, reconstructions and traversals, and tests of their quality."""
