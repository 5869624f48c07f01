"""Interval for the gain of a better prior on new data, from rows that neither encoder nor prior was fitted on."""
