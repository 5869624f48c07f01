"""Results, runs and studies as a notebook shows them, and `run.plot`."""

import base64
import io
import re
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from pvae.analysis import evidence, sample, surgery
from pvae.analysis.pages.plots.axes import RunPlots
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.studies.cases import Declared
from pvae.studies.study import Study
from pvae.util import progress
from tests.pages.test_explorer import people
from tests.zoo_runs import tiny_run


def pictures(view: str) -> list[np.ndarray]:
    """The pictures of a view, decoded; each has an alternative text."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]+)"', view)
    assert len(found) == view.count("<img")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L")) for content, _ in found]


@cache
def results() -> dict[str, Any]:
    run = tiny_run("vae")
    x = run.data.test.x
    images = sample(run, 12, mean=True)
    return {
        "run": run,
        "surgery": surgery(run.pair, x),
        "evidence": evidence(run.pair, x, samples=30),
        "samples": images,
    }


@pytest.mark.parametrize("name", ["run", "surgery", "evidence", "samples"])
def test_a_result_is_shown_with_its_picture(name: str) -> None:
    (drawn,) = pictures(results()[name]._repr_html_())
    assert drawn.std() > 5, "an empty picture"


def test_numbers_stand_below_the_picture() -> None:
    found = results()["surgery"]
    view = found._repr_html_()
    assert view.index("<img") < view.index("<table")
    assert f"{found.elbo.value:.4f}" in view


def test_samples_of_a_table_are_rows_in_its_words_and_escaped() -> None:
    view = people().sample(30, given={"batch": "a"})._repr_html_()
    assert pictures(view) == []
    assert view.count("<tr>") + view.count("<tr ") == 2 + 8
    assert "age &lt;i&gt;" in view
    assert "<u>" not in view


def test_a_run_without_metrics_has_no_picture(tmp_path: Any) -> None:
    run = Run(tiny_run("vae").files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.files), "metrics_rows", lambda *_: [])
        assert pictures(run._repr_html_()) == []


def test_a_study_shows_its_runs_and_what_failed(tmp_path: Any) -> None:
    run = tiny_run("vae")
    file = tmp_path / "tiny.toml"
    file.write_text(f"{run.experiment.to_toml()}\n[sweep]\nseeds = [0, 1]\n")
    failures = {("vae", 1, "fit"): "<script>out of memory</script>"}
    view = Study(Declared.load(file), {("vae", 0, "fit"): run.files}, failures)._repr_html_()
    assert len(pictures(view)) == 1
    assert "1 finished, 1 failed" in view
    assert "<script>" not in view
    empty = Study(Declared.load(file), {}, failures)._repr_html_()
    assert pictures(empty) == []
    assert "0 finished" in empty


PLOTS = {
    "training": lambda plot: plot.training(), "latents": lambda plot: plot.latents(),
    "surgery": lambda plot: plot.surgery(rows=40), "samples": lambda plot: plot.samples(9),
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("of", ["images", "table"])
def test_plots_are_axes_that_a_notebook_shows(name: str, of: str) -> None:
    plot = (tiny_run("vae") if of == "images" else people()).plot
    assert isinstance(plot, RunPlots)
    axes: Any = PLOTS[name](plot)
    assert isinstance(axes, Axes), type(axes)
    assert axes.has_data()
    show: Any = axes
    (drawn,) = pictures(show._repr_html_())
    assert drawn.std() > 5
    axes.set_title("my own")
    (again,) = pictures(show._repr_html_())
    assert again.shape == drawn.shape
    assert (again != drawn).any()


def test_plots_of_a_gan_and_refusals() -> None:
    gan = tiny_run("gan").plot
    assert gan.training().get_title("left").startswith("Losses")
    assert gan.samples(9).has_data()
    with pytest.raises(DataError, match="expected a latent of real numbers"):
        tiny_run("vq_vae").plot.latents()
    with pytest.raises(DeclarationError, match="expected one of z2, z1"):
        tiny_run("hvae").plot.latents("z3")


@pytest.mark.parametrize("widgets", [True, False])
def test_progress_in_a_notebook(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(progress, "find_spec", lambda name: ModuleSpec(name, None) if widgets else None)
    monkeypatch.setattr(progress, "EVERY_SECONDS", -1.0)
    with progress.ProgressBar(10, "fit") as bar:
        bar.update(4, "epoch 1")
        assert (bar.bar is not None) is widgets
        if bar.bar is not None:
            assert bar.bar.tasks[0].completed == 4
