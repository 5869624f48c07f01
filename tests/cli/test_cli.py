"""The command line: what people see, exit codes, signals; faults 12, 14, 16, 19, 20, 34."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import pvae
from pvae.component import IMPORTED
from pvae.nn.schedules import Schedule
from tests.cli_runner import TINY, npz, run_cli, run_cli_json, write_schedule


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a folder with one finished run called vae."""
    folder = tmp_path_factory.mktemp("runs")
    pvae.fit("vae", *TINY, "train.epochs=2", run_dir=folder, device="cpu", progress=False)
    return ["--run-dir", str(folder)]


def test_light_commands_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pvae import cli\n"
        "for command in (['--help'], ['list'], ['runs'], ['--version']):\n"
        "    sys.argv = ['pvae', *command]\n"
        "    try:\n        cli.main()\n    except SystemExit as e:\n        assert not e.code, e.code\n"
        "heavy = {'torch', 'pyro', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_list_and_new_and_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"vae", "vae_normal", "hvae"} <= {row["name"] for row in run_cli_json("list")}
    assert "pvae check" in run_cli("new", "my first")[0]
    file = next(tmp_path.glob("*.toml"))
    assert pvae.Experiment.load(file).name == "my first"
    run_cli("check", str(file))
    out, _ = run_cli("check", str(file), "--build")
    assert "parameters" in out
    assert "nats per datum" in out
    assert "ELBO of 4 rows" in run_cli("check", "exemplar", "--build")[0]  # a prior that is made of data
    assert "there already" in run_cli("new", "my first", code=2)[1]
    assert json.loads(run_cli("schema")[0])["title"] == "Experiment"
    run_cli("new", "hvae")  # from the zoo
    assert set(pvae.Experiment.load(tmp_path / "hvae.toml").latents) == {"z1", "z2"}
    run_cli("new", "t\U0001f600x")
    assert "not a path" in run_cli("new", "../a", code=2)[1]
    assert all(pvae.Experiment.load(path) for path in tmp_path.glob("*.toml"))


def test_a_run_says_which_import_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_schedule(tmp_path / "half.py", "test_half")
    monkeypatch.chdir(tmp_path)
    where = ["--run-dir", str(tmp_path / "runs")]
    arguments = ["fit", "vae", *TINY, "train.epochs=1", "objective.beta.kind=test_half", "--quiet", *where]
    monkeypatch.syspath_prepend(str(tmp_path))
    run_cli("--import", "half", *arguments)
    Schedule.members.pop("test_half")
    IMPORTED.clear()
    _, err = run_cli("surgery", "latest", *where, code=2)
    assert "fitted with `pvae --import half`" in err


def test_show() -> None:
    out, _ = run_cli("show", "hvae")
    for text in ("p(x, z2, z1) = p(z2) p(z1 | z2) p(x | z1, z2)", "q(z1 | x, z2)", "total", "[1, 8, 8]"):
        assert text in out


def test_declaration_errors_exit_2() -> None:
    """FAULTS 34: every finding is one line, no traceback."""
    _, err = run_cli("fit", "vae", "train.epoch=2", "latents.z.dim=true", code=2)
    assert "vae: train.epoch:" in err
    assert "vae: latents.z.dim: expected a valid integer; got true." in err
    assert "Traceback" not in err
    _, err = run_cli("fit", "vea", code=2)
    assert "did you mean 'vae'" in err
    run_cli("no-such-command", code=2)


