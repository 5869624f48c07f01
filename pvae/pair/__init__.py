"""Model/guide pairs: two Pyro programs as one Module, with the layout, densities and ELBO terms of their traces."""
