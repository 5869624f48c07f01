"""Fitting: the step, the loop, evaluation, alerts and their entry points."""
