"""Tables: CSV and Parquet files and data frames, and a first guess of their declaration."""
