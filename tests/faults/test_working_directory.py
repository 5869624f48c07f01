"""Files of the working directory are data: no command runs one as code, in its own process or in a child's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = ("calendar", "random", "numpy", "torch", "typer", "mlflow")
"""Modules of Python, of pvae's requirements and of its extras, after which a user may name a file."""
STUDY = """
data = {{ source = "digits", binarize = "threshold", splits.train = [0, 40], splits.validation = [40, 60] }}
latents.z.dim = 2
encoder.network = {{ kind = "mlp", hidden = [8] }}
decoder.network = {{ kind = "mlp", hidden = [8] }}
train = {{ epochs = 1, engine = "{engine}" }}
sweep.measure = {{ rows = 20, evidence = 0 }}
"""


def place(folder: Path, *names: str) -> Path:
    """Write modules into a folder that leave a mark where they are imported, and fail."""
    for name in names:
        mark = folder / f"{name}.was-run"
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit(99)\n")
    return folder


def run(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `python OPTIONS -m pvae ARGUMENTS` in a folder; no module of it may have been run."""
    there = {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",
        "PVAE_RUN_DIR": str(folder / "runs"),
    }
    done = subprocess.run(
        [sys.executable, *options, "-m", "pvae", *arguments],
        cwd=folder, env=there, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert not list(folder.rglob("*.was-run")), done.stderr
    return done


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_study_and_its_processes_run_no_file_of_the_working_directory(engine: str, tmp_path: Path) -> None:
    """FAULTS 47: in the command, its children, the compiler's processes; --import alone names one that is imported."""
    place(tmp_path, *FILES, "pvae", "runpy")
    (tmp_path / "own.py").write_text("open('own.imported', 'a').write('.')\n")
    (tmp_path / "few.toml").write_text(STUDY.format(engine=engine))
    done = run(tmp_path, "--import", "own", "study", "few.toml", options=("-P",))
    assert done.returncode == 0, done.stderr
    (manifest,) = tmp_path.glob("runs/few/*/manifest.json")
    assert json.loads(manifest.read_text())["engine"] == engine
    assert (tmp_path / "own.imported").read_text() == ".."


def test_the_doctor_and_its_processes_run_no_file_of_the_working_directory(tmp_path: Path) -> None:
    """FAULTS 47: pvae.py too, where Python is told not to look for pvae itself in the working directory."""
    place(tmp_path, *FILES, "matplotlib", "arviz")
    assert "vae" in run(tmp_path, "list").stdout
    place(tmp_path, "pvae")
    assert "elbo" in run(tmp_path, "doctor", options=("-P",)).stdout