def test_runs_surgery_evidence(where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.analysis.population.kernels.FLOW_STEPS", 20)
    assert "finished" in run_cli("runs", *where)[0]
    assert run_cli_json("runs", *where)[0]["name"] == "vae"
    figures = run_cli_json("surgery", "vae", "--samples", "2", *where)["figures"]
    assert figures["elbo"]["value"] == pytest.approx(figures["reconstruction"]["value"] - figures["kl"]["value"])
    out, _ = run_cli("surgery", "latest", *where)
    assert "On new data a better prior wins" in out
    assert "I_q[x, z]" in out
    assert run_cli_json("surgery", "latest", "--rows", "50", *where)["n"] == 50
    closest = run_cli_json("surgery", "latest", "--population", *where)["population"]["prior"]
    assert "train rows" in closest
    assert run_cli_json("evidence", "latest", "--samples", "20", *where)["figures"]["iwae_20"]["kind"] == "lower_bound"


ON_A_DEVICE = ("surgery", "evidence", "gap", "calibration", "two-sample", "posterior")
"""Analyses that a GPU makes faster; `test_cuda.py` runs them there."""
REFUSED = {
    "a misspelt split": (["surgery", "latest", "--split", "tset"], 2, "test"),
    "a misspelt run": (["surgery", "veae"], 2, "vae"),
    "an unknown method": (
        ["evidence", "latest", "--method", "magic"], 2, "expected one of iwae, prior, ais, bracket; got 'magic'",
    ),
}  # fmt: skip
for _command in ON_A_DEVICE:
    _given = [_command, "latest", "--device"]
    REFUSED[f"{_command} on no GPU"] = ([*_given, "cuda"], 71, "Use --device cpu")
    REFUSED[f"{_command} on no device"] = ([*_given, "gpu"], 2, "expected auto, cpu or cuda; got 'gpu'")


@pytest.mark.parametrize("case", REFUSED)
def test_an_analysis_says_what_is_wrong(case: str, where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given, code, said = REFUSED[case]
    assert said in run_cli(*given, *where, code=code)[1]


def test_figures_for_papers(where: list[str], tmp_path: Path) -> None:
    """`--csv` and `--latex` print the figures of `--json`, and nothing else."""
    asked = ("surgery", "latest", "--split", "both", "--rows", "100", *where)
    found = run_cli_json(*asked)["splits"]
    table = pandas.read_csv(StringIO(run_cli(*asked, "--csv")[0]), index_col="term")
    assert table.loc["elbo", "test"] == found["test"]["figures"]["elbo"]["value"]
    assert table.loc["kl", "train error"] == found["train"]["figures"]["kl"]["standard_error"]
    told = run_cli(*asked, "--latex")[0].splitlines()
    assert told[0] == r"\begin{tabular}{lrr}"
    (line,) = [line for line in told if line.startswith("elbo")]
    assert f"${found['test']['figures']['elbo']['value']:.2f} " in line
    assert any(line.startswith(r"mutual\_information") for line in told)


def test_surgery_of_two_splits_and_by_class(where: list[str]) -> None:
    out, _ = run_cli("surgery", "latest", "--split", "both", "--by-class", "--rows", "150", *where)
    for text in ("train n = 150, test n = 150", "train_gain", "by label of train", "by label of test"):
        assert text in out
    found = run_cli_json("surgery", "latest", "--split", "both", *where)["splits"]
    assert found["test"]["figures"]["train_gain"]["kind"] == "estimate"
    assert found["train"]["figures"]["train_gain"] is None
    assert set(found["test"]["classes"]) == {str(i) for i in range(10)}
    out, _ = run_cli("surgery", "latest", "--components", "50", *where)
    assert "mutual_information_lower" in out
    assert "components are a subset" in out


@pytest.mark.parametrize(
    ("method", "term"), [("iwae", "iwae_20"), ("prior", "jensen"), ("ais", "ais_5"), ("bracket", "upper")]
)
def test_evidence_by_every_method(where: list[str], method: str, term: str) -> None:
    options = ["--method", method, "--rows", "4", "--samples", "20", "--temperatures", "5", "--chains", "2", *where]
    if method == "iwae":  # each of these takes seconds; how the others are shown is tested with them
        assert term in run_cli("evidence", "latest", *options)[0]
    found = run_cli_json("evidence", "latest", *options)
    assert found["figures"][term]["value"] < 0
    assert found["n"] == 4


def test_gap(where: list[str]) -> None:
    options = ["gap", "latest", "--rows", "5", "--steps", "3", *where]
    out, _ = run_cli(*options)
    assert "approximation" in out
    assert "amortisation" in out
    assert run_cli_json(*options)["figures"]["amortisation"]["kind"] == "lower_bound"


def test_finished_run_says_so(where: list[str]) -> None:
    """FAULTS 12."""
    assert "nothing to resume" in run_cli("resume", "vae", *where)[0]


def test_data_that_cannot_be_scored_exit_65(tmp_path: Path) -> None:
    """FAULTS 19 and 20: where it is, and what to do."""
    x = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    options = ["data.source=npz", "data.binarize=none", *TINY, "--run-dir", str(tmp_path / "runs")]
    _, err = run_cli("fit", "vae", npz(tmp_path / "grey.npz", x), *options, code=65)
    assert "data.binarize" in err
    x[3, 2] = np.nan
    _, err = run_cli("fit", "vae", npz(tmp_path / "nan.npz", x), *options, code=65)
    assert "row 3" in err
    assert not (tmp_path / "runs").exists(), "nothing may be left of a fit that never started"


# ---------------------------------------------------------------------- processes and signals


ENDLESS = ["fit", "vae", *TINY, "train.epochs=100000", "train.checkpoint_seconds=1000", "--device", "cpu"]


def await_metrics(folder: Path, go_on: Callable[[], bool]) -> bool:
    """Wait for the first figures of a fit; False where there are none in time, or it does not go on."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and go_on():
        if any(path.stat().st_size for path in folder.glob("*/*/metrics.jsonl")):
            return True
        time.sleep(0.02)
    return False


def assert_interrupted(folder: Path, err: str) -> None:
    assert "pvae resume" in err
    assert "Traceback" not in err
    run = pvae.Run.load(next(folder.glob("*/*")))
    assert run.status["state"] == "interrupted"
    assert run.checkpoint.step > 0


def test_a_process_keeps_others_out_and_stops_at_sigterm(tmp_path: Path) -> None:
    """FAULTS 14 and 16."""
    command = [sys.executable, "-m", "pvae", *ENDLESS, "--run-dir", str(tmp_path)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=threads) as child:
        try:
            assert await_metrics(tmp_path, lambda: child.poll() is None)
            _, err = run_cli("resume", str(next(tmp_path.glob("*/*"))), "--quiet", "--device", "cpu", code=75)
            assert str(child.pid) in err
            child.send_signal(signal.SIGTERM)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()  # one that is merely slow would be waited for for ever
    assert child.returncode == 143
    assert_interrupted(tmp_path, err)


def test_ctrl_c_checkpoints_and_says_how_to_go_on(tmp_path: Path) -> None:
    """FAULTS 14: SIGINT to this very process, in which the fit runs."""
    over = threading.Event()

    def press() -> None:
        if await_metrics(tmp_path, lambda: not over.is_set()):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        _, err = run_cli(*ENDLESS, "--run-dir", str(tmp_path), code=130)
    finally:
        over.set()
        thread.join()
    assert_interrupted(tmp_path, err)


def test_broken_pipe_is_quiet() -> None:
    """FAULTS 42."""
    unread, written = os.pipe()
    os.close(unread)
    with os.fdopen(written, "wb") as nobody:
        done = subprocess.run([sys.executable, "-m", "pvae", "list"], stdout=nobody, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")
