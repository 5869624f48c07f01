"""Fits in shards: what a batch in shards is, and the same bits for any number of processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pvae
from pvae.errors import DeclarationError, Stopped
from pvae.experiment.experiment import Experiment
from pvae.util import group
from pvae.util.group import Shards
from tests.discrete.pairs import QUANTISERS
from tests.training.sharded_fits import ANALYSED, OWN_DATA, SYSTEMS, figures, fitted, left_by
from tests.zoo_runs import declared

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module in several processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True, **options)


def left_by_many(processes: int, folder: Path, *names: str) -> dict[str, Any]:
    """Weights and metrics of these fits, or of every system, left by several processes."""
    done = torchrun(processes, "tests.training.sharded_fits", folder, *names, timeout=300 * processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights and metrics of every system, left by two processes."""
    return left_by_many(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def found_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures that one process finds."""
    folder = tmp_path_factory.mktemp("one")
    return {name: json.loads(json.dumps(figures(fitted(name, folder)))) for name in ANALYSED}


@pytest.mark.parametrize("name", [*SYSTEMS, *OWN_DATA])
def test_two_processes_leave_the_bits_of_one(name: str, by_two: dict[str, Any], tmp_path: Path) -> None:
    """Weights, averages, optimiser, codebooks, sums and metrics."""
    assert left_by(fitted(name, tmp_path)) == by_two[name]


@pytest.mark.slow
def test_two_processes_leave_the_codebooks_of_one(tmp_path: Path) -> None:
    """Every quantiser of codes; its fast twins are the fits of a VQ-VAE and of residual codes above."""
    (tmp_path / "two").mkdir()
    by_two = left_by_many(2, tmp_path / "two", *QUANTISERS)
    for name in QUANTISERS:
        assert left_by(fitted(name, tmp_path)) == by_two[name], name


@pytest.mark.slow
def test_four_processes_leave_the_bits_of_two(by_two: dict[str, Any], tmp_path: Path) -> None:
    """All systems, and figures to 1e-10."""
    by_four = left_by_many(4, tmp_path)
    figures, of_two = by_four.pop("figures"), {name: left for name, left in by_two.items() if name != "figures"}
    assert by_four == of_two
    assert list(numbers(figures)) == pytest.approx(list(numbers(by_two["figures"])), rel=1e-10, abs=1e-10, nan_ok=True)


def numbers(value: Any) -> Iterator[float]:
    """Every number in nested dicts and lists."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield float(value)


@pytest.mark.parametrize("name", ANALYSED)
@pytest.mark.parametrize("what", ["surgery", "of_few", "evidence", "gap", "posterior"])
def test_two_processes_find_the_figures_of_one(
    name: str, what: str, by_two: dict[str, Any], found_by_one: dict[str, Any]
) -> None:
    """Terms, errors, diagnostics, the interval on new data, every draw."""
    assert list(numbers(by_two["figures"][name][what])) == pytest.approx(
        list(numbers(found_by_one[name][what])), rel=1e-10, abs=1e-10, nan_ok=True
    )


def test_shards_of_a_loss_without_noise_are_the_whole_batch(tmp_path: Path) -> None:
    """An autoencoder: the gradient of a batch is the mean of those of its shards, in float64 to rounding."""
    runs = [
        pvae.fit(declared("autoencoder", "train.epochs=2", f"train.shards={n}"), run_dir=tmp_path, progress=False)
        for n in (1, 8)
    ]
    whole, parts = (run.checkpoint.tensors["weights"] for run in runs)
    encoder = [name for name in whole if not name.startswith("model.priors")]
    for name in encoder:
        torch.testing.assert_close(parts[name], whole[name], rtol=2e-3, atol=2e-4)


def test_em_in_shards_is_em(tmp_path: Path) -> None:
    """Sums of an E-step do not depend on how the rows are divided."""
    runs = [
        pvae.fit(declared("em_mixture", "train.epochs=3", f"train.shards={n}"), run_dir=tmp_path, progress=False)
        for n in (1, 8)
    ]
    whole, parts = (run.checkpoint.tensors["weights"] for run in runs)
    for name in whole:  # log-odds of probabilities down to 1e-150; the responsibilities are float32
        torch.testing.assert_close(parts[name].sigmoid(), whole[name].sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_sums_are_a_binary_tree(count: int) -> None:
    """((a + b) + (c + d)) + ..., whatever the magnitudes."""
    parts = [torch.randn(50) * 10.0**i for i in range(count)]
    want = parts
    while len(want) > 1:
        want = [a + b for a, b in zip(want[::2], want[1::2], strict=True)]
    assert torch.equal(Shards(count).total(iter(parts)), want[0])


@pytest.mark.parametrize(("rows", "count"), [(100, 4), (97, 8), (3, 8), (1, 2)])
def test_shards_cover_a_batch_once(rows: int, count: int) -> None:
    """Neighbouring rows, of sizes that differ by one at most."""
    bounds = Shards(count).bounds(rows)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shards", [3, 6, 128, 0])
def test_other_numbers_of_shards_are_refused(shards: int) -> None:
    """No power of two, or more than the rows of a batch."""
    with pytest.raises(DeclarationError, match="shards"):
        Experiment.load("vae").with_overrides(f"train.shards={shards}", "train.batch_size=100")


def test_more_processes_than_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which numbers would do."""
    monkeypatch.setattr(group, "size", lambda: 2)
    with pytest.raises(DeclarationError, match=r"Declare train.shards = 2"):
        Shards(1)


def test_a_step_that_can_draw_nothing_is_skipped_as_a_whole(tmp_path: Path) -> None:
    """One NaN row of one shard: no weight moves in that step."""
    from tests.training.pairs import Fragile

    x = torch.randn(64, 2)
    x[3] = 99.0
    options = ("train.epochs=1", "train.batch_size=16", "train.shards=4", "train.nonfinite=skip")
    run = pvae.fit(Fragile().pair(), *options, data=x, run_dir=tmp_path, progress=False)
    assert run.status["skipped"] == 1


FEW = ("vae", "train.epochs=40", "train.shards=2", "train.engine=eager", "data.splits.train=[0, 400]")


def started(folder: Path, *launch: str) -> subprocess.Popen[bytes]:
    """Start a fit by torchrun, and wait for its first epoch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *(launch or ("--standalone", "--nproc-per-node=2"))]
    command = [*launcher, "-m", "pvae", "fit", *FEW, "train.checkpoint_seconds=0.2", "--run-dir", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_of(folder: Path, *launchers: subprocess.Popen[bytes]) -> pvae.Run:
    """The run in a folder, once it has metrics."""
    while not (found := list(folder.glob("vae/*/metrics.jsonl"))):
        assert all(each.poll() is None for each in launchers)
        time.sleep(0.1)
    return pvae.Run.load(found[0].parent)


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Processes that torchrun started, by number."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {pid: re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()) for pid in children}
    return [int(pid) for _, pid in sorted((int(rank[1]), pid) for pid, rank in found.items() if rank is not None)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights and metrics of the undisturbed fit."""
    declared = (*FEW, "train.checkpoint_seconds=0.2")
    return left_by(pvae.fit(*declared, run_dir=tmp_path_factory.mktemp("whole"), progress=False))


def test_one_goes_on_where_one_of_two_died(tmp_path: Path, whole: dict[str, Any]) -> None:
    """SIGKILL of a process stops the other, which says why and leaves a checkpoint; the bits are those of one."""
    fit = started(tmp_path)
    run = run_of(tmp_path, fit)
    os.kill(workers(fit)[1], signal.SIGKILL)
    assert fit.wait(45) != 0
    assert run.status["state"] == "failed"
    told = str(run.status["error"])
    assert re.search("Process 0 of 2: expected the others to answer; got: .*(?i:connection|closed)", told)
    assert run.files.status()["processes"] == 2
    assert left_by(pvae.resume(run, progress=False)) == whole


@pytest.mark.slow
def test_a_signal_to_the_launcher_writes_one_checkpoint(tmp_path: Path, whole: dict[str, Any]) -> None:
    fit = started(tmp_path)
    run = run_of(tmp_path, fit)
    fit.send_signal(signal.SIGTERM)
    assert fit.wait(60) != 0
    assert run.status["state"] == "interrupted"
    assert run.status["epoch"] in range(1, 40)
    assert left_by(pvae.resume(run, progress=False)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["process", "machine"])
def test_a_launch_goes_on_by_itself(tmp_path: Path, whole: dict[str, Any], lost: str) -> None:
    """Two agents of torchrun: a process dies, and all start again; an agent dies, and the other goes on alone."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=7", "--max-restarts=2"]
    patience = "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    launch = ["--nnodes=1:2", "--nproc-per-node=1", *rendezvous, patience]
    first = started(tmp_path, *launch)
    time.sleep(2)  # the first is the one that holds the store
    second = started(tmp_path, *launch)
    run = run_of(tmp_path, first, second)
    other = workers(second)[0]
    if lost == "machine":
        second.kill()
    os.kill(other, signal.SIGKILL)
    assert first.wait(120) == 0
    assert second.wait(120) == (0 if lost == "process" else -signal.SIGKILL)
    assert run.status["state"] == "finished"
    assert run.files.status()["processes"] == (2 if lost == "process" else 1)
    assert left_by(pvae.Run.load(run.path)) == whole


def test_an_error_of_the_first_process_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stop with its reason."""
    monkeypatch.setattr(group, "size", lambda: 2)
    monkeypatch.setattr(group, "rank", lambda: 1)
    monkeypatch.setattr(group, "_broadcast", lambda own, source: b"-StorageError: full")
    with pytest.raises(Stopped, match="StorageError: full"):
        group.from_first(lambda: None)
