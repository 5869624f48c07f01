"""Plots of one run as matplotlib axes, for notebooks and scripts: `run.plot`."""

from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import refuse
from pvae.analysis.pages.plots import base, columns, curves, pictures
from pvae.analysis.samples.encode import encode
from pvae.analysis.samples.running import known_name
from pvae.runs.run import Run
from pvae.util import Record, seeds


class RunPlots(Record):
    """Plots of a run; each method draws a new figure and returns the axes of its first panel.

    The whole is `axes.figure`, other panels `axes.figure.axes`; a notebook shows the figure.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> axes = example_run().plot.latents()
        >>> axes.get_xlabel()[:11]
        'direction 1'
    """

    run: Run

    def training(self) -> Axes:
        """Plot ELBO, KLs and beta over epochs; of a GAN the losses of both players."""
        rows, manifest = self.run.files.metrics_rows(), self.run.files.manifest
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if "critic_loss" in keys:
            return self._shown(curves.duel(rows), "training")
        total = "log joint" if "log_joint" in keys else "ELBO"
        latents = [key.removeprefix("kl/") for key in keys if key.startswith("kl/")]
        made = curves.training(rows, latents, str(manifest.get("figure", "elbo")), total)
        return self._shown(made, "training")

    def latents(self, latent: str | None = None, split: str = "test", *, rows: int = 2000, seed: int = 0) -> Axes:
        """Plot samples of q(z | x) of a real latent, by default the first, in two directions, over the prior.

        Raises:
            DataError: no latent consists of real numbers with samples of the prior.
        """
        part = self.run.data.split(split)
        chosen = seeds.subset(len(part), rows, seed)
        labels = None if part.labels is None else part.labels[chosen].cpu().numpy()
        found = encode(self.run, part.rows[chosen], seed=seed)
        planes = pictures.encoded(found, self.run.sample(1000, seed=seed), labels, part.label_names)
        refuse(not planes, "refused.no_plane", names=[*found.latents])
        return self._shown(planes[known_name(latent or [*planes][0], planes, "latents")], "latents")

    def surgery(self, split: str = "test", *, rows: int = 10_000, seed: int = 0, **options: Any) -> Axes:
        """Plot the decomposition of the ELBO of a split as a waterfall; options are those of `surgery`."""
        x = self.run.data.split(split).rows
        chosen = seeds.subset(len(x), rows, seed)
        return self._shown(surgery(self.run.pair, x[chosen], seed=seed, **options).figure(), "surgery")

    def samples(self, n: int = 64, *, seed: int = 0, **options: Any) -> Axes:
        """Plot means of p(x | z) at samples of the prior; of a table, and of a GAN, samples of x, beside data."""
        table, train = self.run.transforms, self.run.data.train
        data, is_mean = train.observed(train.rows[:1000]), not (table.columns or self.run.pair.implicit)
        x = self.run.sample(n, mean=is_mean, seed=seed, **options).x
        if table.columns:
            return self._shown(columns.beside(table.to_frame(data), table.to_frame(x)), "samples")
        seen = base.array(data)
        made = pictures.samples(base.array(x), seen, float(np.nanmin(seen)), float(np.nanmax(seen)))
        return self._shown(made, "samples")

    def _shown(self, made: Figure, what: str) -> Axes:
        """Return the first axes of a figure, which a notebook shows as the figure: it is none of pyplot's."""
        axes: Any = made.axes[0]
        axes._repr_html_ = lambda: base.pictured(made, f"{what} of {self.run.name}")
        return cast(Axes, axes)
