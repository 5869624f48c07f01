"""Runs (fitted experiments) on the disk: their directories, checkpoints, listing and exports."""
