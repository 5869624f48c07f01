"""The data sources: a file for each source, or for a few close ones, its declaration beside its reader."""

from pvae.component import load_members

load_members(__name__)
