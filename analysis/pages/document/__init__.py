"""A page as data, and the formats in which it is written."""
