"""Data sources: each module defines the declaration and the reader of one source, or of a few similar ones."""

from pvae.component import load_members

load_members(__name__)
