"""The catalogue of words: every entry is used, and every call gives the fields that its texts ask for."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError, meta, nodes

from pvae.analysis.bounds.gap import Gap
from pvae.analysis.bounds.weights import Evidence
from pvae.analysis.decompose.collapse import CodeUse, LatentCollapse
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.pages.document import words
from pvae.analysis.pages.plots.bars import WaterfallStep
from pvae.analysis.pages.sections.examination import ChosenRows, Examination
from pvae.analysis.pages.sections.latents import Holes
from pvae.analysis.population.interval import SubsetInformation
from pvae.analysis.samples.copying import Copying
from pvae.analysis.samples.distances import Distances
from pvae.analysis.samples.fidelity import Fidelity
from pvae.analysis.samples.probe import GroupedCodes, Probe, Reading
from pvae.analysis.samples.quality import TwoSample

PAGES = Path(__file__).parents[2] / "analysis" / "pages"
TEXTS = {
    "text": ("",), "alert": ("",), "section": ("title", "lead"), "picture": ("alt", "caption"),
    "table": ("table", "columns", "words"), "tile": ("what", "figure", "unit"),
}  # fmt: skip
TEXTS |= {"_by_run": TEXTS["table"], "table_of": TEXTS["table"], "texts": ("",)}
"""Texts of an entry that a call of each function fills in."""
OPTIONAL = {"lead", "columns", "words"}
SETTINGS = {"where", "digits", "strong", "folded", "is_appendix", "scored"}
"""Keywords of those functions that are no fields."""
FIELDS: dict[str, Any] = {
    "best": Reading, "bound": Evidence, "distances": Distances, "draws": Copying, "exam": Examination,
    "fidelity": Fidelity, "first": Copying, "gap": Gap, "groups": GroupedCodes, "holes": Holes,
    "latent": LatentCollapse, "probe": Probe,
    "raw": Reading, "rows": ChosenRows, "run": {"id", "started", "name", "path"}, "surgery": Surgery, "test": TwoSample,
    "found": Surgery, "p": {"least", "chance", "value"}, "size": SubsetInformation, "step": WaterfallStep,
    "use": CodeUse, "watched": {"rows", "split"}, **dict.fromkeys(("gains", "known", "wide"), {"items"}),
    **dict.fromkeys(("facts", "status", "data", "git"), {"get"}),
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

    def __len__(self) -> int:
        return 2


def texts(found: Any = None, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """The dotted name of every text of the catalogue, with its source, or those of the titles of columns."""
    for key, value in (words.WORDS.entries if found is None else found).items():
        if isinstance(value, dict):
            yield from texts(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value if isinstance(value, list) else [value]


def named(node: ast.expr, scope: ast.AST) -> list[str]:
    """The names of entries that an argument can be: a constant, one of two, or what its function has called so."""
    if isinstance(node, ast.IfExp):
        return [*named(node.body, scope), *named(node.orelse, scope)]
    if isinstance(node, ast.Name):
        chosen = [a for a in ast.walk(scope) if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == node.id]
        return [name for a in chosen for name in (named(a.value, scope) if isinstance(a.value, ast.IfExp) else ())]
    return [str(node.value)] if isinstance(node, ast.Constant) else []


def calls() -> Iterator[tuple[str, tuple[str, ...], set[str]]]:
    """Function, names of entries that it may say, and fields of every call that fills in words."""
    for path in sorted(path for path in PAGES.rglob("*.py") if path.parent.name != "plots"):  # they say results
        for scope in ast.parse(path.read_text()).body:
            for call in ast.walk(scope):
                function = ast.unparse(call.func).removeprefix("words.") if isinstance(call, ast.Call) else ""
                if isinstance(call, ast.Call) and function in TEXTS:
                    names = named(call.args[-1 if function == "section" else 0], scope)
                    yield function, tuple(names), {str(keyword.arg) for keyword in call.keywords} - SETTINGS


CALLS = [call for call in calls() if call[1]]


def fields_of(name: str, texts_of: tuple[str, ...], given: set[str]) -> set[str]:
    """The fields that the texts of an entry ask for, in every branch; they and their attributes are there.

    Each text says something; of a list of sentences, which need not apply, at least one does.
    """
    whole, asked, said = dict(texts()), set[str](), list[str]()
    for key in texts_of:
        for source in whole.get(f"{name}.{key}".strip("."), () if key in OPTIONAL else (None,)):
            assert source is not None, f"{name} has no {key}"
            parsed = words.WORDS.engine.parse(source)
            asked |= meta.find_undeclared_variables(parsed)
            for node in parsed.find_all(nodes.Getattr):
                if isinstance(node.node, nodes.Name) and node.node.name != "loop":
                    assert node.attr in attributes(FIELDS[node.node.name]), source
            for value in (Anything(1.0), Anything(0.0)):
                said.append(words.WORDS.engine.from_string(source).render(dict.fromkeys(given, value)).strip())
    assert any(said) if texts_of == ("",) and isinstance(words.WORDS.entry(name), list) else all(said)
    return asked


@pytest.mark.parametrize(("function", "names", "given"), CALLS, ids=[f"{f} {' '.join(names)}" for f, names, _ in CALLS])
def test_every_text_is_given_its_fields(function: str, names: tuple[str, ...], given: set[str]):
    """Each of the entries that a call may say can be made of the fields it gives, and each of these is of use."""
    known = given | ({"title"} if function == "table_of" else set())
    asked = [fields_of(name, TEXTS[function], known) for name in names]
    assert given <= set().union(*asked) <= known


def test_every_text_is_used():
    used = {f"{name}.{key}".strip(".") for function, names, _ in CALLS for name in names for key in TEXTS[function]}
    assert {name for name in set(dict(texts())) - used if not name.startswith("glossary.")} == set()
    assert len(CALLS) > 100


def test_an_unknown_entry_or_a_missing_field_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        words.text("fit.nothing")
    with pytest.raises(UndefinedError, match="'bound' is undefined"):
        words.text("guide.reliable")
    with pytest.raises(UndefinedError, match="has no attribute 'khat_limit'"):
        words.text("guide.reliable", bound=1.0)


def test_what_is_filled_in_is_no_template():
    """Names from outside may look like fields; they are escaped once, by the page."""
    label = "{{ 7 * 7 }} <b>&amp;"
    said = words.text("quality.rarest", label=label, sampled=0.1, of_data=0.2)
    assert said == f"The least frequent label among samples is {label} (10 %, against 20 % of data)."


def attributes(kind: Any) -> set[str]:
    return kind if isinstance(kind, set) else {*dir(kind), *(field.name for field in fields(kind))}
