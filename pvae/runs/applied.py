"""Methods of a fitted run that take rows of any data: codes, scores, reconstructions, imputations; and its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pvae
from pvae.data.split import Split

if TYPE_CHECKING:
    from pvae.analysis import Encoding, Imputations, Reconstructions, Samples, Scores


class Applied:
    """Base class of `Run`: its methods that take data, any that `Run.rows` reads, or a `Split` such as `run.data.test`.

    The results keep the id, number, split and label of every row: see `to_frame` and `save`. Rows of a table are given
    in its units and words. Data are read block by block, and every block has noise of its own.
    """

    def encode(self, data: Any, **options: Any) -> Encoding:
        """Encode rows of data into latents; see `pvae.analysis.encode` for the options `mean`, `seed`, `on_progress`.

        Example:
            >>> from pvae.analysis.truths.example import example_run
            >>> run = example_run()
            >>> codes = run.encode(run.data.test, mean=True)
            >>> list(codes.to_frame().columns)
            ['split', 'label', 'z0', 'z1', 'log_q_z', 'loc_z0', 'loc_z1', 'scale_z0', 'scale_z1']
        """
        return self._applied(pvae.analysis.encode, data, options)

    def reconstruct(self, data: Any, **options: Any) -> Reconstructions:
        """Encode rows of data and decode them again; see `pvae.analysis.reconstruct` for the options."""
        return self._applied(pvae.analysis.reconstruct, data, options)

    def score(self, data: Any, **options: Any) -> Scores:
        """Score rows of data: log p(x), its error, elements, p-value; see `pvae.analysis.score` for the options."""
        return self._applied(pvae.analysis.score, data, options)

    def impute(self, data: Any, **options: Any) -> Imputations:
        """Fill in missing elements of rows of data; see `pvae.analysis.impute` for the options, such as `mask`."""
        return self._applied(pvae.analysis.impute, data, options)

    def sample(self, n: int = 64, **options: Any) -> Samples:
        """Sample n data from the model; see `pvae.analysis.sample` for the options `given`, `mean`, `seed`."""
        from pvae.analysis.export.rows import Origin  # here, because analysis imports pvae.runs

        run: Any = self
        return replace(pvae.analysis.sample(run, n, **options), origin=Origin(table=run.transforms))

    def _applied(self, make: Callable[..., Any], data: Any, options: dict[str, Any]) -> Any:  # noqa: ANN401
        from pvae.analysis.samples.running import RowBlocks

        run: Any = self
        return RowBlocks(make, run, data if isinstance(data, Split) else run.rows(data), **options).whole()
