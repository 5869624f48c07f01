"""Tables as people have them: spellings of numbers, dates, encodings, missing words; a guess that can be loaded."""

import bz2
import datetime
import gzip
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, strategies as st

import pvae
from pvae.component import from_table
from pvae.data import CSV, Dataset, Parquet, load
from pvae.data.sources.base import Data
from pvae.data.tables.cells import SPELLINGS, Spelling
from pvae.data.tables.guess import guess
from pvae.errors import DeclarationError
from tests.cli_runner import run_cli
from tests.data.writers import refused

ROWS = 40
REAL = {"type": "continuous", "transform": "none"}
VALUES = np.random.RandomState(0).lognormal(6, 2, ROWS).round(2)


def spelled(value: float, spelling: Spelling) -> str:
    """Write a number in a spelling, with Python's own format."""
    return f"{value:,.2f}".translate({ord(","): spelling.thousands or None, ord("."): spelling.decimal})


def declared(raw: Any) -> Data:
    return from_table(Data, raw, "t")  # type: ignore[type-abstract]


def csv_of(folder: Path, words: list[str], name: str = "t.csv", separator: str = "|", head: str = "v|w") -> str:
    path = folder / name
    path.write_text("\n".join([head, *(f"{word}{separator}{i % 2}" for i, word in enumerate(words))]) + "\n")
    return str(path)


def stored(data: Dataset) -> list[float]:
    """The numbers of the first column of all splits, sorted: rows are in random splits."""
    return sorted(torch.cat([split.x[:, 0] for split in data.splits]).tolist())


def wanted(values: Any) -> list[float]:
    return sorted(np.asarray(values, np.float32).tolist())


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("spelling", SPELLINGS, ids=repr)
def test_every_spelling_is_read_as_declared_and_guessed(tmp_path, spelling):
    """FAULTS 72."""
    path = csv_of(tmp_path, [spelled(value, spelling) for value in VALUES])
    source = CSV(path=path, separator="|", decimal=spelling.decimal, thousands=spelling.thousands, columns={"v": REAL})
    assert stored(load(source)) == wanted(VALUES)
    found = guess(path).declaration["data"]
    assert (found.get("decimal", "."), found.get("thousands", "")) == (spelling.decimal, spelling.thousands)


@pytest.mark.parametrize(
    ("word", "spelling", "number"),
    [
        ("1.132,86", Spelling(",", "."), 1132.86),
        ("1.13,86", Spelling(",", "."), None),  # no group of three
        ("12.5", Spelling(",", "."), None),  # not 125
        ("1,132,860", Spelling(".", ","), 1132860.0),
        ("1_000", Spelling(), None),
        (" 3.5 ", Spelling(), 3.5),
        ("3.", Spelling(), 3.0),
        (".5e-3", Spelling(), 0.0005),
        ("0x10", Spelling(), None),
        ("", Spelling(), None),
        (True, Spelling(), None),
        (Decimal("3.25"), Spelling(","), 3.25),
        (np.float16(1.5), Spelling(), 1.5),
    ],
)
def test_a_number_is_read_in_its_spelling_alone(word, spelling, number):
    assert spelling.number(word) == number


@given(st.floats(-1e9, 1e9).map(lambda x: round(x, 2)), st.sampled_from(SPELLINGS))
def test_what_is_written_is_read(value, spelling):
    assert spelling.number(spelled(value, spelling)) == value


def test_one_mark_for_both_is_refused():
    with pytest.raises(DeclarationError, match="a decimal mark other than that of thousands; got ','"):
        from_table(CSV, {"path": "t", "decimal": ",", "thousands": ",", "columns": {"v": REAL}}, "t")


def test_numbers_of_another_spelling_are_refused_by_line(tmp_path):
    refused(
        r"line 2, column 'v': expected a finite number; got '1,5'",
        load,
        CSV(path=csv_of(tmp_path, ["1,5"] * ROWS), separator="|", columns={"v": REAL}),
    )


