"""`pvae verify`, `pvae clean`, `pvae doctor`: every damage is injected, and seen."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import pvae
from pvae import cli
from pvae.data.rows.cache import cache_folder
from pvae.errors import DataError, DeclarationError
from pvae.runs import checkpoint
from pvae.runs.names import utc_now
from pvae.runs.rundir import RunDirectory
from pvae.upkeep import clean as cleaning
from pvae.upkeep import doctor
from pvae.upkeep.clean import Cleaning, clean
from pvae.upkeep.verify import TOLERANCE, verify
from pvae.util.checks import Check, Checks, attempt

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


def rewritten(run: Path, change: Callable[[dict[str, dict[str, Tensor]]], Any], **state: Any) -> None:
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
    hidden = (
        [f"{side}.network.hidden=[8]" for side in ("encoder", "decoder")] if declared in ("vae", "exemplar") else []
    )
    data = ["data.source=digits"] if hidden else []
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
    options: dict[str, Any] = {"data": x, "run_dir": root, "device": "cpu", "progress": False}
    fit = pvae.fit(pvae.Pair(model, guide), "train.epochs=1", "train.engine=eager", **options)
    bare = verify(fit.path, data=True)
    assert bare.ok
    assert {"pair", "data"} <= {check.name for check in bare.checks if "not at hand" in check.found}
    full = verify(pvae.Run.load(fit.path, data=x, pair=pvae.Pair(model, guide)), data=True)
    assert full.ok
    assert "the same bits" in full.checks[-1].found
    rewritten(
        fit.path, lambda tensors: tensors["weights"].update({n: v * torch.nan for n, v in tensors["weights"].items()})
    )
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
            name = next(iter(tensors[group]))
            tensors[group][name] = tensors[group][name] * torch.inf
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
    monkeypatch.setattr(checkpoint, "newest_first", lambda folder: [*paths, run / "checkpoints" / "step-00000009"])
    assert verify(run).ok


# ---------------------------------------------------------------------- verify: the other files


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_edited_declaration(run: Path) -> None:
    """FAULTS 8: its names and shapes are compared with every checkpoint."""
    text = (run / "spec.toml").read_text()
    assert tomllib.loads(text)["latents"]["z"]["dim"] == 3
    edit(run / "spec.toml", "dim = 3", "dim = 5")
    found = verify(run)
    assert [check.name for check in found.of("failed")] == [f"checkpoints/{newest(run).name}"]
    assert "expected shape" in found.of("failed")[0].found
    (run / "spec.toml").write_text(f"seed = 7\n{text}".replace("\nseed = 0", ""))
    assert "expected seed = 0, as in the manifest; got 7" in only(verify(run), "failed").found
    (run / "spec.toml").write_text(f"# a note\n{text}")
    assert "not as it was written" in only(verify(run), "warning").found


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
    assert file in {check.name for check in found.of("failed")}
    assert told in "".join(check.found for check in found.of("failed"))


@pytest.mark.parametrize("file", ["manifest.json", "spec.toml", "metrics.jsonl"])
def test_missing_texts(file: str, run: Path) -> None:
    (run / file).unlink()
    assert file in {check.name for check in verify(run).of("failed")}


def test_a_run_that_was_only_begun(root: Path) -> None:
    begun = RunDirectory.create(root, "begun")
    found = verify(begun.path)
    assert found.facts["loads"] is None
    assert {check.name for check in found.of("warning")} == {"manifest.json", "checkpoints"}
    assert {check.name for check in found.of("failed")} == {"spec.toml", "pair"}


def test_a_declaration_that_does_not_round_trip(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (run / "spec.toml").read_text().replace("dim = 3", "dim = 4")
    monkeypatch.setattr(pvae.Experiment, "to_toml", lambda self: other)
    assert "round-trips" in only(verify(run), "failed").found


@pytest.mark.parametrize("shape", [None, [3, "4"], [0], [1 << 40]])
def test_a_shape_that_is_none(shape: object, run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "data": {"shape": shape}}))
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
    assert {check.name for check in found.of("failed")} == {"events.jsonl", "report"}
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


def status(run: Path, **changes: Any) -> None:
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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
    assert {check.name for check in verify(run).of("warning")} == {"status.json", "checkpoints/.tmp-0123"}
    status(run, state="finished", degraded="metrics.jsonl could not be written: disk full")
    assert "disk full" in verify(run).of("warning")[0].found


# ---------------------------------------------------------------------- verify: the data


def test_other_data(run: Path) -> None:
    """FAULTS 13: the fingerprint is compared, and nothing is computed of other data."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["fingerprint"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert verify(run).ok
    found = verify(run, data=True)
    assert "fitted on other data" in only(found, "failed").found
    assert "elbo" not in {check.name for check in found.checks}


