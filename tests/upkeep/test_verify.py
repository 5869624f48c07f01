"""`pvae verify`: every damage is injected, and seen."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae.errors import DeclarationError
from pvae.runs import checkpoint
from pvae.runs.rundir import RunDirectory
from pvae.training.evaluation import evaluate
from pvae.upkeep.verify import verify
from pvae.upkeep.weights import ELBO_TOLERANCE
from pvae.util.provenance import surroundings
from tests.cli_runner import run_cli, run_cli_json
from tests.upkeep.damage import edit, files_of, flip, names, newest, oldest, only, rewritten, status, update

SMALL = ["encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "data.source=digits"]

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


def test_verify_on_the_command_line(run: Path, root: Path) -> None:
    asked = ["verify", "vae", "--run-dir", str(root)]
    told = run_cli_json(*asked)
    assert told.keys() == {"run", "loads", "ok", "failed", "warnings", "checks"}
    assert all(check.keys() == {"name", "level", "found", "advice", "facts"} for check in told["checks"])
    (oldest(run) / "weights.safetensors").write_bytes(b"")
    out, _ = run_cli(*asked)
    assert out.count("warning") == 2
    assert "A newer one is loaded" in out
    assert "verdict" in run_cli(*asked, terminal=True)[0]  # a table
    run_cli(*asked, "--strict", code=3)
    (newest(run) / "weights.safetensors").write_bytes(b"")
    assert run_cli_json(*asked, code=65)["loads"] is None
    run_cli("verify", "nothing", "--run-dir", str(root), code=2)


@pytest.mark.parametrize(
    ("declared", "overrides"),
    [("vae", [*SMALL, "train.average=0.9", "train.keep=last"]), ("exemplar", SMALL), ("em_mixture", []), ("gan", [])],
)
def test_figures_come_out_again_of_other_kinds(declared: str, overrides: list[str], root: Path) -> None:
    options = [*overrides, "train.engine=eager", "train.epochs=1"]
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
    options: dict[str, Any] = {"data": x, "run_dir": root, "device": "cpu", "progress": False}
    fit = pvae.fit(pvae.Pair(model, guide), "train.epochs=1", "train.engine=eager", **options)
    bare = verify(fit.path, data=True)
    assert bare.ok
    assert {"pair", "data"} <= {check.name for check in bare.checks if "not at hand" in check.found}
    full = verify(pvae.Run.load(fit.path, data=x, pair=pvae.Pair(model, guide)), data=True)
    assert full.ok
    assert "the same bits" in full.checks[-1].found
    rewritten(fit.path, lambda tensors: [value.fill_(torch.nan) for value in tensors["weights"].values()])
    assert "is not finite" in only(verify(fit.path), "failed").found


# ---------------------------------------------------------------------- verify: damaged checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def link(path: Path) -> None:
    moved = path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(moved)


@pytest.mark.parametrize(
    ("damage", "file", "told"),
    [
        (flip, "weights.safetensors", "its bytes changed"),
        (truncate, "weights.safetensors", "truncated"),
        (Path.unlink, "weights.safetensors", "No such file"),
        (link, "weights.safetensors", "(symbolic link|bytes)"),
        (lambda path: path.write_text('{"schema": 99, "step": 0, "files": {}}'), "manifest.json", "upgrade pvae"),
        (lambda path: path.write_bytes(b"\x00garbage"), "manifest.json", "expected a JSON object"),
    ],
)
def test_a_damaged_newest_checkpoint_has_failed_and_the_older_one_loads(
    damage: Callable[[Path], Any], file: str, told: str, run: Path
) -> None:
    """FAULTS 4, 5, 6, 36."""
    damage(newest(run) / file)
    found = verify(run)
    (check,) = [check for check in found.of("failed") if check.name == f"checkpoints/{newest(run).name}"]
    assert re.search(told, check.found)
    assert "in its place" in check.advice
    assert check.facts == {"reads": False}
    assert found.facts["loads"] == oldest(run).name


def test_an_older_damaged_checkpoint_is_a_warning(run: Path) -> None:
    flip(oldest(run) / "weights.safetensors")
    found = verify(run)
    assert found.ok
    assert only(found, "warning").name == f"checkpoints/{oldest(run).name}"
    assert found.facts["loads"] == newest(run).name


def test_weights_that_are_not_finite(run: Path) -> None:
    def spoil(tensors: dict[str, dict[str, Tensor]]) -> None:
        for group in ("weights", "best"):
            next(iter(tensors[group].values())).fill_(torch.inf)
        tensors["optimizer"]["0.exp_avg"][0] = torch.nan

    rewritten(run, spoil)
    found = only(verify(run), "failed").found
    assert found.count("is not finite") == 3
    assert "best: " in found
    assert "optimizer: 0.exp_avg" in found


def test_what_a_fit_does_not_keep(run: Path) -> None:
    rewritten(run, lambda tensors: None, select="nonsense", colour="red")
    found = only(verify(run), "failed").found
    assert "'nonsense'" in found
    assert "colour" in found
    rewritten(run, lambda tensors: tensors.pop("weights"), select="best")
    assert "expected a group of weights" in only(verify(run), "failed").found


def test_checkpoints_that_are_gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert only(verify(run), "failed").found == "none; the run is finished"
    (run / "checkpoints").symlink_to(run.parent)
    check = only(verify(run), "failed")
    assert (check.name, check.found) == ("checkpoints", f"a link to {run.parent}")


def test_a_checkpoint_that_a_live_run_removes_meanwhile_is_not_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = checkpoint.newest_first(run / "checkpoints")
    monkeypatch.setattr(
        checkpoint, "newest_first", lambda folder, _every=1: [*paths, run / "checkpoints" / "step-00000009"]
    )
    assert verify(run).ok


# ---------------------------------------------------------------------- verify: the other files


def test_an_edited_declaration(run: Path) -> None:
    """FAULTS 8: its names and shapes are compared with every checkpoint."""
    text = (run / "spec.toml").read_text()
    assert tomllib.loads(text)["latents"]["z"]["dim"] == 3
    edit(run / "spec.toml", "dim = 3", "dim = 5")
    found = verify(run)
    assert names(found, "failed") == {"spec.toml", f"checkpoints/{newest(run).name}"}
    assert "expected shape" in found.of("failed")[1].found
    (run / "spec.toml").write_text(f"seed = 7\n{text}".replace("\nseed = 0", ""))
    assert "expected seed = 0, as in the manifest; got 7" in only(verify(run), "failed").found
    (run / "spec.toml").write_text(f"# a note\n{text}")
    assert "not as it was written" in only(verify(run), "warning").found


def test_a_default_of_a_later_version_is_no_change(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is as it was written, and lacks a field that declarations have now."""
    edit(run / "spec.toml", "validate_every = 1\n", "")
    monkeypatch.setattr(RunDirectory, "spec_is_own", lambda _: True)
    assert "spec.toml" not in names(verify(run), "warning") | names(verify(run), "failed")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("spec.toml", b"a" * (1 << 21), "at most 1048576 bytes"),
        ("spec.toml", b"[" * 5000, "spec.toml"),
        ("spec.toml", b"\xff", "UTF-8"),
        ("manifest.json", b"[]", "a JSON object"),
        ("manifest.json", b'{"name": 3}', "text for 'name'"),
        ("status.json", b"{", "a JSON object"),
        ("status.json", b'{"state": "asleep"}', "'asleep'"),
        ("metrics.jsonl", b'{"epoch": 1}\nnot json\n{"epoch": 2}\n', "garbage in line 2"),
        ("events.jsonl", b"{}\n\x00\n{}\n", "garbage in line 2"),
    ],
)
def test_damaged_texts(file: str, content: bytes, told: str, run: Path) -> None:
    (run / file).write_bytes(content)
    found = verify(run)
    assert file in names(found, "failed")
    assert told in "".join(check.found for check in found.of("failed"))


