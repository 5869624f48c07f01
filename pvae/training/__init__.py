"""Fitting by SVI: optimisation step, training loop, evaluation, alerts; entry points `fit`, `resume` and `refit`."""
