"""Catalogues of texts: every entry is used, can be said, and asks for the fields that it is given."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError, meta, nodes

from pvae import words
from pvae.analysis.figures import estimate
from pvae.errors import ENTRY, DataError, DeclarationError
from tests.pages.test_words import Anything

ROOT = Path(__file__).parents[1]
CATALOGUES = {"figures": estimate.WORDS, "rooms": words.MESSAGES}
HOMES = {"pvae.analysis.figures.estimate": "figures", "pvae.words": "rooms", "pvae.errors": "rooms"}
"""Catalogues by the module of which the functions that say their entries are imported."""
NAMES = {"figures": estimate.TEXT_NAME, "rooms": ENTRY}
REFUSING = ("refuse", "misdeclared", "instead")
"""Functions whose second argument is a message or the name of an entry."""


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """The catalogue, the entry and the fields of every call; of `**given` those that are anywhere in the module.

    Entries that a class of results names, as its heading, its remarks or the meaning of a field, are given that result.
    """
    for named in {str(value) for table in estimate.TABLES.values() for value in table.values()}:
        if ("figures", named) in ENTRIES:
            yield "figures", named, {"found"}
    for path in sorted(
        path for room in ("pvae", "models", "guides", "analysis") for path in (ROOT / room).rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in HOMES]
        homes = {alias.name: HOMES[str(node.module)] for node in imports for alias in node.names}
        homes |= dict.fromkeys(("text", "texts"), "figures") if path.samefile(str(estimate.__file__)) else {}
        own = [part for c in tree.body if isinstance(c, ast.ClassDef) for part in c.body if "analysis" in path.parts]
        for node in (node for part in own if isinstance(part, ast.Assign | ast.AnnAssign) for node in ast.walk(part)):
            if isinstance(node, ast.Constant) and ("figures", str(node.value)) in ENTRIES:
                yield "figures", str(node.value), {"found"}
        for call in ast.walk(tree):
            function = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            of = "rooms" if re.fullmatch(r"(\w*Error|Stopped)\.of", function) else homes.get(function, "")
            if of and function.rpartition(".")[2] in ("text", "texts", "of", *REFUSING) and isinstance(call, ast.Call):
                fields = {str(keyword.arg) for keyword in call.keywords if keyword.arg}
                fields |= {"problem"} if function == "instead" else set()
                if len(fields) < len(call.keywords):
                    fields |= {str(k.value) for k in ast.walk(tree) if isinstance(k, ast.Constant)}
                for node in ast.walk(call.args[function in REFUSING]):
                    is_name = function not in REFUSING or NAMES[of].fullmatch(ast.unparse(node).strip("'"))
                    if isinstance(node, ast.Constant) and is_name:
                        yield of, str(node.value), fields


def entries(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """The texts of every entry of a catalogue, by its dotted name."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", [value] if isinstance(value, str) else value


ENTRIES = {(of, name): texts for of, found in CATALOGUES.items() for name, texts in entries(found.entries)}
CALLS = [*calls()]


def test_every_entry_is_used():
    assert {(of, name) for of, name, _ in CALLS} == ENTRIES.keys()


@pytest.mark.parametrize(("of", "name"), ENTRIES)
def test_every_entry_is_given_its_fields(of: str, name: str):
    engine = CATALOGUES[of].engine
    for source in ENTRIES[of, name]:
        parsed = engine.parse(" ".join(source.split()))
        inside = {node.name for node in parsed.find_all(nodes.Name) if node.ctx == "store"}
        asked = meta.find_undeclared_variables(parsed) - inside
        assert all(asked <= fields for *called, fields in CALLS if called == [of, name])
        if of == "rooms":
            said = [engine.from_string(source).render(dict.fromkeys(asked, Anything(value))) for value in (0.0, 1.0)]
            assert any(text.strip() for text in said)


def test_an_unknown_entry_or_a_missing_field_is_an_error():
    with pytest.raises(KeyError):
        estimate.text("surgery.nothing")
    with pytest.raises(UndefinedError):
        estimate.text("surgery.coordinates", name="z")


def test_what_is_filled_in_is_no_template():
    name = "{{ 7 * 7 }}  <b>"
    assert str(DeclarationError.of("pair.enumeration.masked", name=name)).startswith(f"{name}: expected a site")
    assert isinstance(DataError.of("pair.enumeration.masked", name=name), DataError)


def test_numbers_are_short():
    assert [estimate.short(value) for value in (1.234, 0.004, -0.02, -0.001)] == ["1.23", "0", "-0.02", "0"]
