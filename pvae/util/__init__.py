"""Helpers that know nothing of models: files, TOML, seeds, memory, progress, provenance."""
