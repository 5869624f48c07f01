"""The file of words of results: every entry is used, is not empty, and asks for the fields that it is given."""

import ast
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError, meta, nodes

from pvae.analysis.figures import estimate

ROOMS = Path(__file__).parents[2] / "analysis"


def calls() -> dict[str, set[str]]:
    """The fields that every entry is given, by its name; of `**given` those that are anywhere in the module."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOMS.rglob("*.py")):
        source = path.read_text()
        if re.search(r"figures.estimate import .*\btexts?\b|^def texts", source, re.MULTILINE):
            for call in ast.walk(ast.parse(source)):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("text", "texts"):
                    assert isinstance(call.args[0], ast.Constant)
                    fields = {str(keyword.arg) for keyword in call.keywords if keyword.arg}
                    if len(fields) < len(call.keywords):
                        fields |= {str(k.value) for k in ast.walk(ast.parse(source)) if isinstance(k, ast.Constant)}
                    found[str(call.args[0].value)] = fields
    return found


def test_every_entry_is_used():
    assert calls().keys() == estimate.ENTRIES.keys()


@pytest.mark.parametrize("name", estimate.ENTRIES)
def test_every_entry_is_given_its_fields(name: str):
    entry = estimate.ENTRIES[name]
    for words in [entry] if isinstance(entry, str) else entry:
        parsed = estimate.ENGINE.parse(" ".join(words.split()))
        inside = {node.name for node in parsed.find_all(nodes.Name) if node.ctx == "store"}
        assert meta.find_undeclared_variables(parsed) - inside <= calls()[name]


def test_an_unknown_entry_or_a_missing_field_is_an_error():
    with pytest.raises(KeyError):
        estimate.text("surgery.nothing")
    with pytest.raises(UndefinedError):
        estimate.text("surgery.coordinates", name="z")


def test_numbers_are_short():
    assert [estimate.short(value) for value in (1.234, 0.004, -0.02, -0.001)] == ["1.23", "0", "-0.02", "0"]