ARROW: dict[str, tuple[list[Any], list[float]]] = {
    "decimals": ([Decimal(i) / 4 for i in range(ROWS)], [i / 4 for i in range(ROWS)]),
    "text": ([f"{i / 4}" for i in range(ROWS)], [i / 4 for i in range(ROWS)]),
    "dates": ([datetime.date(1970, 1, 1 + i % 30) for i in range(ROWS)], [i % 30 for i in range(ROWS)]),
    "times": ([datetime.datetime(1970, 1, 1 + i % 30, 12) for i in range(ROWS)], [i % 30 + 0.5 for i in range(ROWS)]),
    "durations": ([datetime.timedelta(days=i, hours=6) for i in range(ROWS)], [i + 0.25 for i in range(ROWS)]),
    "clock": ([datetime.time(i % 24, 30) for i in range(ROWS)], [(i % 24 + 0.5) / 24 for i in range(ROWS)]),
}


@pytest.mark.parametrize("name", ARROW)
@pytest.mark.parametrize("source", ["parquet", "frame"])
def test_numbers_and_dates_of_arrow_and_pandas(tmp_path, name, source):
    pytest.importorskip("pyarrow")
    cells, values = ARROW[name]
    frame = pandas.DataFrame({"v": cells})
    frame.to_parquet(tmp_path / "t.parquet")
    found = guess(str(tmp_path / "t.parquet")).declaration["data"]["columns"]["v"]
    column = {**found, "transform": "none"} if found["type"] == "continuous" else REAL
    if source == "parquet":
        data = load(Parquet(path=str(tmp_path / "t.parquet"), columns={"v": column}))
    else:
        data = Dataset.from_frame(frame, {"v": column})
    assert stored(data) == wanted(values)


# ---------------------------------------------------------------------- dates

MOMENTS = [datetime.datetime(2019, 1 + i % 12, 1 + i % 28, i % 24, 5) for i in range(ROWS)]
DAYS = [(moment - datetime.datetime(1970, 1, 1)) / datetime.timedelta(days=1) for moment in MOMENTS]
FORMS = (None, "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M")


@pytest.mark.parametrize("form", FORMS)
def test_dates_are_days_in_every_format(tmp_path, form):
    """FAULTS 72."""
    words = [moment.isoformat(" ") if form is None else moment.strftime(form) for moment in MOMENTS]
    path = csv_of(tmp_path, words)
    column = {**REAL, "time": "days", **({} if form is None else {"format": form})}
    assert np.allclose(stored(load(CSV(path=path, separator="|", columns={"v": column}))), sorted(DAYS))
    found = guess(path).declaration["data"]["columns"]["v"]
    assert found == {"type": "continuous", "time": "days", **({} if form is None else {"format": form})}


def test_days_and_months_that_cannot_be_told_apart_are_named(tmp_path):
    found = guess(csv_of(tmp_path, [f"0{1 + i % 9}/0{1 + i % 7}/2019" for i in range(ROWS)]))
    assert found.left_out["v"] == "dates that %m/%d/%Y or %d/%m/%Y reads: declare one with time and format"


def test_one_date_is_read_several_times_in_cycles(tmp_path):
    columns = {
        f"{part}_{wave}": {**REAL, "of": "v", "time": f"{part}_{wave}"}
        for part in ("hour", "week", "year")
        for wave in ("sin", "cos")
    }
    data = load(CSV(path=csv_of(tmp_path, [str(m) for m in MOMENTS]), separator="|", columns=columns))
    x = torch.cat([split.x for split in data.splits])
    assert np.allclose(x[:, ::2] ** 2 + x[:, 1::2] ** 2, 1, atol=1e-5)
    hours = sorted(np.cos(2 * np.pi * (moment.hour + 5 / 60) / 24) for moment in MOMENTS)
    assert np.allclose(sorted(x[:, 1].tolist()), hours, atol=1e-5)


def test_what_is_no_date_is_refused_by_line(tmp_path):
    column = {**REAL, "time": "days", "format": "%d.%m.%Y"}
    path = csv_of(tmp_path, ["01.02.2019"] * 3 + ["2019-02-01"] + ["03.02.2019"] * 3)
    said = r"line 5, column 'v': expected a date \(%d.%m.%Y\); got '2019-02-01'"
    refused(said, load, CSV(path=path, separator="|", columns={"v": column}))


