"""Rows as a source gives them: arrays in memory or on the disk, their columns, their transforms."""