def test_weights_that_were_not_those_measured(run: Path) -> None:
    def shift(tensors: dict[str, dict[str, Tensor]]) -> None:
        tensors["best"] = {name: value + 0.01 for name, value in tensors["best"].items()}

    rewritten(run, shift)
    assert verify(run).ok
    check = only(verify(run, data=True), "failed")
    assert check.name == "elbo"
    assert abs(check.facts["elbo"]["recorded"] - check.facts["elbo"]["computed"]) > 0.01


def test_figures_of_another_machine_are_compared_to_a_tolerance(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "host": "elsewhere", "threads": 64}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**row, "elbo": row["elbo"] * (1 + TOLERANCE / 2)} for row in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = verify(run, data=True)
    assert found.ok
    assert "other host and threads" in found.checks[-1].found


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


# ---------------------------------------------------------------------- clean


def old(path: Path, content: bytes = b"12345") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (HOUR_AGO, HOUR_AGO))
    return path


def gone(found: Cleaning) -> set[str]:
    return {removal.path.name for removal in found.removals}


def test_clean_shows_and_then_removes_what_interrupted_writes_left(
    run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAULTS 1: what a killed process leaves; a young file may be that of an analysis at work."""
    old(run / ".tmp-a1")
    old(run / "report" / ".tmp-a2")
    (run / "report" / ".tmp-young").touch()
    shutil.copytree(oldest(run), run / "checkpoints" / ".tmp-a3")
    shutil.copytree(oldest(run), run / "checkpoints" / f".old-{oldest(run).name}-a4a4a4a4")
    before = files_of(root)
    status_before = (run / "status.json").read_bytes()
    asked = ["clean", "--run-dir", str(root)]
    code, out = run_cli(*asked, capsys=capsys)
    assert code == 0
    assert "4 would be removed" in out
    assert "--apply" in out
    assert files_of(root) == before
    told = json.loads(run_cli(*asked, "--json", "--apply", capsys=capsys)[1])
    assert {Path(row["path"]).name for row in told["removals"]} == {
        ".tmp-a1", ".tmp-a2", ".tmp-a3", f".old-{oldest(run).name}-a4a4a4a4",
    }  # fmt: skip
    lost = set(before) - set(files_of(root))
    assert told["bytes"] == sum(len(before[name]) for name in lost) > 10
    assert (run / "report" / ".tmp-young").exists()
    assert (run / "status.json").read_bytes() == status_before
    assert verify(run).ok
    assert not clean(root, apply=True).removals


def test_a_checkpoint_that_was_set_aside_and_not_replaced_is_kept(run: Path, root: Path) -> None:
    """FAULTS 1: a process was killed between two renames; the next start gives it its name back."""
    os.rename(newest(run), run / "checkpoints" / f".old-{newest(run).name}-a5a5a5a5")
    assert not clean(root, apply=True).removals
    found = verify(run)
    assert found.ok
    assert found.facts["loads"] == only(found, "warning").name.removeprefix("checkpoints/")


def test_clean_removes_checkpoints_beyond_those_kept_but_only_sound_ones_count(run: Path, root: Path) -> None:
    saved = checkpoint.read(newest(run))
    for step in (30, 40, 50):
        checkpoint.write(run / "checkpoints", step, saved.tensors, saved.state, keep=9)
    flip(run / "checkpoints" / "step-00000050" / "weights.safetensors")
    assert gone(clean(root)) == {"step-00000020", "step-00000000"}
    assert clean(root, apply=True).size > 1000
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-000000{n}" for n in (30, 40, 50)}
    assert verify(run).facts["loads"] == "step-00000040"
    assert not clean(root).removals


def test_clean_removes_runs_that_failed_before_a_checkpoint_when_asked(run: Path, root: Path) -> None:
    empty = RunDirectory.create(root, "empty")
    begun = RunDirectory.create(root, "begun")
    (root / "mine").mkdir()
    (root / "mine" / "notes").mkdir()
    old(root / "mine" / "notes" / "text")
    empty.update_status(state="failed")
    status(run, state="failed")
    os.utime(empty.path / "manifest.json", (HOUR_AGO, HOUR_AGO))
    assert not clean(root).removals
    found = clean(root, apply=True, failed=True)
    assert [(removal.path, removal.why) for removal in found.removals] == [
        (empty.path, "failed before its first checkpoint")
    ]
    assert not empty.path.exists()
    assert begun.path.exists()
    assert run.exists()
    assert (root / "mine" / "notes" / "text").exists()


def test_clean_leaves_a_held_run_alone_and_names_it(run: Path, root: Path) -> None:
    """FAULTS 16: one whose lock another has, and one at work on another host."""
    old(run / ".tmp-a1")
    with RunDirectory(run).held():
        found = clean(root, apply=True)
    assert not found.removals
    assert found.skipped[0][0] == run
    assert "nobody holds" in found.skipped[0][1]
    status(run, state="running", host="elsewhere", heartbeat=utc_now())
    assert clean(root, apply=True).skipped == ((run, "at work"),)
    assert (run / ".tmp-a1").exists()
    status(run, state="finished")
    assert gone(clean(root, apply=True)) == {".tmp-a1"}


def test_clean_follows_no_link(run: Path, root: Path, tmp_path: Path) -> None:
    """FAULTS 36: links out of a run, a linked run, and a lock that is a link."""
    outside = tmp_path / "outside"
    old(outside / ".tmp-file")
    (run / "checkpoints" / ".tmp-link").symlink_to(outside)
    (run / "analysis").symlink_to(outside)
    (root / "linked").symlink_to(outside)
    shutil.copytree(run, root / "vae" / "second", symlinks=True)
    (root / "vae" / "second" / ".lock").unlink()
    (root / "vae" / "second" / ".lock").symlink_to(outside / "made")
    found = clean(root, apply=True, failed=True)
    assert gone(found) == {".tmp-link"}
    assert "plain file" in found.skipped[0][1]
    assert [path.name for path in outside.iterdir()] == [".tmp-file"]
    assert not (run / "checkpoints" / ".tmp-link").is_symlink()
    assert (run / "analysis").is_symlink()


def test_clean_of_the_cache_is_asked_for_and_leaves_what_is_held(root: Path) -> None:
    """FAULTS 32: a writer's lock is respected."""
    one, two = cache_folder() / "mnist", cache_folder() / "decoded" / "abc"
    for folder in (one, two):
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"123")
    part = cache_folder() / "decoded" / ".part-abc-x1"
    part.mkdir()
    assert not clean(root).removals
    with FileLock(cache_folder() / "decoded" / "abc.lock"):
        found = clean(root, apply=True, cache=True)
    assert gone(found) == {"mnist"}
    assert {path for path, _ in found.skipped} == {two, part}
    assert gone(clean(root, apply=True, cache=True)) == {"abc", ".part-abc-x1"}
    assert not two.exists()
    assert not part.exists()


