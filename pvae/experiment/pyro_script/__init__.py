"""Conversion of a declaration into a Pyro script.

Components that torch or Pyro provide are written out; others are constructed from their pvae classes. If a component
needs other components of the pair (a codebook, the model's prior) or training data, all of them come from the pair
that pvae builds. The statements of `model` and `guide` are written out in any case.
"""
