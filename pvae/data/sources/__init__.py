"""Data sources: each declaration beside its reader."""
