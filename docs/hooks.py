"""Pages of the site that are made when it is built: systems, kinds, documents of the repository, tutorials."""

import base64
import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import griffe
import nbclient
import nbformat
import pandas
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pvae
from pvae.component import Component
from pvae.experiment import zoo
from pvae.experiment.readback import arrows, decoded, formulas
from pvae.util import toml

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "analysis" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, in the navigation in place of patterns that end in `*`."""
    copied = {uri: (ROOT / path).read_bytes() for uri, path in config.extra["documents"].items()}
    made = {**copied, **dict([*systems(), *kinds(), *tutorials()])}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    for pages in [pages for part in config.nav or [] for pages in part.values() if "*" in pages[-1]]:
        folder = pages.pop().removesuffix("*")
        pages += [uri for uri in made if uri.startswith(folder) and uri.endswith(".md") and uri not in pages]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links to files of the repository lead to the pages made of them."""
    for path, uri in config.extra["links"].items():
        markdown = markdown.replace(f"]({path})", f"]({uri})")
    return markdown


def systems() -> Iterator[tuple[str, str | bytes]]:
    """Yield a page for each system of the zoo, pictures of their samples, and the list of systems."""
    told = toml.read(DOCS / "systems.toml")
    tables = {path.stem: pandas.read_csv(path).to_dict("records") for path in RESULTS.glob("*.csv")}
    for name, system in told.items():
        facts = {"plan": pvae.Experiment.load(name), "file": zoo.find(name).read_text(), "told": system}
        yield f"systems/{name}.md", page("system", name=name, tables=tables, **facts)
    pictures = (path for folder in ("tokens", "zoo") for path in (RESULTS / folder).glob("*.png"))
    yield from ((f"systems/{path.parent.name}-{path.name}", path.read_bytes()) for path in pictures)
    yield "systems/index.md", page("systems", told=told, zoo=dict(zoo.entries()), measured=tables["zoo"])


def kinds() -> Iterator[tuple[str, str | bytes]]:
    """Yield a page for each family of kinds, one for the other tables of a declaration, and the list of them."""
    families = [family for family in Component.__subclasses__() if family.__module__.startswith("pvae.")]
    for family in families:
        title, members = family.__name__, {name: m.model_json_schema() for name, m in sorted(family.members.items())}
        yield f"kinds/{title.lower()}.md", page("kinds", title=title, family=family, members=members)
    whole = pvae.Experiment.model_json_schema()
    members = {"Experiment": whole, **whole["$defs"]}
    yield "kinds/tables.md", page("kinds", title="Tables", family=None, members=members)
    yield "kinds/index.md", page("families", families=families)


def tutorials() -> Iterator[tuple[str, str | bytes]]:
    """Yield each tutorial, run, as a page, and its pictures."""
    paths = sorted((DOCS / "tutorials").glob("*.ipynb"))
    with ThreadPoolExecutor(2) as pool:
        for path, notebook in zip(paths, pool.map(executed, paths), strict=True):
            pictures: dict[str, bytes] = {}
            yield f"tutorials/{path.stem}.md", page("notebook", cells=notebook.cells, name=path.stem, pictures=pictures)
            yield from pictures.items()


def executed(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of its cells, run in a kernel and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return nbclient.execute(nbformat.read(path, 4), cwd=folder, timeout=300)


class Examples(griffe.Extension):
    """Doctests of the package as code: its docstrings call them `Example:`, Google style `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")


def sections(docstring: str) -> str:
    """Return a docstring as Markdown, its sections as paragraphs."""
    return re.sub(r"(?m)^([A-Z]\w+):\n(?= {4})", r"*\1.*\n", docstring).replace("\n    ", "\n")


def page(template: str, **facts: Any) -> str:
    """Return the Markdown of a page."""
    return TEMPLATES.get_template(f"{template}.md.j2").render(facts)


LOADER = FileSystemLoader(DOCS / "templates")
TEMPLATES = Environment(loader=LOADER, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.globals |= {"arrows": arrows, "decoded": decoded, "formulas": formulas}
TEMPLATES.filters |= {"mathml": convert, "sections": sections, "tojson": json.dumps, "unpacked": base64.b64decode}
