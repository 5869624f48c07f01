"""The catalogue of words: every entry is used, and every call gives the fields that its texts ask for."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError, meta, nodes

from pvae.analysis.bounds.gap import Gap
from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.decompose.collapse import CodeUse, LatentCollapse
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.pages.document import words
from pvae.analysis.pages.sections.examination import ChosenRows, Examination
from pvae.analysis.pages.sections.latents import Holes
from pvae.analysis.samples.copying import Copying
from pvae.analysis.samples.distances import Distances
from pvae.analysis.samples.fidelity import Fidelity
from pvae.analysis.samples.probe import Probe, Reading
from pvae.analysis.samples.quality import TwoSample

PAGES = Path(__file__).parents[2] / "analysis" / "pages"
TEXTS = {
    "text": ("",), "alert": ("",), "section": ("title", "lead"), "picture": ("alt", "caption"),
    "table": ("table", "columns", "words"), "tile": ("what", "figure", "unit"),
}  # fmt: skip
TEXTS |= {"_by_run": TEXTS["table"], "table_of": TEXTS["table"]}
"""Texts of an entry that a call of each function fills in."""
OPTIONAL = {"lead", "columns", "words"}
SETTINGS = {"digits", "strong", "folded", "is_appendix", "scored"}
"""Keywords of those functions that are no fields."""
FIELDS: dict[str, Any] = {
    "best": Reading, "bound": Evidence, "distances": Distances, "draws": Copying, "exam": Examination,
    "fidelity": Fidelity, "first": Copying, "gap": Gap, "holes": Holes, "latent": LatentCollapse, "probe": Probe,
    "raw": Reading, "rows": ChosenRows, "run": {"id", "started"}, "surgery": Surgery, "test": TwoSample,
    "use": CodeUse, "watched": {"rows", "split"}, **dict.fromkeys(("gains", "known", "wide"), {"items"}),
}  # fmt: skip
"""Classes of the fields whose attributes texts name."""


class Anything(float):
    """A stand-in for every field: a number, text, result or pair of results."""

    def __getattr__(self, name: str) -> "Anything":
        return self

    def __call__(self, *_: object) -> "Anything":
        return self

    def __getitem__(self, _: object) -> "Anything":
        return self

    def __iter__(self) -> Iterator["Anything"]:
        return iter((self, self))


def texts(found: Any = None, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """The dotted name of every text of the catalogue, with its source, or those of the titles of columns."""
    for key, value in (words.catalogue() if found is None else found).items():
        if isinstance(value, dict):
            yield from texts(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value if isinstance(value, list) else [value]


def named(node: ast.expr) -> list[str]:
    """The names of entries that an argument can be: a constant, or one of two."""
    if isinstance(node, ast.IfExp):
        return [*named(node.body), *named(node.orelse)]
    assert isinstance(node, ast.Constant), ast.unparse(node)
    return [str(node.value)]


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """Function, name of the entry and fields of every call that fills in words."""
    for path in sorted(PAGES.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in TEXTS:
                continue
            first = call.args[-1 if call.func.id == "section" else 0]
            if path.stem == "words" or isinstance(first, ast.Name):
                continue  # a function that hands the name of an entry on
            for name in named(first):
                yield call.func.id, name, {str(keyword.arg) for keyword in call.keywords} - SETTINGS


CALLS = list(calls())


@pytest.mark.parametrize(("function", "name", "given"), CALLS, ids=[f"{call[0]} {call[1]}" for call in CALLS])
def test_every_text_is_given_its_fields(function: str, name: str, given: set[str]):
    """Every branch of a text names given fields and their attributes; all fields are of use, and all texts are made."""
    whole, asked = dict(texts()), set[str]()
    implied = {"title"} if function == "table_of" else set()
    for key in TEXTS[function]:
        for source in whole.get(f"{name}.{key}".strip("."), () if key in OPTIONAL else (None,)):
            assert source is not None, f"{name} has no {key}"
            parsed = words.ENGINE.parse(source)
            asked |= meta.find_undeclared_variables(parsed)
            for node in parsed.find_all(nodes.Getattr):
                if isinstance(node.node, nodes.Name) and node.node.name != "loop":
                    assert node.attr in attributes(FIELDS[node.node.name]), source
            for value in (Anything(1.0), Anything(0.0)):
                made = words.ENGINE.from_string(source).render(dict.fromkeys(given | implied, value))
                assert made.strip()
                assert "  " not in " ".join(made.splitlines())
    assert given <= asked <= given | implied


def test_every_text_is_used():
    used = {f"{name}.{key}".strip(".") for function, name, _ in CALLS for key in TEXTS[function]}
    assert set(dict(texts())) <= used
    assert len(CALLS) > 100


def test_an_unknown_entry_or_a_missing_field_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        words.text("fit.nothing")
    with pytest.raises(UndefinedError, match="'bound' is undefined"):
        words.text("fit.exact")
    with pytest.raises(UndefinedError, match="has no attribute 'exact'"):
        words.text("fit.exact", bound=1.0)


def test_what_is_filled_in_is_no_template():
    """Names from outside may look like fields; they are escaped once, by the page."""
    assert (
        words.text("quality.never", label="{{ 7 * 7 }} <b>&amp;") == "No sample is classified as {{ 7 * 7 }} <b>&amp;."
    )


def attributes(kind: Any) -> set[str]:
    return kind if isinstance(kind, set) else {*dir(kind), *(field.name for field in fields(kind))}
