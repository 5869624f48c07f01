"""`pvae doctor`: every fault of an installation or a machine is injected, and seen."""

import io
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pvae.data.sources.collections import MNIST_FILES
from pvae.errors import DataError
from pvae.upkeep import doctor as module, machine
from pvae.upkeep.clean import Cleaning, Removal
from pvae.upkeep.doctor import CHECKS, doctor
from pvae.upkeep.machine import CheckArguments
from pvae.util.checks import Check, Checks, attempt
from tests.cli_runner import run_cli, run_cli_json

ASKED = CheckArguments(Path("runs"), None)
NAMES = (
    "python packages torch devices threads precision pyro compiler run_dir space cache temporary data.digits "
    "data.fashion_mnist data.mnist extras variables elbo determinism plots arviz"
).split()


def test_doctor_finds_this_machine_well_in_a_stable_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, neither files nor a random state nor parameters."""
    monkeypatch.setattr(sys, "warnoptions", [])
    before = torch.get_rng_state()
    told = run_cli_json("doctor", "--run-dir", str(tmp_path / "some" / "runs"))
    assert told.keys() == {"python", "platform", "ok", "failed", "warnings", "checks"}
    assert all(check.keys() == {"name", "level", "found", "advice", "facts"} for check in told["checks"])
    assert [check["name"] for check in told["checks"]] == NAMES
    assert told["failed"] == 0
    assert not (tmp_path / "some").exists()
    assert torch.equal(torch.get_rng_state(), before)
    facts = {check["name"]: check["facts"] for check in told["checks"]}
    assert facts["torch"].keys() == {"version", "cuda", "hip"}
    assert facts["threads"].keys() == {"cores", "cgroup", "torch", "environment"}
    assert facts["arviz"].keys() == {"version", "generation"}
    assert facts["space"]["free_bytes"] > 0
    assert facts["packages"]["torch"]


def test_a_check_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, raising(RuntimeError("it \x1b[31mbroke\nhere")))
    out, _ = run_cli("doctor", code=1)
    assert out.count("RuntimeError: it \\x1b[31mbroke here") == len(CHECKS)
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (DeprecationWarning("old"), "-W error"),
        (ImportError("no module"), "Install pvae again"),
        (PermissionError(13, "no"), "file or folder"),
        (MemoryError(), "memory"),
        (KeyError("x"), "report it"),
        (DataError("Expected a; got b."), ""),
    ],
)
def test_every_error_has_its_advice_and_what_was_found_before_is_kept(error: Exception, advice: str) -> None:
    def check() -> Any:
        yield Check("first", "ok", "fine")
        raise error

    first, second = attempt("second", check)
    assert (first.name, second.name, second.level) == ("first", "second", "failed")
    assert advice in second.advice
    assert bool(advice) == bool(second.advice)


Inject = Callable[[pytest.MonkeyPatch, Path], Any]


def returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def raising(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def arviz(patch: pytest.MonkeyPatch, where: Path, body: str) -> None:
    """Put a package in place of ArviZ."""
    (where / "arviz.py").write_text(body)
    patch.syspath_prepend(where)
    patch.setitem(sys.modules, "arviz", None)  # so that what is there now comes back afterwards
    patch.delitem(sys.modules, "arviz")


def importing(body: str) -> Inject:
    return lambda patch, where: arviz(patch, where, body)


def compiler(patch: pytest.MonkeyPatch, code: str, where: Path) -> None:
    script = where / "c++"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    patch.setenv("CXX", str(script))


def files_in_place_of_folders(patch: pytest.MonkeyPatch, where: Path) -> None:
    """No folder can be made below a file, by root neither."""
    (where / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(where / "file"))


def no_room(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(machine, "write_atomic", raising(OSError(28, "No space left on device")))


def no_compiler(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.delenv("CXX", raising=False)
    patch.setenv("PATH", "")


def setting(target: str, value: Any) -> Inject:
    return lambda patch, _: patch.setattr(target, value)


def environment(name: str, value: str) -> Inject:
    return lambda patch, where: patch.setenv(name, value.replace("WHERE", str(where)))


def without(module: str) -> Inject:
    return lambda patch, _: patch.setitem(sys.modules, module, None)


def free(size: int) -> Inject:
    return setting("shutil.disk_usage", returning(SimpleNamespace(free=size)))


FAULTS: list[tuple[str, Inject, str, str]] = [
    ("python", setting("sys.warnoptions", ["error"]), "warning", "warnings are errors"),
    ("python", setting("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii")), "warning", "output in ascii"),
    ("packages", setting("pvae.upkeep.doctor.requires", returning(["torch>=1", "absent"])), "failed", "absent missing"),
    ("torch", setting("torch.__version__", "2.3.1+cpu"), "failed", "2.3.1"),
    ("torch", without("torch"), "failed", "import of torch halted"),
    ("pyro", without("pyro"), "failed", "import of pyro halted"),
    ("threads", setting("torch.get_num_threads", returning(4096)), "warning", "torch uses 4096"),
    ("compiler", no_compiler, "warning", "neither g++ nor clang++"),
    ("compiler", environment("CXX", "WHERE/absent"), "warning", "absent is not found"),
    ("compiler", lambda patch, where: compiler(patch, "echo no omp.h >&2; exit 3", where), "warning", "3: no omp.h"),
    ("run_dir", setting("pvae.upkeep.machine.write_atomic", raising(OSError(30, "Read-only"))), "failed", "Read-only"),
    ("space", free(1), "failed", "0.0 GiB"),
    ("space", free(1 << 29), "warning", "0.5 GiB"),
    ("cache", files_in_place_of_folders, "warning", "Not a directory"),
    ("temporary", no_room, "failed", "No space left on device"),
    ("temporary", setting("tempfile.gettempdir", raising(FileNotFoundError("none usable"))), "failed", "none usable"),
    ("data", environment("PVAE_DATA_DIR", "WHERE/absent"), "failed", "expected a folder"),
    ("data.digits", setting("pvae.upkeep.machine.find_spec", returning(None)), "failed", "scikit-learn is missing"),
    ("data.mnist", environment("PVAE_OFFLINE", "1"), "warning", "4 of 4 files are not here, and PVAE_OFFLINE"),
    ("variables", environment("PVAE_RUNDIR", "x"), "warning", "PVAE_RUNDIR=x"),
    ("elbo", setting("pvae.training.evaluation.evaluate", returning({"elbo": -1.0})), "failed", "-1.000000000"),
    ("elbo", setting("pvae.training.evaluation.evaluate", returning({"elbo": math.nan})), "failed", "nan"),
    ("determinism", setting("pvae.util.seeds.set_noise", lambda *_: torch.seed()), "failed", "differ by up to"),
    ("plots", without("matplotlib.pyplot"), "failed", "import of matplotlib.pyplot halted"),
    ("arviz", without("arviz"), "warning", "import of arviz halted"),
    ("arviz", importing("raise FutureWarning('refactored')"), "warning", "FutureWarning: refactored"),
    ("arviz", importing("open('/dev/null/cache')"), "warning", "NotADirectoryError"),
    ("arviz", importing("raise AttributeError('no style')"), "warning", "AttributeError: no style"),
    ("arviz", importing("__version__ = '1.1.0'"), "warning", "1.1.0, which pvae does not work with"),
]


@pytest.mark.parametrize(("name", "inject", "level", "told"), FAULTS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FAULTS)])
def test_every_check_sees_its_fault(
    name: str, inject: Inject, level: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 42: read-only folders, no room, LANG=C, -W error, a package that is missing or does not fit."""
    quiet_doctor(monkeypatch, name)
    with monkeypatch.context() as patch:
        inject(patch, tmp_path)
        found = doctor(tmp_path / "runs")
    (check,) = [check for check in found.checks if check.name == name]
    assert (check.level, told in check.found) == (level, True), check
    assert check.advice or level == "failed"
    assert found.ok == (level != "failed")


