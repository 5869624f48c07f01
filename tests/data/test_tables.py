"""Tables: every type of column; text, Parquet and DataFrames; missing values; every fault of a file; guesses."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr, operator, index"

import csv
import itertools
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import scipy.special
import scipy.stats
import torch

from pvae.data import CSV, Dataset, Parquet, load
from pvae.data.rows.cache import cache_folder
from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import UNWARPS, WARPS
from pvae.data.sources.tabular import FrameSource
from pvae.data.streamed import Streamed
from pvae.data.tables import readers
from pvae.data.tables.readers import MAX_HEADER_BYTES
from pvae.errors import DataError, DeclarationError, MissingExtraError
from pvae.graph.site import Law
from pvae.models.likelihoods.columns import FAMILIES, ColumnsLikelihood
from tests.cli_runner import run_cli
from tests.data.writers import refused

Raw = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A type of column, and what may stand in it."""

    column: Raw
    cells: tuple[str, ...]
    values: tuple[float, ...]
    """The numbers that these cells are, before any transform."""
    bad: str
    outputs: int = 1

    def score(self, h: np.ndarray, x: float) -> float:
        """log p of a number from the decoder's outputs of this column, written a second time; float64."""
        return float(SCORES[laws_of(self.column)[0].family](h, x))


SCORES: dict[str, Callable[[np.ndarray, float], Any]] = {
    "normal": lambda h, x: scipy.stats.norm.logpdf(x, h[0]),
    "student_t": lambda h, x: scipy.stats.t.logpdf(x, 1 + math.exp(2), h[0]),
    "poisson": lambda h, x: scipy.stats.poisson.logpmf(x, np.exp(h[0])),
    "negative_binomial": lambda h, x: scipy.stats.nbinom.logpmf(x, math.e, math.e / (math.e + np.exp(h[0]))),
    "bernoulli": lambda h, x: scipy.stats.bernoulli.logpmf(x, scipy.special.expit(h[0])),
    "categorical": lambda h, x: h[int(x)] - scipy.special.logsumexp(h),
}

NUMBERS = (("1.5", "-2", "1e-3"), (1.5, -2.0, 1e-3))

COLUMNS = {
    "continuous": Row({"type": "continuous"}, *NUMBERS, "inf"),
    "continuous, none": Row({"type": "continuous", "transform": "none"}, *NUMBERS, "1e+39"),
    "continuous, log": Row({"type": "continuous", "transform": "log"}, ("1.5", "2"), (1.5, 2.0), "0"),
    "continuous, log1p": Row({"type": "continuous", "transform": "log1p"}, ("-.5", "2"), (-0.5, 2.0), "-1"),
    "continuous, logit": Row({"type": "continuous", "transform": "logit"}, (".5", ".25"), (0.5, 0.25), "1"),
    "continuous, student_t": Row({"type": "continuous", "likelihood": "student_t"}, *NUMBERS, "x"),
    "count": Row({"type": "count"}, ("0", "7", "3.0"), (0, 7, 3), "-1"),
    "count, dispersed": Row({"type": "count", "likelihood": "negative_binomial"}, ("0", "9"), (0, 9), "1.5"),
    "binary": Row({"type": "binary"}, ("0", "1", "true", "False"), (0, 1, 1, 0), "yes"),
    "binary, words": Row({"type": "binary", "values": ["no", "yes"]}, ("no", "yes"), (0, 1), "1"),
    "categorical": Row({"type": "categorical", "levels": ["a", "b c", 3]}, ("b c", "a", "3"), (1, 0, 2), "d", 3),
    "categorical, two": Row({"type": "categorical", "levels": [1, 2]}, ("2", "1.0"), (1, 0), "0", 2),
}  # fmt: skip

every_column = pytest.mark.parametrize("row", COLUMNS.values(), ids=list(COLUMNS))


def declared(columns: Raw, **more: Any) -> FrameSource:
    return FrameSource.model_validate({"columns": columns, **more})


def laws_of(*columns: Raw) -> list[Law]:
    source = declared({f"c{i}": column for i, column in enumerate(columns)})
    return [column.law(name) for name, column in source.columns.items()]


