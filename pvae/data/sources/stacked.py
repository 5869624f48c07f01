"""Data source of the codes of an earlier run, on which a second model is stacked, as M1 + M2.

References: Semi-supervised learning with deep generative models (Kingma et al., 2014), https://arxiv.org/abs/1406.5298
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import model_validator
from safetensors.torch import save

from pvae.data.rows import cache, files, prepare
from pvae.data.rows.rows import Rows, partition
from pvae.data.sources.base import Data
from pvae.errors import misdeclared, refuse
from pvae.util import digest, replace

if TYPE_CHECKING:
    from pvae.data.split import Split
    from pvae.runs.run import Run


class StackedCodes(Data):
    """Codes of an earlier run for the rows of its splits, with their labels, ids, and values beside x.

    They are computed once and cached. The fingerprint is that of the run's weights and data. New data are such as the
    earlier run takes, which encodes them first.

    References: Semi-supervised learning with deep generative models (Kingma et al., 2014),
    https://arxiv.org/abs/1406.5298
    """

    source: Literal["codes"] = "codes"
    run: str
    """Folder of the run; a relative path is looked for in the data folder, then in the working directory."""
    latent: str | None = None
    """Name of the latent; it need not be given if the run has only one."""
    sample: bool = False
    """Use one sample of q(z | x) for every row in place of its mean (of a discrete latent, its mode)."""
    scale: prepare.Scale = "raw"

    @model_validator(mode="after")
    def _splits_of_the_run(self) -> Self:
        refuse(self.splits.declared, f"splits of the run, which the codes keep; got {self.splits.declared}", ValueError)
        return self

    def first(self, data_dir: Path | None) -> Run:
        """Return the run whose codes are the data.

        Raises:
            DataError: its data were passed in Python. DeclarationError: there is no such run.
        """
        from pvae.runs.run import Run  # here, because runs import pvae.data

        run = Run.load(files.candidate(self.run, data_dir, Path.is_dir), data_dir=data_dir)
        refuse(run.lacks_data, f"{self.run}: expected a run of declared data; got one of data passed in Python.")
        return run

    def codes(self, first: Run, split: Split, seed: int = 0) -> np.typing.NDArray[Any]:
        """Return the codes of rows of the run's data, `(n, *event)`; raises DeclarationError without such a latent."""
        found = first.encode(split, mean=not self.sample, seed=seed)
        misdeclared(not self.latent and len(found.latents) > 1, "data.sources.latent", names=[*found.latents])
        x = np.asarray(found[self.latent or next(iter(found.latents))].numpy())
        return x if x.ndim > 1 else x[:, None]

    def over(self, rows: Rows, x: np.typing.NDArray[Any], **more: Any) -> Rows:
        """Return rows of the run's data with codes `x` in place of their values."""
        return replace(rows, x=x, largest=None, table={}, features=None, masked=False, name="codes", **more)

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        from pvae.runs.weights import chosen

        first = self.first(data_dir)
        data = first.experiment.data
        with files.confined(first.foreign):
            rows = data.with_side(self.side).read(data_dir, first.plan.seed)
        parts, of = partition(data.splits.declared, rows), first.files.manifest.get("data", {}).get("fingerprint")
        weights = digest(save(chosen(first.checkpoint)))
        key = {"source": "codes", "of": of, "weights": weights, "latent": self.latent, "sample": self.sample}

        def encode(writer: cache.Writer) -> None:
            for number, split in enumerate(first.data.splits):
                writer.append(split.name, self.codes(first, split, number))

        found = cache.decoded(key, encode).arrays
        x = np.zeros((len(rows.x), *found["train"].shape[1:]), found["train"].dtype)
        for name, part in parts.items():
            x[part] = found[name][:]
        return self.over(rows, x, parts=parts, made_of=digest(repr(key).encode()))
