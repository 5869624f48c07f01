"""Elements of a declared graphical model: its latent sites, the layout of data rows, the link of the two programs."""
