"""Audit of an autoencoder that pvae did not fit: its latents, codes, information and reconstruction."""