def test_a_format_without_a_reading_is_refused():
    with pytest.raises(DeclarationError, match='a format with time = "days" or another reading of a date'):
        from_table(CSV, {"path": "t", "columns": {"v": {**REAL, "format": "%Y"}}}, "t")


# ---------------------------------------------------------------------- files

TEXT = "größe,w\n" + "".join(f"{i}.5,{i % 2}\n" for i in range(ROWS))
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_encodings_and_compressions(tmp_path, packed, encoding):
    path = tmp_path / f"t.csv.{packed}"
    path.write_bytes(PACKED[packed](TEXT.encode(encoding)))
    source = CSV(path=str(path), encoding=encoding, columns={"größe": REAL})
    assert stored(load(source)) == [i + 0.5 for i in range(ROWS)]
    found = guess(str(path))
    assert list(found.declaration["data"]["columns"]) == ["größe", "w"]
    assert found.declaration["name"] == "t"


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, packed):
    path = tmp_path / "t.csv"
    path.write_bytes(PACKED[packed](TEXT.encode())[:-20])
    refused("expected a whole compressed file", load, CSV(path=str(path), columns={"w": REAL}))


def test_an_encoding_that_does_not_fit_or_is_unknown(tmp_path):
    (tmp_path / "t.csv").write_bytes(TEXT.encode("cp1252"))
    said = "expected UTF-8; got the byte 0x.*. Set data.encoding"
    refused(said, load, CSV(path=str(tmp_path / "t.csv"), columns={"w": REAL}))
    for name in ("latin-9000", "rot13", "base64"):
        with pytest.raises(DeclarationError, match="an encoding of text that Python knows"):
            from_table(CSV, {"path": "t", "encoding": name, "columns": {"v": REAL}}, "t")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_without_a_header(tmp_path, mark):
    (tmp_path / "t.csv").write_text(mark + TEXT.split("\n", 1)[1])
    found = guess(str(tmp_path / "t.csv"))
    assert found.declaration["data"]["header"] is False
    assert list(found.declaration["data"]["columns"]) == ["c1", "c2"]
    data = load(CSV(path=str(tmp_path / "t.csv"), header=False, columns={"c1": REAL}))
    assert stored(data) == [i + 0.5 for i in range(ROWS)]


# ---------------------------------------------------------------------- guesses


@pytest.mark.parametrize("word", ["NULL", "n/a", "-", "?", "N/A", "missing", "--", "None"])
def test_words_for_missing_numbers_are_proposed(tmp_path, word):
    """FAULTS 72."""
    path = csv_of(tmp_path, [word if i % 5 == 0 else f"{i}.5" for i in range(ROWS)])
    found = guess(path).declaration["data"]
    assert found["na"] == ["", "NA", "nan", word]
    assert found["columns"]["v"] == {"type": "continuous", "missing": "mask"}
    assert torch.isnan(torch.cat([s.x for s in load(declared(found)).splits])).sum() == 8


def test_a_dash_among_words_is_a_level(tmp_path):
    found = guess(csv_of(tmp_path, ["a", "-", "b", "c"] * 10)).declaration["data"]
    assert found["columns"]["v"] == {"type": "categorical", "levels": ["-", "a", "b", "c"]}
    assert "na" not in found


@pytest.mark.parametrize("unit", ["{} %", "€ {}", "${}", "{}€"])
def test_signs_of_units_are_named(tmp_path, unit):
    found = guess(csv_of(tmp_path, [unit.format(i) for i in range(ROWS)]))
    assert found.left_out["v"].startswith("numbers with a sign of a unit, such as ")


def test_truth_keeps_its_words(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"b": [i % 3 == 0 for i in range(ROWS)], "v": range(ROWS)})
    frame.to_parquet(tmp_path / "t.parquet")
    column = guess(str(tmp_path / "t.parquet")).declaration["data"]["columns"]["b"]
    assert column == {"type": "binary", "values": ["false", "true"]}
    data = load(Parquet(path=str(tmp_path / "t.parquet"), columns={"b": column}))
    assert data.table is not None
    assert set(data.table.to_frame(data.train.x)["b"]) == {"false", "true"}