@pytest.mark.parametrize("file", ["manifest.json", "spec.toml", "metrics.jsonl"])
def test_missing_texts(file: str, run: Path) -> None:
    (run / file).unlink()
    assert file in names(verify(run), "failed")


def test_a_run_that_was_only_begun(root: Path) -> None:
    begun = RunDirectory.create(root, "begun")
    found = verify(begun.path)
    assert found.facts["loads"] is None
    assert names(found, "warning") == {"manifest.json", "checkpoints"}
    assert names(found, "failed") == {"spec.toml", "pair"}


def test_a_declaration_that_does_not_round_trip(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (run / "spec.toml").read_text().replace("dim = 3", "dim = 4")
    monkeypatch.setattr(pvae.Experiment, "to_toml", lambda self: other)
    assert "round-trips" in only(verify(run), "failed").found


@pytest.mark.parametrize("shape", [None, [3, "4"], [0], [1 << 40]])
def test_a_shape_that_is_none(shape: object, run: Path) -> None:
    update(run / "manifest.json", data={"shape": shape})
    assert "shape of a datum" in verify(run).of("failed")[0].found


def test_a_torn_last_line_is_a_warning(run: Path) -> None:
    """FAULTS 43."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "sp')
    check = only(verify(run), "warning")
    assert (check.name, "4 rows" in check.found) == ("metrics.jsonl", True)


def test_links_devices_and_foreign_files(run: Path, tmp_path: Path) -> None:
    """FAULTS 36, 38: a link in the place of a file of the run has failed; what is foreign is told, and no more."""
    (run / "notes\x1b[2J.txt").write_text("mine")
    (run / "analysis").mkdir(exist_ok=True)
    (run / "analysis" / "link").symlink_to("/etc/passwd")
    os.mkfifo(run / "report")
    (newest(run) / "extra").touch()
    (run / ".tmp-0123").touch()
    os.rename(run / "events.jsonl", tmp_path / "events.jsonl")
    (run / "events.jsonl").symlink_to(tmp_path / "events.jsonl")
    found = verify(run)
    told = {check.name: (check.level, check.found) for check in found.checks}
    assert names(found, "failed") == {"events.jsonl", "report"}
    assert told["report"] == ("failed", "a device, pipe or socket")
    assert told["analysis/link"] == ("warning", "a link to /etc/passwd")
    assert told[".tmp-0123"] == ("warning", "left by an interrupted write")
    assert "holds foreign files: extra" in told[f"checkpoints/{newest(run).name}"][1]
    assert "\x1b" not in str(found)
    assert "\\x1b[2J.txt" in str(found)


def test_many_foreign_files_are_counted(run: Path) -> None:
    for number in range(30):
        (run / f"foreign{number}").touch()
    assert "10 more" in verify(run).of("warning")[-1].found


def test_analyses_with_a_checksum(run: Path) -> None:
    folder = RunDirectory(run).analysis
    (folder / "draws.nc").write_bytes(b"draws")
    (folder / "draws.nc.sha256").write_text(f"{hashlib.sha256(b'draws').hexdigest()}  draws.nc\n")
    (folder / "refit.json").write_text("{}")
    assert "2 files as they were written" in [c.found for c in verify(run).checks if c.name == "analysis"]
    flip(folder / "draws.nc")
    (folder / "refit.json").write_text("[" * 9)
    (folder / "other.nc.sha256").write_text("no digest")
    told = {check.name: check.found for check in verify(run).of("failed")}
    assert "expected SHA-256" in told["analysis/draws.nc.sha256"]
    assert "expected JSON" in told["analysis/refit.json"]
    assert "expected a line of sha256sum" in told["analysis/other.nc.sha256"]


def test_a_live_run_a_stale_one_and_a_degraded_one(run: Path) -> None:
    """FAULTS 3, 15: what a run at work is about to finish is no damage."""
    (run / "checkpoints" / ".tmp-0123").mkdir()
    status(run, state="running", pid=os.getpid(), birth=None)
    live = verify(run)
    assert live.ok
    assert not live.of("warning")
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    status(run, pid=process.pid)
    assert names(verify(run), "warning") == {"status.json", "checkpoints/.tmp-0123"}
    status(run, state="finished", degraded="metrics.jsonl could not be written: disk full")
    assert "disk full" in verify(run).of("warning")[0].found


# ---------------------------------------------------------------------- verify: the data


def test_other_data(run: Path) -> None:
    """FAULTS 13: the fingerprint is compared, and nothing is computed of other data."""
    described = json.loads((run / "manifest.json").read_text())["data"]
    update(run / "manifest.json", data={**described, "fingerprint": "0" * 64})
    assert names(verify(run), "failed") == {"manifest.json"}  # its digest
    found = verify(run, data=True)
    assert "fitted on other data" in found.of("failed")[1].found
    assert "elbo" not in {check.name for check in found.checks}


def test_weights_that_were_not_those_measured(run: Path) -> None:
    rewritten(run, lambda tensors: [value.add_(0.01) for value in tensors["best"].values()])
    assert verify(run).ok
    check = only(verify(run, data=True), "failed")
    assert check.name == "elbo"
    assert abs(check.facts["elbo"]["recorded"] - check.facts["elbo"]["computed"]) > 0.01


def test_kls_of_one_sample_that_earlier_versions_recorded_are_known(run: Path) -> None:
    fitted = pvae.Run.load(run)
    seed, x, n = fitted.plan.seed, fitted.data.validation.rows, len(fitted.data.train)
    earlier = evaluate(fitted.pair, x, seed, n, ())
    assert earlier["kl/z"] != evaluate(fitted.pair, x, seed, n)["kl/z"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**row, **earlier} if row["split"] == "validation" else row for row in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    rewritten(run, lambda _: None)
    assert verify(run, data=True).ok


def test_figures_of_another_machine_are_compared_to_a_tolerance(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.upkeep.weights.surroundings", lambda: {**surroundings(), "host": "elsewhere"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**row, "elbo": row["elbo"] * (1 + ELBO_TOLERANCE / 2)} for row in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    rewritten(run, lambda _: None)
    found = verify(run, data=True)
    assert found.ok
    assert "other host" in found.checks[-1].found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "no validation was recorded"),
        (lambda run: edit(run / "manifest.json", '"device": "cpu"', '"device": "cuda:7"'), "a GPU"),
        (lambda run: list(map(flip, run.glob("checkpoints/*/state.json"))), "no weights"),
    ],
)
def test_what_cannot_be_computed_again_is_said(
    change: Callable[[Path], Any], told: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change(run)
    assert told in verify(run, data=True).checks[-1].found


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="Expected a run directory"):
        verify(tmp_path)
