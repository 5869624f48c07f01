"""General helpers that do not depend on models: files, TOML, seeds, memory, progress bars, provenance."""
