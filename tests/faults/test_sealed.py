"""Runs are sealed: edits of its files, other machines and data, foreign runs, copies; rollbacks."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from torch import Tensor

import pvae
from pvae.data import Data, load
from pvae.errors import CheckpointError, DataError, DeclarationError, PvaeError
from pvae.experiment.plan import Train
from pvae.runs import checkpoint
from pvae.runs.rundir import RunDirectory
from pvae.runs.seal import edits
from pvae.runs.weights import chosen
from pvae.training.launch import own_plan
from pvae.training.trainer import State
from pvae.util.files import digest, sealed
from pvae.util.provenance import surroundings
from tests.cli_runner import run_cli, run_cli_json
from tests.data.writers import matlab
from tests.runs_shared import assert_same, fit, interrupted, resume, signalled_at, tiny
from tests.training.pairs import Fragile
from tests.upkeep.damage import edit, files_of, newest, oldest, rewritten, update

TESTS = Path(__file__).parents[1]

# ---------------------------------------------------------------------- rollbacks


class Brittle(Fragile):
    """A model whose density is NaN where a code is large, which other noise mends."""

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ N(z + loc, 1), with a NaN density for rows of which |z| > 2.7."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            bad = torch.where((z.abs() > 2.7).any(-1, keepdim=True), torch.nan, 0.0)
            pyro.sample("x", dist.Normal(z + self.loc + bad, 1.0, validate_args=False).to_event(1), obs=x)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [15]), (1000.0, [8, 15])])
def test_a_fit_with_rollbacks_resumes_bit_for_bit(tmp_path: Path, seconds: float, steps: list[int]) -> None:
    """FAULTS 10 and 54: interrupted before a rollback or between two, it goes back to the same checkpoint."""
    x = pvae.Dataset.from_tensors(torch.randn(60, 2, generator=torch.Generator().manual_seed(0)))
    train = Train(epochs=3, batch_size=8, nonfinite="rollback", engine="eager", checkpoint_seconds=seconds)
    whole = fit(Brittle().pair(), tmp_path / "whole", data=x, train=train, seed=1)
    assert whole.checkpoint.state["rollbacks"] == 3
    assert whole.checkpoint.step == 18
    for step in steps:
        with signalled_at(step), pytest.raises(pvae.PvaeError, match="SIGTERM"):
            fit(Brittle().pair(), tmp_path / str(step), data=x, train=train, seed=1)
        (part,) = (tmp_path / str(step)).glob("*/*")
        assert_same(whole, resume(part, data=x, pair=Brittle().pair()))


# ---------------------------------------------------------------------- files that changed


def csv(path: Path, x: np.ndarray) -> None:
    np.savetxt(path, x, "%.6f", ",", header="a,b", comments="")


def npz(path: Path, x: np.ndarray) -> None:
    np.savez_compressed(path, x_train=x)


def images(path: Path, x: np.ndarray) -> None:
    for number, row in enumerate(x):
        Image.fromarray((200 * row).astype(np.uint8).reshape(1, 2)).save(path / f"{number:02}.bmp")


REWRITTEN: dict[str, tuple[Callable[[Path, np.ndarray], object], dict[str, Any]]] = {
    "table.csv": (csv, {"source": "csv", "columns": {"a": "continuous", "b": "continuous"}}),
    "x.npz": (npz, {"source": "npz"}),
    "images": (images, {"source": "images"}),
    "x.npy": (np.save, {"source": "npy"}),
    "x.mat": (lambda path, x: matlab(path, x=x), {"source": "mat"}),
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", REWRITTEN)
def test_a_source_rewritten_with_its_old_time_is_read_anew(tmp_path: Path, name: str, in_place: bool) -> None:
    """FAULTS 56: as `rsync -t` does, with as many bytes as before, in the same file or over it."""
    (write, table), path = REWRITTEN[name], tmp_path / name
    found: list[int] = []
    for place in (3, 4):
        x = np.eye(40, 2, -place)
        if name == "images":
            path.mkdir(exist_ok=True)
        before = {old: old.stat() for old in (path, *path.glob("*")) if old.is_file()}
        for old in [] if in_place else before:
            old.rename(tmp_path / f"old {old.name}")  # its inode stays taken
        write(path, x)
        for old, status in before.items():
            assert old.stat().st_size == status.st_size
            os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))
        splits = {"train": [0, 20], "validation": [20, 30], "test": [30, 40]}
        data = load(Data.parse({**table, "path": str(path), "stream": True, "scale": "raw", "splits": splits}))
        found += (data.train.rows[torch.arange(20)].reshape(20, -1)[:, 0] > 0).nonzero().flatten().tolist()
    assert found == [3, 4]


# ---------------------------------------------------------------------- edited, or on another machine


def at_work(where: Path, **train: Any) -> Path:
    """A run that was interrupted in its second epoch."""
    return interrupted(tiny(epochs=2, **train), where, 15)


def in_manifest(**changes: Any) -> Callable[[Path], None]:
    """Other entries of the manifest; `data__fingerprint` is one of the table data. Its digest is made right."""

    def change(run: Path) -> None:
        found = json.loads((run / "manifest.json").read_text())
        for key, value in changes.items():
            table, _, inner = key.rpartition("__")
            (found[table] if table else found)[inner] = value
        (run / "manifest.json").write_text(json.dumps(sealed(found)))

    return change


def in_spec(old: str, new: str) -> Callable[[Path], None]:
    """Another text of the declaration."""
    return lambda run: edit(run / "spec.toml", old, new)


def dishonestly(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change of the declaration after which the manifest's digest of it is made right."""

    def changed(run: Path) -> None:
        change(run)
        in_manifest(spec=digest((run / "spec.toml").read_bytes()))(run)

    return changed