def module_of(laws: list[Law]) -> Any:
    return ColumnsLikelihood().over(laws).build((len(laws),)).double()


def masked(column: Raw) -> Raw:
    return {**column, "missing": "mask"}


def test_table_is_complete() -> None:
    assert {row.column["type"] for row in COLUMNS.values()} == set(Column.members)
    assert {laws_of(row.column)[0].family for row in COLUMNS.values()} == set(FAMILIES)


@every_column
def test_cells_are_their_numbers(row: Row, tmp_path: Path) -> None:
    x = read(tmp_path, "c,d\n" + "".join(f"{cell},{i}\n" for i, cell in enumerate(row.cells * 3)), row).x
    assert x[: len(row.cells), 0].tolist() == list(row.values)


@every_column
def test_what_a_column_cannot_hold_is_refused_with_line_and_column(row: Row, tmp_path: Path) -> None:
    """FAULTS 20, 30."""
    text = "c,d\n" + "".join(f"{cell},1\n" for cell in (*row.cells, row.bad, *row.cells))
    at = rf"t.csv, line {len(row.cells) + 2}, column 'c'"
    refused(rf"{at}: expected .*; got '?{re.escape(row.bad)}", read, tmp_path, text, row)


@every_column
def test_density_is_scipys_sampled_and_of_unit_mean(row: Row) -> None:
    module = module_of(laws_of(row.column))
    h = torch.randn(6, row.outputs, dtype=torch.float64)
    assert module.inputs == (row.outputs,)
    d = module(h)
    x = d.sample((4,))
    want = [[row.score(h[i].numpy(), float(x[j, i, 0])) for i in range(6)] for j in range(4)]
    np.testing.assert_allclose(d.log_prob(x).detach(), want, rtol=1e-9, atol=1e-9)
    assert d.support.check(x).all()
    # Over 40 000 draws the mean of e^(s - log p), for s the score of the same density at another output, is 1.
    other = module(h + 0.1)
    draws = d.sample((40_000,))
    ratio = (other.log_prob(draws) - d.log_prob(draws)).exp()
    off = (ratio.mean(0) - 1).abs() / (ratio.std(0) / 200 + 1e-12)
    assert (off < 5).all()  # six tests of 5 standard errors: 4e-6 for a new seed, and the seed is fixed


