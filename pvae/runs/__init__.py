"""Runs (fitted experiments) on the disk: their directories, checkpoints, listing and exports."""

from pvae.runs.rundir import RunDirectory, list_runs, state_of
