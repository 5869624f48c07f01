"""Rows of a data source before they become tensors: arrays in memory or on the disk, table columns, transforms."""
