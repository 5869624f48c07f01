"""Elements of a declared graph: its sites, the rows of data, and the link between model and guide."""
