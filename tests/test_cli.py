"""The command line: what people see, exit codes, signals; faults 12, 14, 16, 19, 20, 34."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pvae
from pvae import cli
from pvae.component import IMPORTED
from pvae.nn.schedules import Schedule
from pvae.runs.listing import list_runs

TINY = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    """Output and errors of a command run in this process; its exit code is checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured.out, captured.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run called vae."""
    folder = tmp_path_factory.mktemp("runs")
    pvae.fit("vae", *TINY, "train.epochs=2", run_dir=folder, device="cpu", progress=False)
    return folder


def test_light_commands_import_no_torch(tmp_path: Path) -> None:
    for command in (["--help"], ["list"], ["runs"], ["--version"]):
        code = (
            "import sys\nfrom pvae import cli\n"
            f"sys.argv = ['pvae', *{command!r}]\n"
            "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
            "heavy = {'torch', 'pyro', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_list_and_new_and_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = run_cli("list", "--json", capsys=capsys)
    assert {"vae", "vae_normal", "hvae"} <= {row["name"] for row in json.loads(out)}
    out, _ = run_cli("new", "my first", capsys=capsys)
    assert "pvae check" in out
    file = next(tmp_path.glob("*.toml"))
    assert pvae.Experiment.load(file).name == "my first"
    run_cli("check", str(file), capsys=capsys)
    out, _ = run_cli("check", str(file), "--build", capsys=capsys)
    assert "parameters" in out
    assert "nats per datum" in out
    _, err = run_cli("new", "my first", capsys=capsys, code=2)
    assert "there already" in err
    out, _ = run_cli("schema", capsys=capsys)
    assert json.loads(out)["title"] == "Experiment"


def test_new_from_a_zoo_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_cli("new", "hvae", capsys=capsys)
    assert set(pvae.Experiment.load(tmp_path / "hvae.toml").latents) == {"z1", "z2"}
    run_cli("new", "t\U0001f600x", capsys=capsys)
    _, err = run_cli("new", "../a", capsys=capsys, code=2)
    assert "not a path" in err
    assert all(pvae.Experiment.load(path) for path in tmp_path.glob("*.toml"))


def test_a_run_says_which_import_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half.py").write_text(
        "from typing import Literal\nfrom pvae.nn.schedules import Schedule\n"
        "class Half(Schedule):\n"
        "    kind: Literal['test_half'] = 'test_half'\n"
        "    def at(self, epoch, epochs):\n        return 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    where = ["--run-dir", str(tmp_path / "runs")]
    arguments = ["fit", "vae", *TINY, "train.epochs=1", "objective.beta.kind=test_half", "--quiet", *where]
    monkeypatch.syspath_prepend(str(tmp_path))
    run_cli("--import", "half", *arguments, capsys=capsys)
    Schedule.members.pop("test_half")
    IMPORTED.clear()
    _, err = run_cli("surgery", "latest", *where, capsys=capsys, code=2)
    assert "fitted with `pvae --import half`" in err


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run_cli("show", "hvae", capsys=capsys)
    for text in ("p(x, z2, z1) = p(z2) p(z1 | z2) p(x | z1, z2)", "q(z1 | x, z2)", "total", "[1, 8, 8]"):
        assert text in out


def test_declaration_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 34: every finding is one line, no traceback."""
    _, err = run_cli("fit", "vae", "train.epoch=2", "latents.z.dim=true", capsys=capsys, code=2)
    assert "vae: train.epoch:" in err
    assert "vae: latents.z.dim: expected a valid integer; got true." in err
    assert "Traceback" not in err
    _, err = run_cli("fit", "vea", capsys=capsys, code=2)
    assert "did you mean 'vae'" in err
    run_cli("no-such-command", capsys=capsys, code=2)


def test_runs_surgery_evidence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--run-dir", str(runs)]
    out, _ = run_cli("runs", *where, capsys=capsys)
    assert "finished" in out
    out, _ = run_cli("runs", "--json", *where, capsys=capsys)
    assert json.loads(out)[0]["name"] == "vae"
    out, _ = run_cli("surgery", "vae", "--json", "--samples", "2", *where, capsys=capsys)
    figures = json.loads(out)["figures"]
    assert figures["elbo"]["value"] == pytest.approx(figures["reconstruction"]["value"] - figures["kl"]["value"])
    out, _ = run_cli("surgery", "latest", *where, capsys=capsys)
    assert "marginal KL" in out
    assert "I_q[x, z]" in out
    out, _ = run_cli("surgery", "latest", "--rows", "50", "--json", *where, capsys=capsys)
    assert json.loads(out)["n"] == 50
    out, _ = run_cli("evidence", "latest", "--samples", "20", "--json", *where, capsys=capsys)
    assert json.loads(out)["figures"]["iwae_20"]["kind"] == "lower_bound"
    _, err = run_cli("surgery", "latest", "--split", "tset", *where, capsys=capsys, code=2)
    assert "test" in err
    _, err = run_cli("surgery", "veae", *where, capsys=capsys, code=2)
    assert "vae" in err


ON_A_DEVICE = ("surgery", "evidence", "gap", "two-sample", "posterior")
"""Analyses that a GPU makes faster; `test_cuda.py` runs them there."""