RATE = in_spec("lr = 0.001", "lr = 0.01")
EDITS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "rate": (RATE, r"train\.optimizer\.lr = 0\.001; got 0\.01", True),
    "rate and digest": (dishonestly(RATE), r"train\.optimizer\.lr = 0\.001; got 0\.01", True),
    "batch": (in_spec("batch_size = 96", "batch_size = 50"), r"train\.batch_size = 96; got 50", True),
    "epochs": (in_spec("epochs = 2", "epochs = 3"), r"train\.epochs = 2; got 3", True),
    "objective": (in_spec("particles = 1", "particles = 2"), r"objective\.particles = 1; got 2", True),
    "latent": (in_spec("dim = 3", "dim = 4"), r"latents\.z\.dim = 3; got 4", False),
    "data": (in_spec('binarize = "dynamic"', 'binarize = "threshold"'), r"data\.binarize", False),
    "versions": (in_manifest(versions__torch="2.0.0"), r"versions\.torch = '2\.0\.0'; got", True),
    "host": (in_manifest(host="elsewhere"), "host = 'elsewhere'; got", True),
    "platform": (in_manifest(platform="Windows"), "platform = 'Windows'; got", True),
    "threads": (in_manifest(threads=9), "threads = 9; got 1", True),
    "figure": (in_manifest(figure="iwae"), "figure = 'elbo'; got 'iwae'", True),
    "fingerprint": (in_manifest(data__fingerprint="0" * 64), "data = .*fingerprint", False),
    "trainable": (in_manifest(trainable=["guide."]), "trainable = None; got", False),
    "engine": (lambda run: edit(run / "manifest.json", '"eager"', '"compiled"'), "manifest.json.*edited", True),
    "metrics": (lambda run: edit(run / "metrics.jsonl", '"epoch": 1,', '"epoch": 0,'), r"metrics\.jsonl.*edited", True),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl.*edited", True),
    "end": (
        lambda run: update(run / "status.json", state="finished"),
        "checkpoint of the end, .* got one from before",
        True,
    ),
    "no seal": (lambda run: update(run / "manifest.json", sha256=None), "manifest.json.*edited", True),
}
"""Edits of a run, with what resume says of them, and True if `allow_changes` accepts them."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_run_is_seen_and_asked_about(tmp_path: Path, at_work_once: Path, name: str) -> None:
    """FAULTS 11, 13, 46 and 55: verify fails, resume lists the differences, and goes on only if told to."""
    change, told, allowed = EDITS[name]
    run = Path(shutil.copytree(at_work_once, tmp_path / "runs" / "tiny" / at_work_once.name))
    assert pvae.verify(run).ok
    change(run)
    assert not pvae.verify(run).ok
    before = files_of(run)
    with pytest.raises(DeclarationError, match=told) as caught:
        resume(run)
    assert ("--allow-changes" in str(caught.value)) == allowed
    if not allowed:
        with pytest.raises(DeclarationError, match=told):
            resume(run, allow_changes=True)
    assert files_of(run) == before
    if allowed and name in ("rate", "host", "versions"):
        with signalled_at(18), pytest.raises(pvae.PvaeError, match="SIGTERM"):
            resume(run, allow_changes=True)
        assert pvae.verify(run).ok
        assert resume(run).status["state"] == "finished"  # asked once


@pytest.fixture(scope="module")
def at_work_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at_work(tmp_path_factory.mktemp("at_work"))


def test_another_machine_is_told(at_work_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 55."""
    run = Path(shutil.copytree(at_work_once, tmp_path / "runs" / "tiny" / at_work_once.name))
    versions = {**surroundings()["versions"], "numpy": "9", "arviz": "9"}
    monkeypatch.setattr(
        "pvae.training.launch.surroundings",
        lambda: {"host": "elsewhere", "platform": "other", "versions": versions},
    )
    with pytest.raises(DeclarationError, match="(?s)host = .*got 'elsewhere'.*got 'other'.*got '9'") as caught:
        resume(run)
    assert str(caught.value).count("expected the run's own") == 3
    done = resume(run, allow_changes=True)
    assert done.files.manifest["host"] == done.checkpoint.run["host"] == "elsewhere"
    monkeypatch.undo()
    assert pvae.verify(run).ok


