"""Tabular data: readers of CSV files, Parquet files and data frames, and the guess of a table's declaration."""
