"""What knows nothing of models: files, TOML, seeds, memory, progress, provenance."""
