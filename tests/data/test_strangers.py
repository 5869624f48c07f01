"""Files of strangers: read, with a remark, or refused by an error that names the file, what was expected and found."""

import re

import pytest

from tests.soak.strangers import STRANGERS, said

READ = {
    "medical.npz": "arrays that are not read: train_labels, val_labels, test_labels",
    "onehot.npz": "labels one-hot over 3 classes",
    "ink.npy": 'use scale = "raw"',
    "old.mat": "arrays that are not read: notes",
    "new.mat": r"32 \+ 4 \+ 4 rows of \[6, 5, 3\]",
    "cells.h5ad": "matrices that are not read: obsm/X_umap, raw/X",
    "null.csv": '"missing": "mask"',
    "prices.csv": "left out: price, numbers with a sign of a unit",
    "bank.parquet": "left out: c, list",
    "sprites": "1 of 12 images have transparent pixels",
    "scans": "README.txt .no image by its name., 11.tif .more than 8 bits",
}
"""Files that are read, and a remark on each; every other one is refused."""


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_what_is_said_of_a_strange_file(tmp_path, stranger):
    outcome, words = said(stranger, tmp_path)
    assert outcome == ("read" if stranger.name in READ else "refused"), words
    assert re.search(READ.get(stranger.name, rf"{stranger.name}[:,].*xpected .*; got .*\(exit 65\)"), words)