@pytest.mark.parametrize("command", ON_A_DEVICE)
def test_an_analysis_goes_to_the_device_that_is_named(
    command: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [command, "latest", "--run-dir", str(runs), "--device"]
    _, err = run_cli(*given, "cuda", capsys=capsys, code=71)
    assert "Use --device cpu" in err
    _, err = run_cli(*given, "gpu", capsys=capsys, code=2)
    assert "expected auto, cpu or cuda; got 'gpu'" in err


def test_surgery_of_two_splits_and_by_class(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--run-dir", str(runs)]
    out, _ = run_cli("surgery", "latest", "--split", "both", "--by-class", "--rows", "150", *where, capsys=capsys)
    assert "train n = 150, test n = 150" in out
    assert "train_gain" in out
    assert "by label of train" in out
    assert "by label of test" in out
    out, _ = run_cli("surgery", "latest", "--split", "both", "--json", *where, capsys=capsys)
    found = json.loads(out)["splits"]
    assert found["test"]["figures"]["train_gain"]["kind"] == "estimate"
    assert found["train"]["figures"]["train_gain"] is None
    assert set(found["test"]["classes"]) == {str(i) for i in range(10)}
    out, _ = run_cli("surgery", "latest", "--components", "50", *where, capsys=capsys)
    assert "mutual_information_lower" in out
    assert "components are a subset" in out


@pytest.mark.parametrize(
    ("method", "term"), [("iwae", "iwae_20"), ("prior", "jensen"), ("ais", "ais_5"), ("bracket", "upper")]
)
def test_evidence_by_every_method(runs: Path, capsys: pytest.CaptureFixture[str], method: str, term: str) -> None:
    options = ["--method", method, "--rows", "4", "--samples", "20", "--temperatures", "5", "--chains", "2"]
    out, _ = run_cli("evidence", "latest", *options, "--run-dir", str(runs), capsys=capsys)
    assert term in out
    out, _ = run_cli("evidence", "latest", *options, "--json", "--run-dir", str(runs), capsys=capsys)
    assert json.loads(out)["figures"][term]["value"] < 0
    assert json.loads(out)["n"] == 4


def test_an_unknown_method_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run_cli("evidence", "latest", "--method", "magic", "--run-dir", str(runs), capsys=capsys, code=2)
    assert "expected one of iwae, prior, ais, bracket; got 'magic'" in err


def test_gap(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["gap", "latest", "--rows", "5", "--steps", "3", "--run-dir", str(runs)]
    out, _ = run_cli(*options, capsys=capsys)
    assert "approximation" in out
    assert "amortisation" in out
    out, _ = run_cli(*options, "--json", capsys=capsys)
    assert json.loads(out)["figures"]["amortisation"]["kind"] == "lower_bound"


def test_finished_run_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 12."""
    out, _ = run_cli("resume", "vae", "--run-dir", str(runs), capsys=capsys)
    assert "nothing to resume" in out


def npz(path: Path, x: np.ndarray) -> str:
    """An npz file; returns an override that names it."""
    np.savez(path, x=x)
    return f"data.path={json.dumps(str(path))}"


def test_data_that_cannot_be_scored_exit_65(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 19 and 20: where it is, and what to do."""
    x = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    options = ["data.source=npz", "data.binarize=none", *TINY, "--run-dir", str(tmp_path / "runs")]
    _, err = run_cli("fit", "vae", npz(tmp_path / "grey.npz", x), *options, capsys=capsys, code=65)
    assert "data.binarize" in err
    x[3, 2] = np.nan
    _, err = run_cli("fit", "vae", npz(tmp_path / "nan.npz", x), *options, capsys=capsys, code=65)
    assert "row 3" in err
    assert not (tmp_path / "runs").exists(), "nothing may be left of a fit that never started"


# ---------------------------------------------------------------------- processes


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`pvae fit vae` in a process of its own, well under way."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pvae",
            "fit",
            "vae",
            *TINY,
            *arguments,
            "--run-dir",
            str(folder),
            "--device",
            "cpu",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and child.poll() is None:
        if any(path.stat().st_size for path in folder.glob("*/*/metrics.jsonl")):
            return child
        time.sleep(0.02)
    child.kill()  # one that is merely slow would be waited for for ever
    raise AssertionError(child.communicate())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_checkpoint_and_say_how_to_go_on(tmp_path: Path, name: str, code: int) -> None:
    """FAULTS 14."""
    child = start(tmp_path, "train.epochs=100000", "train.checkpoint_seconds=1000")
    child.send_signal(getattr(signal, name))
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert "pvae resume" in err
    assert "Traceback" not in err
    run = pvae.Run.load(next(tmp_path.glob("*/*")))
    assert run.status["state"] == "interrupted"
    assert run.checkpoint.step > 0


def test_a_second_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 16."""
    child = start(tmp_path, "train.epochs=100000")
    try:
        run = next(tmp_path.glob("*/*"))
        _, err = run_cli("resume", str(run), "--quiet", "--device", "cpu", capsys=capsys, code=75)
        assert str(child.pid) in err
    finally:
        child.kill()
        child.communicate()
    assert [row["state"] for row in list_runs(tmp_path)] == ["stale"]


def test_broken_pipe_is_quiet() -> None:
    """FAULTS 42."""
    shell = f"{sys.executable} -m pvae schema | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={**os.environ}, check=False)
    assert "Traceback" not in done.stderr
