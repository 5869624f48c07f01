"""Page of a search: its best trial, its history, and the importance of each searched value."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pvae.analysis.pages.document import blocks, document
from pvae.analysis.pages.document.words import alert, picture, section, table, text, tile
from pvae.analysis.pages.plots.base import BLUE, GREY, ORANGE, panels, plain, style, whole_numbers
from pvae.studies.search import Searching


def page_of(found: Searching) -> document.Document:
    """Return the page of a search: every trial, those of the best figures first, beside the values it was run with."""
    trials, search = found.history(), found.search
    numbers = {"search": search.model_dump(exclude={"storage"}), "trials": trials, "importance": found.importance()}
    identity = text("searched.identity", begun=len(trials), trials=search.trials, figure=search.figure)
    sections, footer = tuple(filter(None, [_trials(found)])), text("page.footer", seed=search.seed)
    about = str(found.base.get("description", ""))
    return document.Document("pvae study", found.name, about, identity, numbers, sections, footer)


@section("trials", "searched")
def _trials(found: Searching) -> Iterator[blocks.Part]:
    """Yield best trial, history, importances and all trials."""
    figure, paths, sign = found.search.figure, list(found.search.ends), found.search.sign
    unit = "bits" if figure == "bits_per_dimension" else "nats"
    rows = sorted(found.history(), key=lambda row: (row["value"] is None, -sign * (row["value"] or 0)))
    if done := [row for row in found.history() if row["value"] is not None]:
        trial, value = rows[0]["trial"], rows[0]["value"]
        values = ", ".join(f"{path} = {word}" for path, word in zip(paths, _words(rows[0], paths), strict=False))
        yield text("searched.best", trial=trial, figure=figure, value=value, unit=unit, values=values)
        yield tile("searched", figure=figure, value=value, unit=unit)
        yield picture("searched", drawn(done, sign, f"{figure}, {unit}", found.importance()), figure=figure, unit=unit)
    else:
        yield alert("searched.none")
    cells = [(row["trial"], row["value"], row["seconds"], *_words(row, paths)) for row in rows]
    yield table("searched", cells, figure, "seconds", *paths, figure=figure, unit=unit)


def _words(row: Mapping[str, Any], paths: Sequence[str]) -> Iterator[str]:
    """Yield the values of a trial, its state, and its run or error as texts."""
    for value in (row.get(path, "") for path in paths):
        yield f"{value:.4g}" if isinstance(value, float) else str(value)
    yield from (row["state"], row["run"].rpartition("/")[2] or row["error"])


@style()
def drawn(rows: Sequence[Mapping[str, float]], sign: int, label: str, weights: Mapping[str, float]) -> Figure:
    """Plot the figure of each trial with the best so far, and the importance of each value below."""
    made, (top, bottom) = panels(3 + 0.3 * len(weights), (3, 0.5 + 0.4 * len(weights)))
    numbers, values = [row["trial"] for row in rows], np.array([row["value"] for row in rows])
    top.plot(numbers, values, "o", color=GREY, label="trial")
    top.step(numbers, sign * np.maximum.accumulate(sign * values), where="post", color=BLUE, label="best so far")
    top.set(xlabel="trial", ylabel=label)
    whole_numbers(top.xaxis)
    top.legend(loc="best")
    bottom.barh([plain(path) for path in weights], list(weights.values()), color=ORANGE)
    bottom.invert_yaxis()  # the most important one first
    bottom.set(xlabel="importance (fANOVA)", xlim=(0, 1))
    return made
