"""Tests of terminal output: every command that prints a table reads well at 80 columns, and at 140."""

import re
from pathlib import Path

import pytest

import pvae
from tests.cli_runner import TINY, run_cli

COMMANDS = {
    "list": [], "show": ["vae"], "check": ["vae"], "columns": ["table.csv"], "runs": ["RUNS"], "clean": ["RUNS"],
    "doctor": ["RUNS"], "verify": ["latest", "RUNS"], "surgery": ["latest", "RUNS"],
    "surgery of both": ["latest", "--split", "both", "RUNS"], "calibration": ["latest", "RUNS"],
    "surgery by class": ["latest", "--by-class", "RUNS"], "probe": ["latest", "RUNS"],
    "evidence": ["latest", "--samples", "20", "--rows", "50", "RUNS"], "copying": ["latest", "RUNS"],
    "gap": ["latest", "--rows", "20", "--steps", "5", "RUNS"], "rate-distortion": ["latest", "RUNS"],
    "gradients": ["latest", "--rows", "20", "--draws", "4", "RUNS"], "posterior": ["latest", "RUNS"],
}  # fmt: skip
"""Arguments by command; what follows the first word tells its cases apart."""
CHANGES = re.compile(r"[\d.e+-]+")
"""Figures, of which times differ from call to call."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    pvae.fit("vae", *TINY, "train.epochs=2", run_dir=found, device="cpu", progress=False)
    (found / "table.csv").write_text("age,kind\n" + "".join(f"{i / 7:.3f},{'xy'[i % 2]}\n" for i in range(60)))
    return found


def shown(name: str, folder: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a command in a terminal of that many columns, but for paths, which are never broken."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(folder)
    given = [part for argument in COMMANDS[name] for part in (["--run-dir", "."] if argument == "RUNS" else [argument])]
    text = re.sub(r"\x1b\[[0-9;]*m", "", run_cli(name.split()[0], *given, terminal=True)[0])
    text = text.split("decoder: choose")[0]  # what is chosen depends on times
    return [line for line in text.splitlines() if "/" not in line.split(" ")[-1]]


def words(lines: list[str]) -> set[str]:
    """The words of lines; a column of explanations may be left out with its title."""
    found = {word for line in lines for word in re.split(r"[\s│┃┏┓┗┛━┳┡╇┩└┴┘┼├┤─]+", line)}
    return {word for word in found if word and "/" not in word and not CHANGES.fullmatch(word)} - {"what", "it", "is"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_well_at_any_width(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, no word is broken or cut, and an error stands beside its value."""
    whole = words(shown(name, folder, 400, monkeypatch))
    for width in (80, 140):
        lines = shown(name, folder, width, monkeypatch)
        assert not [line for line in lines if len(line) > width]
        assert whole <= words(lines)
        assert not [line for line in lines if re.search(r"(^|[│┃]) *±|± *([│┃]|$)", line)]