def drawn_column(rng: np.random.RandomState) -> list[Any]:
    """Cells of one kind, some odd: rare values, missing cells, words, dates, huge numbers."""
    kinds: list[Callable[[int], Any]] = [
        lambda i: i,
        lambda i: int(rng.poisson(3)),
        lambda i: round(float(rng.standard_normal()), 3),
        lambda i: float(np.exp(3 * rng.standard_normal())),
        lambda i: 1e300 * float(rng.rand()),
        lambda i: "abc"[rng.randint(3)],
        lambda i: ["yes", "no"][rng.randint(2)],
        lambda i: bool(rng.randint(2)),
        lambda i: ["NULL", "1.5", "2.5", "7"][rng.randint(4)],
        lambda i: f"{rng.randint(10**6):,}",
        lambda i: f"{rng.randint(100)} %",
        lambda i: str(datetime.date(2020, 1 + rng.randint(12), 1 + rng.randint(28))),
        lambda i: f"0{1 + rng.randint(9)}/0{1 + rng.randint(9)}/2020",
        lambda i: f"word {i}",
        lambda i: 7 if i else 8,  # one value that differs
        lambda i: ["1", "2", "inf"][rng.randint(3)],
        lambda i: int(rng.randint(2**62)),
        lambda i: ["-", "a", "?"][rng.randint(3)],
        lambda i: ["2020-01-01", "soon"][rng.randint(2)],
        lambda i: 0.1 + 1e-16 * int(rng.randint(2)),
    ]
    kind = kinds[rng.randint(len(kinds))]
    gaps = rng.choice([0.0, 0.0, 0.2, 0.97])
    return [None if rng.rand() < gaps else kind(i) for i in range(ROWS)]


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_what_is_proposed_can_be_loaded(tmp_path, form, seed):
    """FAULTS 72: one rule for the guess and for the reader."""
    rng = np.random.RandomState(seed)
    frame = pandas.DataFrame({f"c{i}": pandas.Series(drawn_column(rng), dtype=object) for i in range(4)})
    frame["last"] = rng.standard_normal(ROWS)
    path = tmp_path / f"t.{form}"
    if form == "csv":
        frame.to_csv(path, index=False, sep=[",", ";", "|"][seed % 3])
    else:
        pytest.importorskip("pyarrow")
        frame = frame.apply(lambda cells: cells if cells.map(type).nunique() <= 2 else cells.astype(str))
        frame.to_parquet(path)
    found = guess(str(path))
    assert {*found.declaration["data"]["columns"], *found.left_out} == set(frame.columns)
    data = load(declared(found.declaration["data"]))
    assert data.shape == (len(found.declaration["data"]["columns"]),)


def test_a_word_of_its_own_in_every_row_names_it(tmp_path):
    words = [f"P-{i:03}" for i in range(ROWS)]
    found = guess(csv_of(tmp_path, words))
    assert found.declaration["data"]["id"] == "v"
    assert "data.id" in found.left_out["v"]
    data = load(declared(found.declaration["data"]))
    assert sorted(name for split in data.splits for name in (split.ids if split.ids is not None else ())) == words
    assert "id" not in guess(csv_of(tmp_path, [*words[1:], ""])).declaration["data"]
    assert "id" not in guess(csv_of(tmp_path, [*words[1:], words[1]])).declaration["data"]


def test_a_proposal_passes_the_check_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{i % 28 + 1:02}.03.2020;{1000 + 13 * i}.{i % 100:02};NULL" for i in range(ROWS)]
    lines = [line.replace(".", ",", 3).replace(",03,2020", ".03.2020") for line in lines]
    (tmp_path / "t.csv").write_text("Datum;Umsatz;leer\n" + "\n".join(lines) + "\n")
    (tmp_path / "t.toml").write_text(run_cli("columns", "t.csv")[0])
    run_cli("check", "t.toml", "--build")
    assert pvae.Experiment.load(str(tmp_path / "t.toml")).train.epochs == 400
    assert pvae.Experiment.load(str(tmp_path / "t.toml")).data.model_dump()["decimal"] == ","
