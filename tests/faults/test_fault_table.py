"""The table of faults in tests/README.md is whole, and names tests that say so."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = tuple(range(1, 75))


def table() -> dict[int, list[str]]:
    """The tests that tests/README.md names for each row."""
    rows = {}
    for line in (TESTS / "README.md").read_text().splitlines():
        if found := re.match(r"\| (\d+) \|.*\|([^|]*)\|$", line):
            rows[int(found[1])] = re.findall(r"`([\w/]+\.py::\w+)`", found[2])
    return rows


@cache
def docstrings(file: str) -> dict[str, str]:
    """The docstring of every test of a file, in whatever folder of the tests it lies: no two share a name."""
    tree = ast.parse(next(TESTS.rglob(file)).read_text())
    return {n.name: ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def rows_named(docstring: str) -> set[int]:
    """The rows in a docstring: `FAULTS 3`, `FAULTS 3 and 4`, `FAULTS 3, 4 and 5`."""
    parts = re.findall(r"FAULTS ((?:\d+(?:,? and |, )?)+)", docstring)
    return {int(number) for part in parts for number in re.findall(r"\d+", part)}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_names_tests_that_are_there(row: int) -> None:
    tests = table()[row]
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        assert name in docstrings(file), f"{test}: no such test"
        assert row in rows_named(docstrings(file)[name]), f"{test}: its docstring does not say FAULTS {row}"


def test_the_table_has_every_row() -> None:
    assert list(table()) == list(ROWS)
