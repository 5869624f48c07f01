"""Aggregated posterior q_agg of a pair on data: its components, its density, and the first steps of an analysis."""
