"""The engine names no kind: parts begin, move and set themselves through their base classes."""

import ast
from pathlib import Path

import pytest

import pvae

ROOT = Path(pvae.__file__).parent
ENGINE = sorted(path for room in ("training", "objectives") for path in (ROOT / room).glob("*.py"))
BASES = {
    "pvae.models.graph",
    "pvae.guides.graph",
    "pvae.models.likelihoods.base",
    "pvae.models.priors.base",
    "pvae.guides.posteriors.base",
}


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_the_engine_imports_bases_alone(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in nodes if node.module}
    assert not {name for name in modules if name.startswith(("pvae.models", "pvae.guides"))} - BASES