def test_what_cannot_be_removed_is_told(
    run: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAULTS 42: a read-only folder; what was removed half way is found again."""
    (run / "checkpoints" / ".tmp-a1").mkdir()

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        code, out = run_cli("clean", "--run-dir", str(root), "--apply", capsys=capsys)
    assert code == 74
    assert "failed" in out
    assert "Permission denied" in out
    assert "0 removed" in out
    assert len(clean(root, apply=True).removals) == 1


def test_a_terminal_shows_a_table(
    run: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out = run_cli("verify", "vae", "--run-dir", str(root), capsys=capsys)
    assert code == 0
    assert "verdict" in out


def test_clean_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("clean", "--run-dir", str(tmp_path / "none"), capsys=capsys) == (
        0,
        "0 would be removed, 0.0 KiB to free\n",
    )


# ---------------------------------------------------------------------- doctor


NAMES = (
    "python packages torch devices threads pyro compiler run_dir lock space cache home temporary data.digits "
    "data.fashion_mnist data.mnist extras variables elbo determinism plots arviz"
).split()
TABLE = "python packages torch devices threads pyro compiler run_dir lock space cache home temporary".split()
TABLE += "data extras variables elbo determinism plots arviz".split()


def test_doctor_finds_this_machine_well_in_a_stable_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves nothing behind, neither files nor a random state nor parameters."""
    monkeypatch.setattr(sys, "warnoptions", [])
    before = torch.get_rng_state()
    code, out = run_cli("doctor", "--run-dir", str(tmp_path / "some" / "runs"), "--json", capsys=capsys)
    told = json.loads(out)
    assert told.keys() == {"python", "platform", "ok", "failed", "warnings", "checks"}
    assert all(check.keys() == {"name", "level", "found", "advice", "facts"} for check in told["checks"])
    assert [check["name"] for check in told["checks"]] == NAMES
    assert (code, told["failed"]) == (0, 0), out
    assert not (tmp_path / "some").exists()
    assert torch.equal(torch.get_rng_state(), before)
    facts = {check["name"]: check["facts"] for check in told["checks"]}
    assert facts["torch"].keys() == {"version", "cuda", "hip"}
    assert facts["threads"].keys() == {"cores", "cgroup", "torch", "environment"}
    assert facts["arviz"].keys() == {"version", "generation"}
    assert facts["space"]["free_bytes"] > 0
    assert facts["packages"]["torch"]


def test_a_check_that_raises_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("it \x1b[31mbroke\nhere")

    for name in TABLE:
        monkeypatch.setattr(doctor, f"_{name}", refuse)
    monkeypatch.setattr(doctor, "_plotting", dict)
    code, out = run_cli("doctor", capsys=capsys)
    assert code == 1
    assert out.count("RuntimeError: it \\x1b[31mbroke here") == len(TABLE)
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


def plotting(**found: Any) -> Inject:
    usual = {"matplotlib.pyplot": "3.11.2", "arviz": "0.23.4"}
    return lambda patch, _: patch.setattr(doctor, "_plotting", returning({**usual, **found}))


def compiler(patch: pytest.MonkeyPatch, code: str, where: Path) -> None:
    script = where / "c++"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    patch.setenv("CXX", str(script))


def files_in_place_of_folders(patch: pytest.MonkeyPatch, where: Path) -> None:
    """No folder can be made below a file, by root neither."""
    (where / "file").touch()
    for name in ("HOME", "XDG_CACHE_HOME"):
        patch.setenv(name, str(where / "file"))


def no_room(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(doctor, "write_new", raising(OSError(28, "No space left on device")))


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
    (
        "packages",
        setting("pvae.upkeep.doctor.requires", returning(["torch>=1", "absent-one"])),
        "failed",
        "absent-one missing",
    ),
    ("torch", setting("torch.__version__", "2.3.1+cpu"), "failed", "2.3.1"),
    ("torch", without("torch"), "failed", "import of torch halted"),
    ("pyro", without("pyro"), "failed", "import of pyro halted"),
    ("threads", setting("torch.get_num_threads", returning(4096)), "warning", "torch uses 4096"),
    ("compiler", no_compiler, "warning", "neither g++ nor clang++"),
    ("compiler", environment("CXX", "WHERE/absent"), "warning", "absent is not found"),
    ("compiler", lambda patch, where: compiler(patch, "echo no omp.h >&2; exit 3", where), "warning", "3: no omp.h"),
    ("run_dir", setting("pvae.upkeep.doctor.write_atomic", raising(OSError(30, "Read-only"))), "failed", "Read-only"),
    ("run_dir", setting("pvae.upkeep.doctor.read_inside", returning(b"one")), "failed", "something else"),
    ("lock", setting("filelock.FileLock", lambda *_, **__: nullcontext()), "failed", "given twice"),
    ("lock", setting("filelock.FileLock.acquire", raising(OSError(38, "no locks"))), "failed", "no locks"),
    ("space", free(1), "failed", "0.0 GiB"),
    ("space", free(1 << 29), "warning", "0.5 GiB"),
    ("cache", files_in_place_of_folders, "warning", "file/pvae: Not a directory"),
    ("home", files_in_place_of_folders, "warning", "file: "),
    ("temporary", no_room, "failed", "No space left on device"),
    ("temporary", setting("tempfile.gettempdir", raising(FileNotFoundError("none usable"))), "failed", "none usable"),
    ("data", environment("PVAE_DATA_DIR", "WHERE/absent"), "failed", "expected a folder"),
    ("data.digits", setting("pvae.upkeep.doctor.find_spec", returning(None)), "failed", "scikit-learn is missing"),
    ("data.mnist", environment("PVAE_OFFLINE", "1"), "warning", "4 of 4 files are not here, and PVAE_OFFLINE"),
    ("variables", environment("PVAE_RUNDIR", "x"), "warning", "PVAE_RUNDIR=x"),
    ("elbo", setting("pvae.training.evaluation.evaluate", returning({"elbo": -1.0})), "failed", "-1.000000000"),
    ("elbo", setting("pvae.training.evaluation.evaluate", returning({"elbo": math.nan})), "failed", "nan"),
    ("determinism", setting("pvae.util.seeds.set_noise", lambda *_: torch.seed()), "failed", "differ by up to"),
    ("plots", plotting(**{"matplotlib.pyplot": ["ImportError", "no module"]}), "failed", "no report can be drawn"),
    ("arviz", plotting(arviz=["FutureWarning", "refactored"]), "warning", "FutureWarning: refactored"),
    ("arviz", plotting(arviz=["PermissionError", "cache"]), "warning", "PermissionError: cache"),
    ("arviz", plotting(arviz=["AttributeError", "no style"]), "warning", "AttributeError: no style"),
    ("arviz", plotting(arviz="1.1.0"), "warning", "1.1.0, which pvae does not work with"),
    ("arviz", setting("pvae.upkeep.doctor.PLOTTING", "raise SystemExit('dead')"), "failed", "exit code 1 and: dead"),
]


@pytest.mark.parametrize(("name", "inject", "level", "told"), FAULTS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FAULTS)])
def test_every_check_sees_its_fault(
    name: str, inject: Inject, level: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 42: read-only folders, no room, LANG=C, -W error, a package that is missing or does not fit."""
    quiet_doctor(monkeypatch, name)
    with monkeypatch.context() as patch:
        inject(patch, tmp_path)
        found = doctor.doctor(tmp_path / "runs")
    (check,) = [check for check in found.checks if check.name == name]
    assert (check.level, told in check.found) == (level, True), check
    assert check.advice or level == "failed"
    assert found.ok == (level != "failed")


def quiet_doctor(patch: pytest.MonkeyPatch, name: str) -> None:
    """Leave out all checks but one: a fault that is injected for it may break others."""
    kept = name.partition(".")[0]
    for other in TABLE:
        if other != kept:
            patch.setattr(doctor, f"_{other}", returning(()))
    if kept not in ("plots", "arviz"):
        patch.setattr(doctor, "_plotting", dict)


def test_every_check_is_made_to_fail() -> None:
    seen = {name.partition(".")[0] for name, *_ in FAULTS}
    assert seen == set(TABLE) - {"devices", "extras"}  # these have tests of their own


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "A GPU", 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (check,) = doctor._devices()
    assert (check.level, check.found) == ("ok", "the CPU alone")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (check,) = doctor._devices()
    assert (check.level, "nvidia-smi" in check.advice) == ("warning", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch, "ones", returning(torch.full((2,), 1.0)))
    (check,) = doctor._devices()
    assert (check.level, check.found) == ("ok", "A GPU (80 GiB)")
    monkeypatch.setattr(torch, "ones", returning(torch.full((2,), 3.0)))
    with pytest.raises(DataError, match="got 6.0"):
        list(doctor._devices())


def test_extras_are_those_that_the_project_offers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == project["optional-dependencies"].keys() - {"peers", "test", "dev"}
    (check,) = doctor._extras()
    assert check.level == "ok"
    assert check.facts.keys() == doctor.EXTRAS.keys()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "garbage"}, None),
        ({}, None),
    ],
)
def test_the_cores_that_a_cgroup_allows(
    files: dict[str, str], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor, "CGROUP_V1", tmp_path)
    monkeypatch.setattr(doctor, "CGROUP_V2", tmp_path)
    assert doctor._quota() == cores


@pytest.mark.parametrize(
    ("options", "body", "kind"),
    [
        ([], "__version__ = '0.23.9'", None),
        ([], "open('/dev/null/cache')", "NotADirectoryError"),
        ([], "raise SystemExit(3)", "SystemExit"),
        (["error"], "import warnings; warnings.warn('refactored', FutureWarning)", "FutureWarning"),
    ],
)
def test_imports_are_tried_in_a_process_like_this_one(
    options: list[str], body: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 42: an unwritable cache and -W error stop the import of ArviZ, there and not here."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("__version__ = '3.0'")
    (tmp_path / "matplotlib" / "pyplot.py").touch()
    (tmp_path / "arviz.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "warnoptions", options)
    found = doctor._plotting()
    assert found["matplotlib.pyplot"] == "3.0"
    assert found["arviz"] == "0.23.9" if kind is None else found["arviz"][0] == kind


def test_where_a_collection_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pvae.data.sources.collections import MNIST_FILES

    (tmp_path / "mnist.npz").touch()
    check = doctor._collection("data.mnist", MNIST_FILES, tmp_path)
    assert (check.level, check.found) == ("ok", str(tmp_path))
    (tmp_path / "mnist.npz").unlink()
    for file in MNIST_FILES.files.values():
        (tmp_path / f"{file.name}.gz").touch()
    assert doctor._collection("data.mnist", MNIST_FILES, tmp_path).found == str(tmp_path)
    elsewhere = replace(MNIST_FILES, system=tmp_path)
    assert doctor._collection("data.mnist", elsewhere, None).found == str(tmp_path)
    assert "downloaded when" in doctor._collection("data.mnist", MNIST_FILES, None).found


def test_doctor_answers_without_torch(tmp_path: Path) -> None:
    """An installation whose torch is broken is what one asks it about; also with ASCII alone, and no terminal."""
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['pvae', 'doctor']; from pvae import cli; cli.main()"
    environment = {
        **os.environ,
        "LANG": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PVAE_RUN_DIR": "r\u00fcns",
    }
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
    found = Cleaning(Path("runs"), False, (cleaning.Removal(Path("x"), 1 << 20, "old"),), ((Path("y"), "held"),), ())
    Console(file=shown, width=80).print(found)
    assert "1.0 MiB" in shown.getvalue()
    assert "held" in shown.getvalue()
    assert repr(found) == str(found)


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="Expected a run directory"):
        verify(tmp_path)
