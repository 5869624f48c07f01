"""`pvae verify`, `pvae clean`, `pvae doctor`: every damage is injected, and seen. Numbers are rows of the faults table."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import pvae
from pvae import checkpoint, cleaning, cli, doctor
from pvae.checks import Check, Checks, attempt
from pvae.cleaning import Cleaning, clean
from pvae.data.cache import cache_folder
from pvae.errors import DataError, DeclarationError
from pvae.rundir import RunDirectory, utc_now
from pvae.upkeep import TOLERANCE, verify

TINY = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]
TINY += ["data.source=digits", "latents.z.dim=3"]
HOUR_AGO = time.time() - 3600


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the checkpoints of its start and its end."""
    where = tmp_path_factory.mktemp("runs")
    return pvae.fit("vae", *TINY, "train.epochs=2", run_dir=where, device="cpu", progress=False).path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def run(fitted: Path, root: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(fitted, root / "vae" / fitted.name))


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit code and output of a command run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return caught.value.code, capsys.readouterr().out


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def oldest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[0]


def only(found: Checks, level: Any) -> Check:
    """The one check of a level."""
    (check,) = found.of(level)
    return check


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewritten(run: Path, change: Callable[[dict[str, dict[str, Tensor]]], None], **state: Any) -> None:
    """Write the newest checkpoint anew, with other tensors or state and the right checksums."""
    saved = checkpoint.read(newest(run))
    change(saved.tensors)
    checkpoint.write(run / "checkpoints", saved.step, saved.tensors, {**saved.state, **state})


# ---------------------------------------------------------------------- verify: a sound run


def test_a_sound_run_is_sound_and_its_figures_come_out_again_bit_for_bit(run: Path) -> None:
    before = files_of(run)
    found = pvae.verify(run, data=True)
    assert found.ok
    assert not found.of("warning")
    assert found.facts == {"run": str(run), "loads": newest(run).name}
    (elbo,) = [check for check in found.checks if check.name == "elbo"]
    assert "the same bits" in elbo.found
    assert elbo.facts["elbo"]["recorded"] == elbo.facts["elbo"]["computed"]
    assert files_of(run) == before


def test_verify_on_the_command_line(run: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--run-dir", str(root)]
    code, out = run_cli("verify", "vae", *asked, "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 0
    assert told.keys() == {"run", "loads", "ok", "failed", "warnings", "checks"}
    assert all(check.keys() == {"name", "level", "found", "advice", "facts"} for check in told["checks"])
    (oldest(run) / "weights.safetensors").write_bytes(b"")
    code, out = run_cli("verify", "vae", *asked, capsys=capsys)
    assert (code, out.count("warning")) == (0, 2)
    assert "A newer one is loaded" in out
    assert run_cli("verify", "vae", *asked, "--strict", capsys=capsys)[0] == 3
    (newest(run) / "weights.safetensors").write_bytes(b"")
    code, out = run_cli("verify", "vae", *asked, "--json", capsys=capsys)
    assert (code, json.loads(out)["loads"]) == (65, None)
    assert run_cli("verify", "nothing", *asked, capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("declared", "overrides"),
    [
        ("vae", ["train.average=0.9", "train.keep=last"]),
        ("exemplar", []),
        ("em_mixture", []),
        ("gan", []),
    ],
)
def test_figures_come_out_again_of_other_kinds(declared: str, overrides: list[str], root: Path) -> None:
    hidden = [f"{side}.network.hidden=[8]" for side in ("encoder", "decoder")] if declared in ("vae", "exemplar") else []
    data = ["data.source=digits"] if hidden else ["data.rows=200"] if declared == "gan" else []
    options = [*hidden, *data, *overrides, "train.engine=eager", "train.epochs=1"]
    fit = pvae.fit(declared, *options, run_dir=root, device="cpu", progress=False)
    found = verify(fit.path, data=True)
    assert found.ok, str(found)
    assert "the same bits" in found.checks[-1].found


def test_a_run_of_a_handwritten_pair_is_compared_when_the_pair_is_given(root: Path) -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, scale.exp()), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.linspace(-2, 2, 50)
    fit = pvae.fit(
        pvae.Pair(model, guide), "train.epochs=1", "train.engine=eager", data=x, run_dir=root, device="cpu", progress=False
    )  # fmt: skip
    bare = verify(fit.path, data=True)
    assert bare.ok
    assert {"pair", "data"} <= {check.name for check in bare.checks if "not at hand" in check.found}
    full = verify(pvae.Run.load(fit.path, data=x, pair=pvae.Pair(model, guide)), data=True)
    assert full.ok
    assert "the same bits" in full.checks[-1].found
    rewritten(fit.path, lambda tensors: tensors["weights"].update({n: v * torch.nan for n, v in tensors["weights"].items()}))
    assert "is not finite" in only(verify(fit.path), "failed").found


# ---------------------------------------------------------------------- verify: damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def link(path: Path) -> None:
    moved = path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(moved)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_unpickled(run: Path, tmp_path: Path) -> None:
    """FAULTS 7: neither where its checksum is wrong nor where it is right."""
    path, mark = newest(run) / "weights.safetensors", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "truncated or replaced" in only(verify(run), "failed").found
    listing = json.loads((newest(run) / "manifest.json").read_text())
    content = path.read_bytes()
    listing["files"][path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (newest(run) / "manifest.json").write_text(json.dumps(listing))
    assert "expected safetensors" in only(verify(run), "failed").found
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize(
    ("damage", "file", "told"),
    [
        (flip, "weights.safetensors", "its bytes changed"),
        (flip, "optimizer.safetensors", "its bytes changed"),
        (truncate, "weights.safetensors", "truncated"),
        (truncate, "state.json", "truncated"),
        (truncate, "manifest.json", "expected JSON"),
        (Path.unlink, "weights.safetensors", "No such file"),
        (Path.unlink, "manifest.json", "No such file"),
        (link, "weights.safetensors", "(symbolic link|bytes)"),
        (lambda path: path.write_text('{"schema": 99, "step": 0, "files": {}}'), "manifest.json", "upgrade pvae"),
        (lambda path: path.write_bytes(b"\x00garbage"), "manifest.json", "expected JSON"),
    ],
)
def test_a_damaged_newest_checkpoint_has_failed_and_the_older_one_loads(
    damage: Callable[[Path], Any], file: str, told: str, run: Path
) -> None:
    """FAULTS 4, 5, 6, 36."""
    damage(newest(run) / file)
    found = verify(run)
    (check,) = [check for check in found.of("failed") if check.name == f"checkpoints/{newest(run).name}"]
    assert pytest.raises(AssertionError, match=told) if False else __import__("re").search(told, check.found)
    assert "in its place" in check.advice
    assert check.facts == {"reads": False}
    assert found.facts["loads"] == oldest(run).name