@every_column
def test_missing_values_add_nothing_and_leave_gradients_finite(row: Row) -> None:
    module = module_of(laws_of(masked(row.column), row.column))
    h = torch.randn(5, *module.inputs, dtype=torch.float64, requires_grad=True)
    whole = module(h.detach()).sample()
    holed = whole.clone()
    holed[:3, 0] = torch.nan
    score = module(h).log_prob(holed)
    single = module_of(laws_of(row.column))
    for name, parameter in module.named_parameters():
        dict(single.named_parameters())[name].data.copy_(parameter.data[1:])
    alone = single(h[:, row.outputs :]).log_prob(whole[:, 1:])
    torch.testing.assert_close(score[:3], alone[:3], rtol=0, atol=1e-12)
    assert (module(h).log_prob(whole)[:3] != score[:3]).all()
    score.sum().backward()
    assert torch.isfinite(h.grad).all()
    assert (h.grad[:3, : row.outputs] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_a_mixed_row_is_the_sum_of_its_columns_in_any_order() -> None:
    rows = [COLUMNS[name] for name in ("count", "categorical", "continuous", "binary", "categorical, two", "count")]
    module = module_of(laws_of(*(row.column for row in rows)))
    h = torch.randn(*module.inputs, dtype=torch.float64)
    d = module(h)
    x = d.sample()
    # The decoder's outputs stand by family, in the order of FAMILIES, and there by column.
    order = [2, 0, 5, 3, 1, 4]
    pieces = dict(zip(order, h.split([rows[i].outputs for i in order]), strict=True))
    want = sum(row.score(pieces[i].numpy(), float(x[i])) for i, row in enumerate(rows))
    assert d.log_prob(x).item() == pytest.approx(want, abs=1e-9)
    expected = [math.exp(pieces[0]), int(pieces[1].argmax()), pieces[2].item(), scipy.special.expit(pieces[3].item())]
    assert d.mean[:4].tolist() == pytest.approx(expected)
    spread = d.expand(torch.Size((3, 2)))
    assert spread.sample().shape == (3, 2, 6)
    assert spread.log_prob(x).flatten().tolist() == pytest.approx([want] * 6)


def test_discrete_columns_sum_to_one() -> None:
    names = ("binary", "categorical", "count", "categorical, two")
    module = module_of(laws_of(*(COLUMNS[name].column for name in names)))
    every = torch.tensor(list(itertools.product(range(2), range(3), range(60), range(2))), dtype=torch.float64)
    total = module(torch.randn(*module.inputs, dtype=torch.float64)).log_prob(every).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bad", [(0.0, 0.5), (3.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_support_names_the_column_of_a_bad_value(bad: tuple[float, float]) -> None:
    """FAULTS 20: whole numbers and levels alone, and NaN where it is declared."""
    laws = laws_of({"type": "categorical", "levels": [1, 2, 3]}, masked({"type": "count"}))
    x = torch.tensor([[1.0, 2.0], [2.0, math.nan]] * 10)
    support = ColumnsLikelihood().over(laws).support
    Dataset.from_tensors(x.nan_to_num(0.0)).require_support(support, "")
    assert support.check(x).all()
    x[3] = torch.tensor(bad)
    assert not support.check(x).all()
    with pytest.raises(ValueError, match="within the support"):
        module_of(laws)(torch.zeros(20, 4, dtype=torch.float64)).log_prob(x.double())
    if all(map(math.isfinite, bad)):
        data = Dataset.from_tensors(x.nan_to_num(0.0), validation=x[:2].nan_to_num(0.0), test=x[:1])
        refused(r"train, row \d+, column 'c[01]': expected .*Integer", data.require_support, support, "")


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "t.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def csv_of(folder: Path, text: str | bytes, columns: Raw, **more: Any) -> CSV:
    return CSV.model_validate({"path": str(write(folder, text)), "columns": columns, **more})


def read(folder: Path, text: str, row: Row) -> Any:
    return csv_of(folder, text, {"c": row.column, "d": "continuous"}).read(None, 0)


MIXED: Raw = {
    "size, cm": {"type": "continuous", "transform": "log"},
    "share": {"type": "continuous", "transform": "logit", "missing": "mask"},
    "n": {"type": "count", "missing": "mask"},
    "yes?": {"type": "binary", "values": ["no", "yes"]},
    "kind": {"type": "categorical", "levels": ["a", 'b "x"', "c\nd"], "missing": "mask"},
    "=f": {"type": "continuous", "missing": "mask", "likelihood": "student_t"},
}


def mixed(rows: int = 400) -> pandas.DataFrame:
    """A table of two hidden causes, with holes."""
    random = np.random.RandomState(0)
    z = random.randn(rows, 2)
    frame = pandas.DataFrame({
        "size, cm": np.exp(z[:, 0] + 0.1 * random.randn(rows)),
        "share": scipy.special.expit(z[:, 1] + 0.1 * random.randn(rows)),
        "junk": "left out",
        "n": random.poisson(np.exp(1 + 0.5 * z[:, 1])).astype(float),
        "yes?": np.where(z[:, 0] > 0, "yes", "no"),
        "kind": np.array(["a", 'b "x"', "c\nd"], object)[np.clip((z[:, 1] + 1).astype(int), 0, 2)],
        "=f": 2 * z[:, 1],
        "label": random.choice(["10", "9", "-1"], rows),
    })  # fmt: skip
    for name in ("share", "n", "kind", "=f"):
        frame.loc[random.rand(rows) < 0.1, name] = None
    return frame


def sources(folder: Path, frame: pandas.DataFrame) -> dict[str, Any]:
    """The same table in every form."""
    frame.to_csv(folder / "m.csv", index=False)
    frame.to_csv(folder / "m.tsv", index=False, sep="\t", quoting=csv.QUOTE_ALL, lineterminator="\r\n", na_rep="NA")
    (folder / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "m.csv").read_bytes())
    frame.to_parquet(folder / "m.parquet")

    def of(kind: type[Any], name: str, **more: Any) -> Any:
        return kind.model_validate({"path": str(folder / name), "columns": MIXED, "label": "label", **more})

    return {
        "csv": of(CSV, "m.csv"),
        "csv, streamed": of(CSV, "m.csv", stream=True),
        "tsv": of(CSV, "m.tsv", separator="\t"),
        "bom": of(CSV, "bom.csv"),
        "parquet": of(Parquet, "m.parquet"),
        "parquet, streamed": of(Parquet, "m.parquet", stream=True),
    }


