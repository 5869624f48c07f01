"""Tests of the parts of the documentation site: systems, reference, notebooks, links, version."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from typer.main import get_command

import pvae
import pvae.analysis
from pvae.cli import app
from pvae.experiment import zoo
from pvae.studies.cases import Declared
from pvae.util import toml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "analysis" / "results"
SYSTEMS = toml.read(DOCS / "systems.toml")
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", RESULTS / "README.md", *DOCS.rglob("*.md")]
MADE = re.compile(r"(kinds|systems)/.*\.md|(results|changelog|contributing)\.md")
"""Pages that are made with the site."""


def test_every_system_has_a_page():
    assert SYSTEMS.keys() == set(zoo.names())


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_a_page_names_is_there(name):
    told = SYSTEMS[name]
    assert all(told[key] for key in ("title", "group", "about", "laws"))
    assert f'"{told["group"]}"' in (DOCS / "templates" / "systems.md.j2").read_text()
    assert re.fullmatch(r"https?://\S+", told["paper"][1])
    for law in told["laws"]:
        path, _, test = law.partition("::")
        assert f"def {test}" in (ROOT / "tests" / path).read_text(), law
    for table, run in told.get("longer", ()):
        assert run in set(pandas.read_csv(RESULTS / f"{table}.csv").run), (table, run)


def test_the_table_of_small_fits_is_of_the_zoo():
    table = pandas.read_csv(RESULTS / "zoo.csv")
    assert set(table.system) <= set(zoo.names())
    assert table.system.is_unique
    assert {path.stem for path in (RESULTS / "zoo").iterdir()} == set(table.system)
    assert max(path.stat().st_size for path in (RESULTS / "zoo").iterdir()) < 30_000


def test_the_reference_names_all_that_is_public():
    told = set(re.findall(r"^::: (\S+)$", "\n".join(path.read_text() for path in DOCS.rglob("reference/*.md")), re.M))
    rooms = {"analysis", "data", "guides", "models"}
    assert set(pvae.__all__) - rooms <= {name.rpartition(".")[2] for name in told}
    assert {f"pvae.analysis.{name}" for name in pvae.analysis.__all__} <= told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_kept_without_outputs_and_is_python(path):
    notebook = json.loads(path.read_text())
    assert f"({path.stem}.md)" in (DOCS / "tutorials" / "index.md").read_text()
    assert notebook["cells"][0]["source"][0].startswith("# ")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), path.name, "exec")
    assert len(NOTEBOOKS) == 10


def links(path: Path) -> Iterator[str]:
    """Targets of the links of a page that lead to files."""
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", path.read_text())
    yield from (link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"https?:|mailto:", link))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
    for link in links(path):
        target = (path.parent / link).resolve()
        made = target.is_relative_to(DOCS) and MADE.fullmatch(target.relative_to(DOCS).as_posix())
        notebook = target.parent == DOCS / "tutorials" and target.with_suffix(".ipynb").is_file()
        assert made or notebook or target.exists(), link


def shown(language: str) -> Iterator[str]:
    """Blocks of code of one language in the pages and the texts of the tutorials."""
    for path in [page for page in PAGES if page.name != "CONTRIBUTING.md"]:
        yield from re.findall(rf"(?s)```{language}\n(.*?)```", path.read_text())
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            yield from re.findall(rf"(?s)```{language}\n(.*?)```", "".join(cell["source"]))


def test_declarations_and_studies_that_are_shown_are_valid(tmp_path):
    blocks = list(shown("toml"))
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "shown.toml").write_text(block)
        known: Any = Declared if "[sweep]" in block else pvae.Experiment
        assert known.load(str(tmp_path / "shown.toml")).name


def test_commands_that_are_shown_have_the_options_that_are_shown():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line.split("#")[0].split(" > ")[0] for block in shown("sh") for line in block.splitlines()]
    calls = [call.group(0).split()[1:] for line in lines for call in re.finditer(r"\bpvae(?= [a-z])[^;&|]*", line)]
    assert len(calls) > 25
    for name, *given in calls:
        options = {option for each in commands[name].params for option in each.opts}
        assert {word for word in given if word.startswith("--")} <= options, (name, given)


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == pvae.__version__  # type: ignore[index]
    released = re.findall(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == (pvae.__version__, re.search(r'^date-released: "(\S+)"$', citation, re.M)[1])  # type: ignore[index]
