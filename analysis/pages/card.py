"""Model card of a run: a Markdown file that says what the model is, how it was fitted, and how it is loaded."""

import re
from contextlib import suppress
from typing import Any

from markupsafe import Markup

from pvae.analysis.pages.document import document
from pvae.errors import PvaeError, printable
from pvae.experiment import experiment, readback
from pvae.runs.run import Run
from pvae.util import read_object


def escaped(value: Any) -> Any:
    r"""Return text on one line, with the signs of Markdown, HTML and formulas escaped; other values unchanged.

    Example:
        >>> print(escaped("<b>a|b</b>"))
        \<b\>a\|b\</b\>
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", re.sub(r"\s+", " ", printable(value))))


def card(run: Run) -> str:
    """Return the model card of a run as Markdown, with front matter in YAML, in which the license is left open.

    It holds formulas, data with their fingerprint and columns, the declaration, the last metrics of every split, and
    alerts; and, if the run has a report, its figures with their errors. Texts from outside are escaped.

    Raises:
        DataError, CheckpointError: files of the run are damaged.
    """
    there, rows = (run.path / "report" / document.NUMBERS).is_file(), {}
    numbers = read_object(run.path / "report", document.NUMBERS, document.NUMBERS_BYTES) if there else {}
    with suppress(PvaeError):  # the data may be elsewhere
        rows = {split: len(run.data.split(split)) for split in ("train", "validation", "test")}
    known = readback.described(run.plan, run.shape, run.pair) if isinstance(run.plan, experiment.Experiment) else {}
    last = {str(row["split"]): row for row in run.files.metrics_rows()}
    template = document.engine().overlay(finalize=escaped, keep_trailing_newline=True).get_template("card.md.j2")
    return template.render(run=run, known=known, numbers=numbers, last=last, rows=rows, block=block)


def block(text: str) -> Markup:
    """Return text as a block of code of Markdown."""
    return Markup("\n".join(f"    {line}" for line in printable(text).splitlines()))