def by_hand(frame: pandas.DataFrame, train: np.ndarray) -> np.ndarray:
    """x of `MIXED`, by pandas alone."""
    out = pandas.DataFrame({
        "size, cm": np.log(frame["size, cm"]),
        "share": scipy.special.logit(frame["share"].astype(float)),
        "n": frame["n"].astype(float),
        "yes?": (frame["yes?"] == "yes").astype(float),
        "kind": frame["kind"].map({'a': 0.0, 'b "x"': 1.0, "c\nd": 2.0}),
        "=f": frame["=f"].astype(float),
    })  # fmt: skip
    for name in ("size, cm", "share", "=f"):
        out[name] = (out[name] - out[name].iloc[train].mean()) / out[name].iloc[train].std(ddof=0)
    return out.to_numpy(np.float64)


@pytest.mark.parametrize("piece", [2**22, 500])
def test_every_form_gives_pandas_own_values(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.data.tables.readers.TEXT_PIECE_BYTES", piece)
    monkeypatch.setattr(readers, "BATCH_ROWS", max(piece // 10, 7))
    frame = mixed()
    forms = sources(tmp_path, frame)
    parts = forms["csv"].read(None, 0).parts
    want = by_hand(frame, np.asarray(parts["train"]))
    made = {name: load(source) for name, source in forms.items()}
    made["frame"] = Dataset.from_frame(frame, MIXED, label="label")
    for name, data in made.items():
        assert isinstance(data.train.rows, Streamed) == name.endswith("streamed")
        for split in data.splits:
            x, rows = split.x.numpy(), np.asarray(parts[split.name])
            np.testing.assert_allclose(x, want[rows], rtol=1e-6, atol=1e-6, err_msg=name)
            assert torch.equal(split.x.nan_to_num(9.0), made["csv"].split(split.name).x.nan_to_num(9.0)), name
            assert [data.label_names[i] for i in split.y] == frame["label"].iloc[rows].tolist()
        assert data.label_names == ("-1", "9", "10")
        assert any(" columns are not declared and left out: 'junk'" in note for note in data.notes), name


def test_rows_come_back_in_the_words_of_the_table(tmp_path: Path) -> None:
    frame = mixed()
    data = load(sources(tmp_path, frame)["csv"])
    rows = sources(tmp_path, frame)["csv"].read(None, 0).parts["test"]
    found = data.table.to_frame(data.test.x)
    want = frame[list(MIXED)].iloc[rows].reset_index(drop=True)
    for name in ("size, cm", "share", "n", "=f"):
        np.testing.assert_allclose(found[name].astype(float), want[name].astype(float), rtol=1e-5, atol=1e-6)
    for name in ("yes?", "kind"):
        assert found[name].astype(object).fillna("?").tolist() == want[name].fillna("?").tolist()


@pytest.mark.parametrize("name", list(WARPS))
def test_transforms_are_undone(name: str) -> None:
    values = np.array([1e-6, 0.2, 0.5, 0.999])
    np.testing.assert_allclose(UNWARPS[name](WARPS[name](values)), values, rtol=1e-9)


def test_a_table_is_decoded_once_and_anew_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 32: what is kept belongs to one version of the file and of the declaration."""
    text, columns = "a,b\n" + "".join(f"{i},{i % 2}\n" for i in range(40)), {"a": "continuous", "b": "binary"}
    source = csv_of(tmp_path, text, columns)
    first = source.read(None, 0).x
    with monkeypatch.context() as patch:
        patch.setattr(readers.TextTable, "pieces", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(source.read(None, 0).x, first)
    write(tmp_path, "a,b\n" + "".join(f"{i + 1},{i % 2}\n" for i in range(40)))
    assert np.array_equal(source.read(None, 0).x[:, 0], first[:, 0] + 1)


def test_a_table_of_any_length_is_decoded_in_the_same_memory(tmp_path: Path) -> None:
    """108 000 rows of 50 columns, 44 MB of text and 41 MiB of numbers, are decoded in less than 30 MiB."""
    random = np.random.RandomState(0)
    block = "\n".join(",".join([f"{v:.5f}" for v in row] + ["red", "7"]) for row in random.randn(1000, 48)) + "\n"
    path = tmp_path / "many.csv"
    with path.open("w") as file:
        file.write(",".join([*(f"c{j}" for j in range(48)), "colour", "n"]) + "\n")
        file.writelines(itertools.repeat(block, 108))
    code = (
        "import sys\n"
        "import pandas\n"
        "from pvae.data.rows import rows\n"
        "from pvae.data.tables import readers\n"
        "from pvae.data.sources.tabular import CSV\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) // 1024\n"
        "rows.CHUNK_ELEMENTS, readers.TEXT_PIECE_BYTES = 2**16, 2**19\n"
        "columns = {f'c{j}': {'type': 'continuous'} for j in range(48)} | {'n': {'type': 'count'}}\n"
        "columns |= {'colour': {'type': 'categorical', 'levels': ['red', 'green']}}\n"
        "start = peak()\n"
        "found = CSV.model_validate({'path': sys.argv[1], 'columns': columns, 'stream': True}).read(None, 0)\n"
        "print(found.x.shape[0], peak() - start)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows, more = map(int, found.split())
    assert rows == 108_000
    assert more < 30, found


AB: Raw = {"a": "continuous", "b": {"type": "categorical", "levels": ["red", "green"]}}

GOOD = "a,b\n1,red\n2,green\n3.5,red\n"

FAULTS: dict[str, tuple[bytes | str, Raw, str]] = {
    "empty": ("", {}, r"t.csv: expected a line of column names; got an empty file"),
    "blank": (" \n", {}, "got an empty file"),
    "header alone": ("a,b\n", {}, "t.csv: expected rows below the names of the columns; got none"),
    "not utf-8": (GOOD.encode() + b"4,r\xe9d\n", {}, "line 5: expected UTF-8; got the byte 0xe9. Set data.encoding"),
    "header not utf-8": (b"a,b,\xff\n1,red,1\n", {}, "line 1: expected UTF-8; got the byte 0xff"),
    "utf-16": (GOOD.encode("utf-16"), {}, "line 1: expected text; got a NUL byte. Set data.encoding"),
    "NUL": (GOOD.encode() + b"4,\0\n", {}, "line 5: expected text; got a NUL byte"),
    "words among numbers": (GOOD + "four,red\n", {}, "line 5, column 'a': expected a finite number; got 'four'"),
    "inf": (GOOD + "4,red\n-Infinity,red\n", {}, "line 6, column 'a': expected a finite number; got -inf"),
    "overflow": (GOOD + "1e999,red\n", {}, "line 5, column 'a': expected a finite number; got inf"),
    "nan": (GOOD + "nan,red\n", {}, "line 5, column 'a': expected a value; got none. Set data.columns.'a'.missing"),
    "NaN by another name": (GOOD + "#N/A,red\n", {}, "line 5, column 'a': .*got '#N/A'"),
    "missing": (GOOD + ",red\n", {}, "line 5, column 'a': expected a value; got none"),
    "missing level": (GOOD + "4,\n", {}, "line 5, column 'b': expected a value; got none"),
    "level": (GOOD + "4,gren\n", {}, r"line 5, column 'b': expected one of 'red', 'green'; got 'gren' \(did you mean"),
    "escapes": (GOOD + "4,\x1b[2J\n", {}, r"line 5, column 'b': expected one of .*; got '\\x1b\[2J'"),
    "too many cells": (GOOD + "4,red,5\n", {}, "line 5: expected 2 cells, as the header has; got 3"),
    "too few cells": (GOOD + "4\n5,red\n", {}, "line 5: expected 2 cells, as the header has; got 1"),
    "named twice": ("a,b,a\n1,red,2\n", {}, "line 1: expected every column to be named once; got 'a' 2 times"),
    "column not there": ("aa,b\n1,red\n", {}, r"expected a column 'a'; got 'aa', 'b' \(did you mean 'aa'\?\)"),
    "label not there": (GOOD, {"label": "bb"}, r"expected a column 'bb'; got 'a', 'b' \(did you mean 'b'\?\)"),
    "label missing": ("a,b,l\n1,red,x\n2,red,\n", {"label": "l"}, "line 3, column 'l': expected a label; got none"),
    "long header": ("a" * (MAX_HEADER_BYTES + 2) + "\n1\n", {}, "line 1: expected column names in at most 1 MiB"),
    "a million columns": (
        ",".join(map(str, range(1_000_000))) + "\n", {}, "line 1: expected column names in at most 1 MiB; got more"
    ),
    "a header cell too long for the parser": ("a," + "b" * 200_000 + "\n1,2\n", {}, "line 1: expected column names"),
    "open quote": (GOOD + '4,"red\n5,red\n', {}, "line 5: expected a closing quote; got the end of the file"),
    "stray quote": (GOOD + '4,re"d\n5,r"ed\n', {}, "line 5: expected quotes around a whole cell; got one in the"),
    "carriage returns": (GOOD + "4,red\r5,red\n", {}, "line 5: expected lines that end in a line feed"),
    "another separator": (GOOD.replace(",", ";"), {}, "expected a column 'a'; got 'a;b'"),
    "after quoted lines": ('a,b,c\n1,red,"x\ny\nz"\n2,blue,w\n', {}, "line 5, column 'b': .* got 'blue'"),
    "bad and far": (GOOD + "5,red\n" * 3000 + "x,red\n", {}, "line 3005, column 'a': expected .* got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=list(FAULTS))
def test_faults_of_text_are_data_errors_with_the_line(case: str, tmp_path: Path) -> None:
    """FAULTS 19, 20, 30 and 38 for tables of text."""
    text, more, match = FAULTS[case]
    with pytest.raises(DataError, match=match) as caught:
        csv_of(tmp_path, text, AB, **more).read(None, 0)
    assert "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 65


def test_pieces_do_not_move_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same culprit, whatever the size of the pieces, quoted line feeds and empty lines among them."""
    text = "a,b,c\n" + '1,red,"x\n,\n"\r\n\n2,green,"q"""\n' * 50 + "3,pink,\n"
    source = csv_of(tmp_path, text, AB)
    for piece in (2**22, 1, 5, 64, 1000):
        monkeypatch.setattr("pvae.data.tables.readers.TEXT_PIECE_BYTES", piece)
        refused(r"line 252, column 'b': expected one of .* got 'pink'", source.read, None, 0)
    assert csv_of(tmp_path, text.replace("pink", "red"), AB).read(None, 0).x.shape == (101, 2)


def test_a_record_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.data.tables.readers.TEXT_PIECE_BYTES", 100)
    monkeypatch.setattr("pvae.data.tables.readers.MAX_RECORD_BYTES", 1000)
    source = csv_of(tmp_path, GOOD + '4,"' + "x\n" * 3000, AB)
    refused("line 5: expected a record of at most .* MiB; got a longer one. Close its quo", source.read, None, 0)


def parquet(folder: Path, frame: pandas.DataFrame) -> Parquet:
    frame.to_parquet(folder / "t.parquet")
    return Parquet.model_validate({"path": str(folder / "t.parquet"), "columns": AB})


FRAMES: dict[str, tuple[Raw, str]] = {
    "words among numbers": ({"a": ["one", "2"], "b": ["red"] * 2}, "row 0, column 'a': .* got 'one'"),
    "truth among numbers": ({"a": [True, False], "b": ["red", "red"]}, "row 0, column 'a': .* got 'True'"),
    "infinite": ({"a": [1.0, np.inf], "b": ["red", "red"]}, "row 1, column 'a': expected a finite number; got inf"),
    "missing": ({"a": [1.0, None], "b": ["red", "red"]}, "row 1, column 'a': expected a value; got none"),
    "missing word": ({"a": [1.0, 2.0], "b": ["red", None]}, "row 1, column 'b': expected a value; got none"),
    "level": ({"a": [1.0, 2.0], "b": ["red", "blue"]}, "row 1, column 'b': expected one of 'red', 'green'; got 'blue'"),
    "column not there": ({"a": [1.0]}, "expected a column 'b'; got 'a'"),
    "dates": ({"a": pandas.to_datetime(["2020-01-01"]), "b": ["red"]}, "row 0, column 'a': expected a finite number"),
    "no rows": ({"a": [], "b": []}, "rows"),
}


@pytest.mark.parametrize("case", FRAMES, ids=list(FRAMES))
def test_faults_of_typed_tables_are_data_errors_with_the_row(case: str, tmp_path: Path) -> None:
    raw, match = FRAMES[case]
    refused(match, Dataset.from_frame, pandas.DataFrame(raw), AB)
    refused(match, parquet(tmp_path, pandas.DataFrame(raw)).read, None, 0)


def test_faults_of_frames_and_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 6 and 26 for Parquet, and a package that is not there."""
    refused("expected a pandas DataFrame; got ndarray", Dataset.from_frame, np.zeros((3, 2)), AB)
    with pytest.raises(DataError, match="named once; got 'a' 2 times"):
        Dataset.from_frame(pandas.DataFrame(np.zeros((3, 2)), columns=["a", "a"]), {"a": "continuous"})
    with pytest.raises(DataError, match="expected numbers and words; got something else"):
        Dataset.from_frame(pandas.DataFrame({"a": [1.0, 2.0], "b": [["x"], ["y"]]}), AB)
    with pytest.raises(
        DeclarationError, match=r"from_frame: columns.a.type: expected one of .*; got \"continous\" \(d"
    ):
        Dataset.from_frame(pandas.DataFrame({"a": [1.0]}), {"a": "continous"})
    source = parquet(tmp_path, pandas.DataFrame({"a": np.arange(3000.0), "b": ["red", "green"] * 1500}))
    whole = Path(source.path).read_bytes()
    for broken in (b"", b"PAR1", b"a,b\n1,red\n", whole[:-20], whole[:100] + bytes(400) + whole[500:]):
        Path(source.path).write_bytes(broken)
        refused("t.parquet: expected a (whole )?Parquet file; got a broken", source.read, None, 0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"expected pyarrow.*pip install 'pvae-pyro\[parquet\]'") as caught:
        source.read(None, 0)
    assert caught.value.exit_code == 69


def test_columns_that_say_nothing_are_refused() -> None:
    """FAULTS 24: a column that is constant or all missing in train."""
    frame = pandas.DataFrame({"a": [2.0] * 40, "b": ["red", "green"] * 20})
    refused(r"data.columns.'a': expected a column that varies in train; got 2 alone", Dataset.from_frame, frame, AB)
    hole = {"a": {"type": "continuous", "missing": "mask"}, "b": AB["b"]}
    with pytest.raises(DataError, match=r"data.columns.'a': expected values in train; got none, all are missing"):
        Dataset.from_frame(frame.assign(a=np.nan), hole)


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.parquet"])
def test_a_guessed_declaration_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = mixed().assign(id=range(400), text=[f"row {i}" for i in range(400)])
    sources(tmp_path, frame)
    monkeypatch.chdir(tmp_path)
    out, _ = run_cli("columns", name, "--label", "label")
    found = tomllib.loads(out)["data"]["columns"]
    kinds = {column: (kind["type"], kind.get("missing", "error")) for column, kind in found.items()}
    assert kinds == {column: (raw["type"], raw.get("missing", "error")) for column, raw in MIXED.items()}
    for left in ("id", "text", "junk"):
        assert f'# left out: "{left}"' in out
    (tmp_path / "made.toml").write_text(out)
    checked, _ = run_cli("check", "made.toml", "--build")
    assert "x [6], 320 training rows" in checked


def test_guesses_of_single_columns() -> None:
    from pvae.data.tables.guess import column_of

    def of(*cells: Any) -> Any:
        return column_of(pandas.Series(list(cells), dtype=object))

    assert of("0", "1", "1") == {"type": "binary"}
    assert of("2", "1", "2") == {"type": "binary", "values": [1, 2]}
    assert of("true", "false", None) == {"type": "binary", "values": ["false", "true"], "missing": "mask"}
    assert of("3", "1", "2", "2")["type"] == "count"
    assert of(*map(str, range(20_000, 90_000, 7000)), "5") == {"type": "continuous", "transform": "log1p"}
    assert of("-3", "1", "2") == {"type": "continuous"}
    assert of(*(str(math.exp(v)) for v in np.random.RandomState(0).randn(200) * 1.5))["transform"] == "log"
    assert of("b", "a", "c", "a") == {"type": "categorical", "levels": ["a", "b", "c"]}
    assert of("x", "x") == "one value alone"
    assert of(None, None) == "no value"
    assert of("4", "5", "6", "7") == "a number for every row"


@pytest.mark.parametrize("gap", [None, math.nan, pandas.NA, pandas.NaT], ids=["None", "nan", "NA", "NaT"])
def test_every_missing_value_of_pandas_is_missing(gap: Any) -> None:
    cells = pandas.DataFrame(
        {"a": pandas.Series([1.0, gap, 2.0, 4.0] * 5, dtype=object), "b": ["x", gap, "y", "x"] * 5}
    )
    columns: dict[str, dict[str, Any]] = {
        "a": {"type": "count", "missing": "mask"},
        "b": {"type": "categorical", "missing": "mask", "levels": ["x", "y"]},
    }
    x = np.concatenate([split.x.numpy() for split in Dataset.from_frame(cells, columns).splits])
    assert (np.isnan(x).sum(0) == 5).all()


def test_files_without_a_column_are_not_guessed(tmp_path: Path) -> None:
    for text, match in (
        ("a\n1\n1\n", "expected a column that varies; got 'a'"),
        ("a\n", "got none"),
        ("", "an empty file"),
    ):
        _, err = run_cli("columns", str(write(tmp_path, text)), code=65)
        assert match in err
    _, err = run_cli("columns", str(write(tmp_path, GOOD)), "--label", "bb", code=65)
    assert "did you mean 'b'" in err


def test_words_stay_words_wherever_a_piece_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """007, 7 and 01 are three words, in the first piece of a file as in the last."""
    words = ["01", "1", "007"] * 10 + ["01", "1", "u"] * 10
    monkeypatch.setattr("pvae.data.tables.readers.TEXT_PIECE_BYTES", 64)
    columns = {"x": "continuous", "g": {"type": "categorical", "levels": ["01", "1", "007", "u"]}}
    text = "g,x,h\n" + "".join(f"{w},{i / 2},{w}\n" for i, w in enumerate(words))
    data = load(csv_of(tmp_path, text, columns, label="h"))
    assert sorted(data.label_names or ()) == ["007", "01", "1", "u"]
    for split in data.splits:
        assert split.y is not None
        codes = split.x[:, 1].long().tolist()
        names = [(data.label_names or ())[y] for y in split.y.tolist()]
        assert [("01", "1", "007", "u")[code] for code in codes] == names


def test_cells_that_are_lists_are_refused(tmp_path: Path) -> None:
    """FAULTS 30: also where Parquet can hold them."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [[1.0, 2.0], [3.0], [4.0], [5.0]]}), tmp_path / "t.parquet")
    for column in ("binary", "continuous"):
        source = Parquet.model_validate({"path": str(tmp_path / "t.parquet"), "columns": {"a": column}})
        refused("something else|expected", load, source)


def test_an_index_that_was_changed_is_made_again(tmp_path: Path) -> None:
    """FAULTS 32: what labels are called stands beside the arrays."""
    text = "x,h\n" + "".join(f"{i},{'uvw'[i % 3]}\n" for i in range(60))
    source = csv_of(tmp_path, text, {"x": "continuous"}, label="h")
    first = load(source)
    (index,) = cache_folder().glob("decoded/*/index.json")
    index.write_text(index.read_text().replace('"u"', '"x"'))
    again = load(source)
    assert again.label_names == first.label_names == ("u", "v", "w")
    assert again.fingerprint == first.fingerprint
