"""A declaration as a plain Pyro script: networks, `model`, `guide`, and a loop of `SVI`."""