def test_a_run_of_an_earlier_version_is_not_sealed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 46: it loads and resumes, and that nothing vouches for it is said."""
    run = tmp_path / "vamp" / "old"
    shutil.copytree(next((TESTS / "fixtures" / "runs" / "vamp").iterdir()), run)
    assert "not sealed" in str(pvae.verify(run))
    pvae.resume(run, device="cpu")
    assert "not sealed" in capsys.readouterr().err
    assert pvae.verify(run).ok


# ---------------------------------------------------------------------- tensors and fields of other kinds


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at_work(tmp_path_factory.mktemp("averaged"), average=0.9)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("group", ["weights", "average", "best", "optimizer", "progress"])
def test_tensors_of_another_dtype_are_refused(averaged: Path, tmp_path: Path, group: str, dtype: torch.dtype) -> None:
    """FAULTS 63: with every checksum right, whatever the group and the dtype."""
    run = Path(shutil.copytree(averaged, tmp_path / "runs" / "tiny" / averaged.name))
    wanted = torch.int32 if group == "progress" and dtype == torch.float64 else dtype
    rewritten(run, lambda tensors: tensors.update({group: {k: v.to(wanted) for k, v in tensors[group].items()}}))
    with pytest.raises(CheckpointError, match=f"{wanted}") as caught:
        resume(run)
    assert caught.value.exit_code == 65
    if group not in ("optimizer", "progress"):
        assert not pvae.verify(run).ok


WRONG = (None, True, -1, 1.5, math.inf, 2**70, "x", [1], {"x": 1}, [None])


FREE = ("best", "elbo", "seconds", "best_epoch", "stopped")
"""Entries of a state that can be other numbers of their kind."""


def mutations(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """A JSON object with another value of one of its entries, for every entry of all its tables and every value."""
    for key, old in table.items():
        for value in WRONG:
            if value != old or type(value) is not type(old):
                yield (*path, key), {**table, key: value}
        if isinstance(old, dict):
            for inner, changed in mutations(old, (*path, key)):
                yield inner, {**table, key: changed}


def told_of(run: Path) -> str:
    """Words of the readers of a run on its entries, as one text; empty where all is as it should be."""
    told = []
    try:
        told += edits(RunDirectory(run))
        saved = checkpoint.read(newest(run))
        chosen(saved)
        State.of(saved)
        own_plan(pvae.Run.load(run))
    except (PvaeError, ValueError) as problem:
        told.append(str(problem))
    return " ".join(told)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "checkpoint"])
def test_every_field_of_another_kind_is_refused_by_name(tmp_path: Path, at_work_once: Path, file: str) -> None:
    """FAULTS 64: named, whatever stands there in its place; resume says it, 65, or asks about what is of its kind."""
    run = Path(shutil.copytree(at_work_once, tmp_path / "runs" / "tiny" / at_work_once.name))
    saved = newest(run)
    path = run / file if file == "manifest.json" else saved / {"checkpoint": "manifest.json"}.get(file, file)
    good, count = json.loads(path.read_text()), 0
    shutil.rmtree(oldest(run))
    for places, changed in mutations({k: v for k, v in good.items() if k not in ("sha256", "argv", "git", "started")}):
        path.write_text(json.dumps(sealed(changed)))
        if file == "state.json":
            path.write_text(json.dumps(changed))
            table = json.loads((saved / "manifest.json").read_text())
            table["files"][file] = {"sha256": digest(path.read_bytes()), "size": path.stat().st_size}
            (saved / "manifest.json").write_text(json.dumps(sealed(table)))
        told, value = told_of(run), changed[places[0]]
        if not told and (places == ("run", "ended") or (isinstance(value, int | float) and places[0] in FREE)):
            continue  # of its kind
        assert told, (places, value)
        assert places == ("run",) or any(place in told for place in places), (places, value, told)
        count += 1
        if count % 20 == 0:
            with pytest.raises(PvaeError) as caught:
                resume(run)
            assert caught.value.exit_code == 65 or re.search("the run's own|declaration", str(caught.value))
    assert count > 80


# ---------------------------------------------------------------------- data of strangers, and none


def table_run(where: Path) -> tuple[Path, Path]:
    """A run of a table in a folder of data, and that folder."""
    folder = where / "data"
    folder.mkdir(parents=True)
    csv(folder / "table.csv", np.random.default_rng(0).normal(size=(60, 2)))
    columns = {"a": "continuous", "b": "continuous"}
    network = {"network": {"kind": "mlp", "hidden": [3]}}
    declared = {
        "data": {"source": "csv", "path": "table.csv", "columns": columns}, "latents": {"z": {"dim": 2}},
        "encoder": network, "decoder": {**network, "likelihood": "columns"}, "train": {"epochs": 1, "engine": "eager"},
    }  # fmt: skip
    return fit(pvae.Experiment.from_dict(declared), where / "runs", data_dir=folder).path, folder


def without_fingerprint(run: Path) -> None:
    found = json.loads((run / "manifest.json").read_text())
    del found["data"]["fingerprint"]
    (run / "manifest.json").write_text(json.dumps(sealed({**found, "spec": digest((run / "spec.toml").read_bytes())})))


STRANGE: dict[str, Callable[[Path], None]] = {
    "no fingerprint": without_fingerprint,
    "another host": dishonestly(in_manifest(host="elsewhere")),
    "edited": lambda run: None,
}


@pytest.mark.parametrize("way", ["out", "absolute", "link"])
@pytest.mark.parametrize("kind", STRANGE)
def test_a_foreign_run_reads_nothing_that_the_user_does_not_name(
    tmp_path: Path, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 36 and 62: neither by `..`, nor by an absolute path, nor by a link in the data folder."""
    run, folder = table_run(tmp_path)
    (tmp_path / "secret").mkdir()
    secret = (folder / "table.csv").rename(tmp_path / "secret" / "secret.csv")
    (folder / "link.csv").symlink_to(secret)
    path = {"out": "../secret/secret.csv", "absolute": str(secret), "link": "link.csv"}[way]
    edit(run / "spec.toml", '"table.csv"', f'"{path}"')
    STRANGE[kind](run)
    monkeypatch.chdir(folder)
    for place in (None, folder):
        with pytest.raises(DataError, match=r"expected data inside the data folder.*--data-dir") as caught:
            _ = pvae.Run.load(run, data_dir=place).data
        assert caught.value.exit_code == 65
    if way != "out":
        assert len(pvae.Run.load(run, data_dir=secret.parent if way == "absolute" else tmp_path).data.train) == 48


def test_a_run_copied_away_without_its_data(tmp_path: Path) -> None:
    """FAULTS 74: samples need no data, also in a table's units; what does need them says how to name them."""
    run, folder = table_run(tmp_path)
    moved = (folder / "table.csv").rename(tmp_path / "table.csv")
    out = run_cli_json("sample", str(run), "-n", "5")
    assert out["shapes"]["x"] == [5, 2]
    assert (len(out["csv"]), out["png"]) == (1, [])
    for command in (["surgery", str(run)], ["encode", str(run)], ["report", str(run)]):
        _, told = run_cli(*command, code=65)
        assert "--data-dir" in told
    assert run_cli_json("sample", str(run), "-n", "5", "--data-dir", str(moved.parent))["csv"]
