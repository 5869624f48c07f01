"""A model/guide pair: two Pyro programs as one module, and all that their traces say."""
