"""Declarations of experiments: reading and writing TOML, rules, formulas, and the Pyro pair that one builds."""
