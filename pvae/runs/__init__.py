"""Files of a run: its directory, checkpoints, listing and exports."""
