"""Every exit code, and the JSON documents of commands."""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from torch import Tensor

from pvae import cli
from pvae.cli.app import app
from pvae.errors import EXIT_CODES, PvaeError, StorageError
from pvae.runs.rundir import RunDirectory
from pvae.training import loop
from pvae.training.trainer import Trainer
from tests.cli_runner import TINY, npz, run_cli
from tests.faults.injected import ASLEEP, disk_full, without_naps

TESTS = Path(__file__).parents[1]


def no_such_package(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A table that only an optional package can read."""
    patch.setitem(sys.modules, "pyarrow", None)
    (folder / "table.parquet").write_bytes(b"PAR1")
    declared = f'data={{source="parquet", path="{folder / "table.parquet"}", columns={{a="continuous"}}}}'
    return ["check", "vae", declared, "decoder.likelihood=columns", "--build"]


def signalled(name: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    """A fit that gets a signal at its third step."""

    def arguments(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        original = loop.step

        def step(trainer: Trainer, index: Tensor) -> bool:
            if trainer.state.step == 2:
                os.kill(os.getpid(), getattr(signal, name))
            return original(trainer, index)

        patch.setattr(loop, "step", step)
        return fitting(folder)

    return arguments


def fitting(folder: Path, *more: str) -> list[str]:
    """A short fit."""
    return [
        "fit",
        "vae",
        *TINY,
        "train.epochs=1",
        *more,
        "--quiet",
        "--device",
        "cpu",
        "--run-dir",
        str(folder / "new"),
    ]


def with_nan(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    """A fit of data with a NaN."""
    return fitting(folder, npz(folder / "x.npz", np.full((50, 4), np.nan)), "data.source=npz", "data.binarize=none")


def on_a_file(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    """Runs to be kept where a file stands."""
    (folder / "new").touch()
    return fitting(folder)


def no_room(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A fit on a disk that takes no file of weights."""
    without_naps(patch)
    return fitting(folder)


def no_gpu(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A GPU is asked for where there is none."""
    patch.setattr(torch.cuda, "is_available", lambda: False)
    return [*fitting(folder), "--device", "cuda"]


ENDS: list[tuple[int, Callable[[Path, pytest.MonkeyPatch], list[str]], str]] = [
    (0, lambda *_: ["list"], ""),
    (1, lambda folder, _: fitting(folder, "train.optimizer.lr=1e30"), "loss not finite"),
    (2, lambda *_: ["fit", "vea"], "did you mean 'vae'"),
    (2, lambda *_: ["fit", "vae", "--no-such-option"], "No such option"),
    (3, lambda folder, _: [*fitting(folder, *ASLEEP), "--strict"], "alert: "),
    (65, with_nan, "row 0"),
    (69, no_such_package, "pyarrow"),
    (71, no_gpu, "Use --device cpu"),
    (73, on_a_file, "Choose another"),
    (74, no_room, "File too large"),
    (130, signalled("SIGINT"), "pvae resume"),
    (143, signalled("SIGTERM"), "pvae resume"),
]


@pytest.mark.parametrize(("code", "arguments", "said"), ENDS, ids=[str(end[0]) for end in ENDS])
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, arguments: Any, said: str) -> None:
    """FAULTS 2, 14, 19, 40, 42: every way to end, without a traceback."""
    given = arguments(tmp_path, monkeypatch)
    with disk_full(8192 if code == 74 else resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        _, err = run_cli(*given, code=code)
    assert said in err
    assert "Traceback" not in err


def test_a_busy_run_is_75(runs: Path) -> None:
    """FAULTS 16, 41: one process writes; a second is told which."""
    run = RunDirectory.open("vae", root=runs)
    with run.held():
        given = ["resume", str(run.path), "train.epochs=3", "--allow-changes", "--device", "cpu"]
        _, err = run_cli(*given, code=75)
    assert "expected a run that nobody holds" in err


def test_exit_codes_are_documented() -> None:
    """FAULTS 42: in `pvae --help` and in CONTRIBUTING.md; every error has one of them."""
    out, _ = run_cli("--help")
    contributing = (TESTS.parent / "CONTRIBUTING.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^ +{code} {re.escape(meaning)}$", out, re.MULTILINE)
        assert f"| {code} | {meaning} |" in contributing
    kinds: list[type[PvaeError]] = [PvaeError, *PvaeError.__subclasses__(), *StorageError.__subclasses__()]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)
    assert {end[0] for end in ENDS} | {75, 141} == set(EXIT_CODES)


def test_traceback_is_shown_when_it_is_asked_for() -> None:
    """FAULTS 38, 42: of deliberate errors, and of bugs, which say so and end with 1."""
    _, err = run_cli("--traceback", "fit", "vea", code=2)
    assert "Traceback (most recent call last)" in err
    assert err.rstrip().endswith("(did you mean 'vae'?).")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pvae.experiment.zoo.entries", lambda: os.environ["\x1b[31m"])
        _, err = run_cli("list", code=1)
        assert err.startswith("unexpected error KeyError: '\\x1b[31m'; run again with `pvae --traceback ...`")
        assert "Traceback" not in err
        _, err = run_cli("--traceback", "list", code=1)
        assert "Traceback (most recent call last)" in err


# ---------------------------------------------------------------------- one JSON document

PICTURES = ["--rows", "4", "--out", "OUT/shown"]
PRINTS_JSON: dict[str, list[str]] = {
    "list": [],
    "columns": ["OUT/table.csv"],
    "check": ["vae", "--build"],
    "show": ["vae"],
    "fit": ["vae", *TINY, "train.epochs=1", "--device", "cpu", "--run-dir", "OUT"],
    "resume": ["vae"],
    "refit": ["vae", "latents.z.prior.kind=mixture", "train.epochs=1", "--rows", "50", "--run-dir", "OUT"],
    "runs": [],
    "surgery": ["vae"],
    "evidence": ["vae", "--rows", "4", "--samples", "5"],
    "gap": ["vae", "--rows", "4", "--steps", "2"],
    "gradients": ["vae", "--rows", "4", "--draws", "5"],
    "calibration": ["vae", "--rows", "20"],
    "posterior": ["vae", "--rows", "4", "--draws", "5", "--out", "OUT/draws.nc"],
    "report": ["vae", "--evidence-samples", "10", "--gap-steps", "5"],
    "explore": ["vae", "--rows", "20", "--samples", "2", "--out", "OUT/explorer.html"],
    "export": ["vae", "tensorboard"],
    "sample": ["vae", "-n", "4", "--out", "OUT/shown"],
    "encode": ["vae", *PICTURES],
    "reconstruct": ["vae", *PICTURES],
    "score": ["vae", "--rows", "4", "--samples", "5", "--out", "OUT/scores.csv"],
    "impute": ["vae", "--rows", "4", "--samples", "5", "--out", "OUT/made.npz"],
    "traverse": ["vae", "--steps", "2", "--dims", "0", "--out", "OUT/shown"],
    "interpolate": ["vae", "0", "1", "--steps", "2", "--out", "OUT/shown"],
    "copying": ["vae", "--rows", "20"],
    "probe": ["vae", "--rows", "20"],
    "rate-distortion": ["vae", *PICTURES],
    "verify": ["vae"],
    "doctor": [],
    "clean": [],
}
SLOW = {"audit", "selfcheck", "two-sample", "critic", "compare", "study"}
"""Print JSON in tests of their own."""
NO_JSON = {
    "new": "writes a file for people to edit",
    "schema": "prints nothing but JSON",
    "study-work": "works for `pvae study`, which prints",
}


def commands() -> dict[str, Any]:
    """Every command of the application by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_every_command_prints_json_or_says_why_not() -> None:
    """FAULTS 42: nobody has to read tables by program."""
    with_json = {name for name, command in commands().items() if any("--json" in p.opts for p in command.params)}
    assert with_json == set(PRINTS_JSON) | SLOW
    assert set(commands()) == with_json | set(NO_JSON)


@pytest.mark.fast(*(PRINTS_JSON.keys() - {"report"}))
@pytest.mark.parametrize("command", PRINTS_JSON)
def test_standard_output_is_one_json_document(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """FAULTS 42: progress and remarks go to standard error."""
    (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i / 7:.3f},{i % 2}\n" for i in range(50)))
    given = [text.replace("OUT", str(tmp_path)) for text in PRINTS_JSON[command]]
    if "--run-dir" not in given and "run_dir" in {p.name for p in commands()[command].params}:
        given += ["--run-dir", str(runs)]
    if command == "refit":
        given[0] = str(next(runs.glob("vae/*")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", command, *given, "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    assert caught.value.code in (0, 1 if command == "doctor" else 0), captured.err
    found = json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert found
