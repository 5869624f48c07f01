"""A report as data, and how it leaves."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pvae.analysis.figures.estimate import Estimate, cell, exact
from pvae.analysis.pages.document.blocks import (
    Listing,
    Note,
    PageColumn,
    PageSection,
    PageTable,
    Picture,
    Sentence,
    Tile,
)
from pvae.analysis.pages.document.document import Document, slug
from pvae.analysis.pages.document.words import csv_of, error_of, legible, percent, shown_value
from pvae.analysis.pages.plots import base
from pvae.errors import DataError
from pvae.util.files import plain

HOSTILE = ("<script>alert(1)</script>", r"$\foo$", "=cmd|' /C calc'!A0", "[red]", "\x1b[31m", "\u202e", "../../etc")


def table(id: str = "t", *, folded: bool = False) -> PageTable:
    columns = (PageColumn(HOSTILE[0]), PageColumn("nats", 2), PageColumn("rows"), PageColumn("words", is_text=True))
    rows = (
        (HOSTILE[2], Estimate(-1.23456, 0.05, "estimate", 0.1), 12345, HOSTILE[3]),
        ("plain", exact(2.0), None, HOSTILE[4]),
        ("bare", 0.5, -3, HOSTILE[5]),
    )
    return PageTable(id, "A caption, nats", columns, rows, strong=(0,), folded=folded)


def document(*sections: PageSection) -> Document:
    return Document("kicker", HOSTILE[0], HOSTILE[1], HOSTILE[3], {"a": math.nan}, sections, "footer")


def whole() -> Document:
    made = Picture("p" + HOSTILE[6], base.png(base.panels(1.0)[0]), HOSTILE[0], HOSTILE[1])
    blocks = table(), made, Note(HOSTILE[0]), Listing(HOSTILE[0], HOSTILE[3])
    first = (*blocks, "fine", Tile(HOSTILE[0], "1", HOSTILE[1]), {"one": exact(1.0)})
    folded = table("u", folded=True), Listing("x", "folded", folded=True)
    second = (*folded, Sentence("turn it", True), {"two": {1: math.inf}})
    return document(PageSection("one", HOSTILE[0], first, "lead"), PageSection("two", "Two", second, is_appendix=True))


def other() -> Document:
    return document(PageSection("one", "One", (table("v"),)))


def test_alerts_come_first_and_every_number_is_json():
    found = whole().to_dict()
    assert found["verdict"] == [{"text": "turn it", "alert": True}, {"text": "fine", "alert": False}]
    assert (found["a"], found["one"]["value"], found["two"]) == (None, 1.0, {"1": None})


def test_hostile_text_comes_out_as_text():
    """FAULTS 38."""
    page = whole().to_html()
    assert not [text for text in ("<script", "\x1b", "\u202e") if text in page]
    assert "&lt;script&gt;" in page
    assert r"$\foo$" in page
    assert page.count("<details>") == 3  # an appendix is folded, too
    assert page.count("data:image/png;base64,") == 1


def test_a_section_is_shown_for_its_blocks_or_its_lead():
    numbers, sentence = {"n": 1}, "said of it"
    sections = PageSection("a", "A", (numbers,), "lead"), PageSection("b", "B", (sentence, numbers))
    page = document(*sections, PageSection("c", "C", (Note("n"),))).to_html()
    assert re.findall(r'<h2 id="(\w+)"', page) == ["verdict", "a", "c"]
    assert sentence in page


def test_files_bear_safe_names_and_old_ones_go(tmp_path: Path):
    assert whole().write(tmp_path, figures=True) == tmp_path / "index.html"
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"index.html", "report.json", "tables/t.csv", "tables/u.csv", "figures/p..-2f..-2fetc.png"}
    (tmp_path / "tables" / "mine.csv").write_text("of the user")
    other().write(tmp_path)
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {"v.csv", "mine.csv"}
    assert not list((tmp_path / "figures").iterdir())


def test_a_folder_of_other_pages_is_left_alone(tmp_path: Path):
    """FAULTS 37: nothing is written over, and nothing taken away, that no report wrote."""
    for name, text in (("index.html", "my page"), ("report.json", '{"mine": 1}')):
        folder = tmp_path / name
        (folder / "tables").mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / "tables" / "t.csv").write_text("my table")
        with pytest.raises(DataError, match="got other pages"):
            whole().write(folder)
        assert (folder / name).read_text() == text
        assert (folder / "tables" / "t.csv").read_text() == "my table"


@pytest.mark.parametrize("name", ["tables", "figures"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_link_in_the_place_of_a_folder_is_refused(name: str, earlier: bool, tmp_path: Path):
    """FAULTS 37: what a link leads to is not written, nor cleared of pictures that only an earlier page has."""
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "holiday.png").write_text("mine")
    out = tmp_path / "out"
    if earlier:
        whole().write(out, figures=True)
        shutil.rmtree(out / name)
    out.mkdir(exist_ok=True)
    (out / name).symlink_to(tmp_path / "else")
    with pytest.raises(DataError, match="got a link"):
        whole().write(out, figures=not earlier)
    assert [p.name for p in (tmp_path / "else").iterdir()] == ["holiday.png"]


def test_a_list_of_files_that_leads_elsewhere_is_not_followed(tmp_path: Path):
    """FAULTS 37: report.json is text that anyone may have written."""
    out = tmp_path / "out"
    (tmp_path / "mine.csv").write_text("mine")
    whole().write(out)
    numbers = json.loads((out / "report.json").read_text())
    numbers["files"] = ["../mine.csv", "tables/../../mine.csv", "/etc/hostname", 3, "tables/t.csv"]
    (out / "report.json").write_text(json.dumps(numbers))
    other().write(out)
    assert (tmp_path / "mine.csv").exists()
    assert not (out / "tables" / "t.csv").exists()


def test_csv_has_value_error_and_kind_in_full_and_no_formulas():
    """FAULTS 39."""
    rows = list(csv.reader(io.StringIO(csv_of(table()))))
    assert rows[0] == [HOSTILE[0], "nats", "nats error", "nats data error", "nats kind", "rows", "words"]
    assert rows[1] == ["'" + HOSTILE[2], "-1.23456", "0.05", "0.1", "estimate", "12345", "[red]"]
    assert rows[2][1:6] == ["2.0", "0.0", "", "exact", ""]
    assert rows[3][1:6] == ["0.5", "", "", "", "-3"]
    formulas = "=1", "+1", "-1", "@x", "\t=1"
    assert [cell(text) for text in formulas] == [f"'{text}" for text in formulas]
    assert [cell(value) for value in (-1.5, None, "z", "a=b")] == [-1.5, None, "z", "a=b"]


def test_a_terminal_sees_the_same_tables():
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(whole())
    text = out.getvalue()
    assert text.index("! turn it") < text.index("- fine")
    assert "−1.23 ± 0.05" in text
    assert "[red]" in text
    assert text.count("A caption") == 1  # not the folded one, nor the appendix


def test_cells_read_well():
    values = Estimate(-0.0001, 0.0, "exact"), None, 1234567, math.nan, True
    assert [shown_value(v, 2) for v in values] == ["0.00", "–", "1\u202f234\u202f567", "–", "yes"]
    assert error_of(Estimate(1.0, math.nan, "estimate")) == ""
    assert [percent(v) for v in (0.0, 0.0123, 0.5, math.nan)] == ["0 %", "1.2 %", "50 %", "–"]


def test_json_and_text_are_cleaned():
    """FAULTS 38."""
    assert plain({"a": [math.nan, math.inf, 1.5, None, Path("x")]}) == {"a": [None, None, 1.5, None, "x"]}
    assert legible("a\x1b[31m\u202eb\nc") == "a\ufffd[31m\ufffdb\nc"


@pytest.mark.parametrize("name", [*HOSTILE, "z", "units_z1", "", "a/b", "a\\b", "." * 3])
def test_slugs_are_plain_and_differ(name: str):
    assert re.fullmatch(r"[a-zA-Z0-9._-]+", slug(name))
    assert slug("a" * 90) != slug("a" * 91)
    assert len({slug(other) for other in (*HOSTILE, "z", "a/b", "a\\b", "a-b")}) == len(HOSTILE) + 4
