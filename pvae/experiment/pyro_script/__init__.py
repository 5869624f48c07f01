"""Conversion of a declaration into a plain Pyro script: networks, `model`, `guide`, and a loop of `SVI`."""