def quiet_doctor(patch: pytest.MonkeyPatch, name: str) -> None:
    """Leave out all checks but one: a fault that is injected for it may break others."""
    kept = name.partition(".")[0]
    for other in CHECKS:
        if other != kept:
            patch.setitem(CHECKS, other, returning(()))


def test_every_check_is_made_to_fail() -> None:
    seen = {name.partition(".")[0] for name, *_ in FAULTS}
    assert seen == set(CHECKS) - {"devices", "extras", "precision"}  # these have tests of their own


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="A GPU", total_memory=80 << 30)

    def found(cuda: str | None, available: bool, ones: float) -> tuple[str, str, str]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch, "ones", returning(torch.full((2,), ones)))
        (check,) = machine.devices(ASKED)
        return check.level, check.found, check.advice

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert found(None, False, 1.0) == ("ok", "the CPU alone", "")
    level, _, advice = found("12.8", False, 1.0)
    assert (level, "nvidia-smi" in advice) == ("warning", True)
    assert found("12.8", True, 1.0) == ("ok", "A GPU (80 GiB)", "")
    with pytest.raises(DataError, match="got 6.0"):
        found("12.8", True, 3.0)


def test_extras_are_those_that_the_project_offers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(module.EXTRA_MODULES) == project["optional-dependencies"].keys() - {"peers", "docs", "test", "dev"}
    (check,) = module.extras(ASKED)
    assert check.level == "ok"
    assert check.facts.keys() == module.EXTRA_MODULES.keys()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "garbage"}, None),
        ({}, None),
    ],
)
def test_the_cores_that_a_cgroup_allows(
    files: dict[str, str], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cpu.max")
    assert machine.cgroup_cores() == cores


def test_a_sound_arviz_is_told_with_the_class_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arviz(monkeypatch, tmp_path, "__version__ = '0.23.9'")
    (check,) = module.arviz(ASKED)
    assert (check.level, check.found) == ("ok", "0.23.9 (arviz.InferenceData)")


def test_where_a_collection_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist.npz").touch()
    check = machine.collection("data.mnist", MNIST_FILES, tmp_path)
    assert (check.level, check.found) == ("ok", str(tmp_path))
    (tmp_path / "mnist.npz").unlink()
    for file in MNIST_FILES.files.values():
        (tmp_path / f"{file.name}.gz").touch()
    assert machine.collection("data.mnist", MNIST_FILES, tmp_path).found == str(tmp_path)
    elsewhere = replace(MNIST_FILES, system=tmp_path)
    assert machine.collection("data.mnist", elsewhere, None).found == str(tmp_path)
    assert "downloaded when" in machine.collection("data.mnist", MNIST_FILES, None).found


def test_doctor_answers_without_torch(tmp_path: Path) -> None:
    """An installation whose torch is broken is what one asks it about; also with ASCII alone, and no terminal."""
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['pvae', 'doctor']; from pvae import cli; cli.main()"
    ascii_alone = {"LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, **ascii_alone, "PVAE_RUN_DIR": "r\u00fcns"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stderr
    assert b"import of torch halted" in done.stdout
    assert b"Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("r*"))


# ---------------------------------------------------------------------- how checks are shown


def test_checks_are_shown_as_a_table_as_lines_and_as_json() -> None:
    from rich.console import Console

    checks = Checks("all", (Check("a", "ok", "fine"), Check("b", "failed", "bad\nvery", "do", {"n": 1})), {"run": "r"})
    out = io.StringIO()
    Console(file=out, width=80).print(checks)
    assert "-> do" in out.getvalue()
    assert repr(checks).splitlines()[1] == "failed   b  bad very"
    assert checks.summary() == "all: 1 failed, 1 ok"
    assert checks.to_dict()["checks"][1]["facts"] == {"n": 1}
    shown = io.StringIO()
    found = Cleaning(Path("runs"), False, (Removal(Path("x"), 1 << 20, "old"),), ((Path("y"), "held"),), ())
    Console(file=shown, width=80).print(found)
    assert "1.0 MiB" in shown.getvalue()
    assert "held" in shown.getvalue()
    assert repr(found) == str(found)
