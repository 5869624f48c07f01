"""Data source of scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, final

import numpy as np

from pvae.data.rows.rows import Rows
from pvae.data.sources.base import Data


@final
class Digits(Data):
    """Handwritten digits of scikit-learn: 1797 images (1, 8, 8) with grey levels 0 to 16; needs no download."""

    source: Literal["digits"] = "digits"

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return rows (1797, 1, 8, 8); train [0, 1000), validation [1000, 1350), test [1350, 1797)."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        parts = {"train": range(1000), "validation": range(1000, 1350), "test": range(1350, 1797)}
        x, y = bunch.data.reshape(-1, 1, 8, 8).astype(np.uint8), bunch.target
        return Rows(x, y, parts, largest=16.0, label_names=tuple("0123456789"), name="digits")
