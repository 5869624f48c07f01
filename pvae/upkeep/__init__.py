"""Maintenance: check of the installation (doctor), check of a run's files (verify), removal of old files (clean)."""
