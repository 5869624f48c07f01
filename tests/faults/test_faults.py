"""Faults injected for real: full disks, kills, lost memory, hostile names, absurd sizes; exit codes; one JSON document.

Rows of the table in tests/README.md are named in the docstrings; the last section checks that the table is whole.
"""

import csv
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.text import Text
from torch import Tensor

import pvae
from pvae import analysis
from pvae.analysis.pages.document.document import claimed
from pvae.analysis.pages.report import compare, report
from pvae.analysis.truths.example import example_pair
from pvae.cli.app import say, tell
from pvae.data import Dataset
from pvae.errors import BusyError, DataError, DeclarationError, DeviceError, StorageError, printable
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss, weigh_step
from pvae.runs.find import this_process
from pvae.runs.rundir import RunDirectory
from pvae.training import evaluation, loop
from pvae.training.trainer import Trainer
from pvae.util import memory
from tests.cli_runner import TINY, run_cli
from tests.faults.conftest import FEW_ROWS
from tests.faults.injected import ASLEEP, disk_full, without_naps
from tests.runs_shared import assert_same, fit, tiny
from tests.training.pairs import Fragile as TwoNumbers, fit_pair
from tests.zoo_runs import hasty

TESTS = Path(__file__).parents[1]
CALM = {"epochs": 2, "checkpoint_seconds": 1000.0}
"""22 steps, and a checkpoint at the start and at the end alone."""
FEW = {"epochs": 6, "batch_size": 1000, "checkpoint_seconds": 0.0}
"""Six steps, each an epoch with a checkpoint."""


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing() -> None:
    """FAULTS 1, 10, 41: the soak in small; one process writes, and one that dies leaves what the next goes on with."""
    command = [sys.executable, str(TESTS / "soak" / "kills.py"), "--only", "fit", "--kills", "3", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 kills in ")
    assert "every round ended as if never killed" in done.stdout


def test_a_run_killed_before_its_first_step_says_so(tmp_path: Path) -> None:
    """FAULTS 1, 6: no manifest yet of what was to be fitted."""
    run = RunDirectory.create(tmp_path, "vae")
    run.write_spec(tiny().to_toml())
    with pytest.raises(DataError, match="stopped before its first step. Fit it anew"):
        pvae.resume(run.path, device="cpu", progress=False)


# ---------------------------------------------------------------------- full disks


@pytest.mark.parametrize("made_room", [True, False])
def test_checkpoints_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_room: bool) -> None:
    """FAULTS 2: the old one stays and the next occasion is taken; only at the end is it an error, 74."""
    whole = fit(tiny(**FEW), tmp_path / "whole")
    naps = without_naps(monkeypatch)
    original, (soft, hard) = loop.end_epoch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(trainer: Trainer, *arguments: Any) -> None:
        original(trainer, *arguments)
        limits = {2: 8192, 5: soft if made_room else 8192}
        if trainer.state.epoch in limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[trainer.state.epoch], hard))

    monkeypatch.setattr(loop, "end_epoch", fills)
    with disk_full(soft):  # puts the limit back
        if made_room:
            fit(tiny(**FEW), tmp_path / "full")
        else:
            with pytest.raises(StorageError, match="File too large.*Earlier checkpoints are untouched") as caught:
                fit(tiny(**FEW), tmp_path / "full")
            assert caught.value.exit_code == 74
    monkeypatch.undo()
    (folder,) = (tmp_path / "full").glob("*/*")
    run = pvae.Run.load(folder)
    told = [event for event in run.files.events() if event["kind"] == "storage"]
    assert len(told) == (3 if made_room else 7)
    assert naps == ([] if made_room else [0.1, 0.5, 2.0])
    assert len(run.files.alerts()) >= 3
    assert run.status["state"] == ("finished" if made_room else "failed")
    assert run.checkpoint.step == (6 if made_room else 2)
    assert not [*(folder / "checkpoints").glob(".*")]
    done = pvae.resume(run, device="cpu", progress=False)
    assert_same(whole, done)


def test_metrics_on_a_full_disk_do_not_stop_a_fit(tmp_path: Path) -> None:
    """FAULTS 3: the run is marked, an alert says so, and the weights are there."""
    with disk_full(4096):
        run = fit_pair(TwoNumbers(), tmp_path, "train.epochs=40", "train.engine=eager")
    assert run.status["state"] == "finished"
    assert run.status["epoch"] == 40
    assert run.status["degraded"] == "metrics.jsonl could not be written: File too large"
    assert 2 < len(run.files.metrics_rows()) < 80
    assert any("the record of this run has gaps: metrics.jsonl" in line for line in run.files.alerts())


@pytest.fixture(scope="module")
def reported(runs: Path) -> dict[Path, bytes]:
    """The files of a report of that run, and what they hold."""
    with hasty(laid_out=False):
        page = report(pvae.Run.load("vae", root=runs), samples=1, evidence_samples=2)
    return written(page.parent)


def written(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fast("True")
@pytest.mark.parametrize("last", [False, True])
def test_a_report_on_a_full_disk_leaves_the_old_one(last: bool, runs: Path, reported: dict[Path, bytes]) -> None:
    """FAULTS 3, 44 and 60: 74, and nothing half written, be it the first file that does not fit or the last."""
    sizes = sorted(map(len, reported.values()))
    with (
        hasty(laid_out=False),
        disk_full(sizes[-1] // 2 if last else 2000),
        pytest.raises(StorageError, match="What stood there is unchanged") as caught,
    ):
        report(pvae.Run.load("vae", root=runs), samples=2, evidence_samples=2)
    assert caught.value.exit_code == 74
    assert written(min(reported).parent) == reported


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_one_process_makes_a_page(kind: str, runs: Path, reported: dict[Path, bytes], tmp_path: Path) -> None:
    """FAULTS 44: the second gets 75 from the first moment to the last; a page whose maker was killed is made anew."""
    run, few = pvae.Run.load("vae", root=runs), dict[str, Any](samples=1, evidence_samples=2)
    folder = run.files.report if kind == "report" else tmp_path
    make = (
        partial(report, run, **few)
        if kind == "report"
        else partial(compare, [run, run], folder, names=["a", "b"], **few)
    )
    said = set()

    def meanwhile(*_: object) -> None:
        with pytest.raises(BusyError) as caught:
            make()
        said.add(str(caught.value).partition(" since")[0])

    (folder / ".lock").write_text(json.dumps({**this_process(), "pid": 2**22 + 1}))  # of a process that was killed
    with hasty(laid_out=False):
        page = make(on_progress=meanwhile)
    assert said == {
        f"{folder}: expected a page that nobody holds; got one held by process {os.getpid()} on host {platform.node()}"
    }
    assert kind == "comparison" or written(page.parent) == reported
    with claimed(folder):
        if kind == "report":
            assert "a page that nobody holds" in run_cli("report", "vae", "--run-dir", str(runs), code=75)[1]


def test_standard_output_on_a_full_disk_is_74(runs: Path) -> None:
    """FAULTS 42: the output goes where nothing fits, and nobody reads it: said, without a traceback."""
    shell = f"{sys.executable} -m pvae list > /dev/full; echo $?; {sys.executable} -m pvae list | true; "
    done = subprocess.run(["bash", "-c", shell + "echo ${PIPESTATUS[0]}"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["74", "141"] or done.stdout.split() == ["74", "0"]  # the list may fit into the pipe
    assert "expected to be read or written; got No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------- another machine, another declaration


def test_another_device_and_thread_count_are_listed(tmp_path: Path) -> None:
    """FAULTS 11: what is no longer exact, and the flag that accepts it."""
    run = fit(tiny(epochs=2), tmp_path)
    manifest = run.files.manifest
    run.files.write_manifest({**manifest, "device": "cuda", "threads": 77})
    run.files.update_status(state="interrupted")
    with pytest.raises(DeclarationError, match="device = 'cuda'; got 'cpu'") as caught:
        pvae.resume(run.path, device="cpu", progress=False)
    assert "threads = 77" in str(caught.value)
    assert "--allow-changes" in str(caught.value)
    done = pvae.resume(run.path, device="cpu", allow_changes=True, progress=False)
    assert done.status["state"] == "finished"
    assert [event for event in done.files.events() if event["kind"] == "changed"]


# ---------------------------------------------------------------------- alerts


def alerts_of(experiment: Experiment, where: Path, **options: Any) -> str:
    """All alerts of a fit that finished, as one text."""
    run = fit(experiment, where, **options)
    assert run.status["state"] == "finished"
    assert [event["kind"] for event in run.files.events()].count("alert") == len(run.files.alerts())
    return "\n".join(run.files.alerts())


def test_scales_at_their_bounds_are_an_alert(tmp_path: Path) -> None:
    """FAULTS 21: the floors are declared, and a scale that stands at one is told."""
    quick = tiny(**{**CALM, "epochs": 4, "optimizer": {"kind": "adam", "lr": 0.01}})
    low = quick.with_overrides(
        "latents.z.posterior.log_variance=[-0.2, 6.0]", "data.binarize=none",
        'decoder.likelihood={kind="normal", value=0.35, floor=0.34}',
    )  # fmt: skip
    told = alerts_of(low, tmp_path)
    assert re.search(r"guide\.z: \d+% of the scales are at their floor, 0\.905", told)
    assert "model.x: 100% of the scales are at their floor, 0.34" in told
    high = quick.with_overrides("latents.z.posterior.log_variance=[-12.0, -6.0]")
    assert re.search(r"guide\.z: \d+% of the scales are at their ceiling, 0\.0498", alerts_of(high, tmp_path))


def test_collapse_and_dead_codes_are_alerts_and_no_errors(tmp_path: Path) -> None:
    """FAULTS 22: an event and a line; `--strict` makes of it exit code 3."""
    asleep = ["fit", "vae", *TINY, *ASLEEP]
    where = ["--quiet", "--run-dir", str(tmp_path), "--device", "cpu"]
    out, _ = run_cli(*asleep, *where)
    assert "1 alerts, see events.jsonl" in out
    assert pvae.Run.load("latest", root=tmp_path).status["state"] == "finished"
    _, err = run_cli("resume", "latest", "--run-dir", str(tmp_path), "--strict", code=3)
    assert "alert: z has collapsed onto its prior" in err
    idle = alerts_of(Experiment.load("vq_vae", [*DEAD, "train.epochs=1"]), tmp_path)
    assert re.search(r"c: \d+ of 256 codes are dead", idle)


DEAD = [
    "train.engine=eager", "latents.c.codes=256", "encoder.network.channels=4", "decoder.network.channels=4",
    "encoder.network.blocks=1", "decoder.network.blocks=1",
]  # fmt: skip


def test_clipped_gradients_are_counted(tmp_path: Path) -> None:
    """FAULTS 23: 11 steps an epoch, all of them or none."""
    for norm, count in ((1e-3, 11), (1e9, 0)):
        run = fit(tiny(**CALM, clip_norm=norm), tmp_path)
        assert [row["clipped"] for row in run.files.metrics_rows() if row["split"] == "train"] == [count, count]
        assert run.files.alerts() == []
    assert all("clipped" not in row for row in fit(tiny(epochs=1), tmp_path).files.metrics_rows())


def test_fewer_rows_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    """FAULTS 24, 45: the stated rule, and a batch of 10^9 is as many rows as there are."""
    data = Dataset.from_tensors(torch.rand(3, 5).round(), validation=torch.rand(2, 5).round(), test=torch.zeros(1, 5))
    for size in (100, 10**9):
        run = fit(tiny(epochs=3, batch_size=size), tmp_path, data=data)
        assert run.status["step"] == 3
        assert np.isfinite(run.metrics["elbo"]).all()


def test_rows_of_test_that_are_in_train_are_an_alert(tmp_path: Path) -> None:
    """FAULTS 25."""
    x = torch.rand(60, 8)
    data = Dataset.from_tensors(x, validation=torch.rand(20, 8), test=torch.cat([x[:4], torch.rand(6, 8)]))
    run = pvae.fit(
        tiny(epochs=1).with_overrides('decoder.likelihood={kind="normal"}', "data.binarize=none"),
        data=data, run_dir=tmp_path, device="cpu", progress=False,
    )  # fmt: skip
    assert "4 of 10 rows of test also occur in train" in run.files.alerts()


# ---------------------------------------------------------------------- memory and devices


def fails_after(steps: int, error: Callable[[Tensor], Exception | None]) -> Callable[[Loss, Tensor], Any]:
    """A loss that raises what `error` gives for a batch, once so many batches went through."""
    original, calls = Loss.forward, []

    def forward(self: Loss, x: Tensor) -> Any:
        calls.append(len(x))
        if len(calls) > steps and (found := error(x)) is not None:
            raise found
        return original(self, x)

    return forward


CUDA_FULL = "CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation"
CPU_FULL = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda x: torch.OutOfMemoryError(CUDA_FULL) if len(x) > 30 else None, "Batches of 24 rows fit"),
        (lambda x: RuntimeError(CPU_FULL) if len(x) > 60 else None, "Batches of 48 rows fit"),
        (lambda _: MemoryError(), "Not even one row fits"),
    ],
)
def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, said: str) -> None:
    """FAULTS 40: an emergency checkpoint, 71, and what fits; the continuation is exact."""
    whole = fit(tiny(**CALM), tmp_path / "whole")
    monkeypatch.setattr(Loss, "forward", fails_after(5, error))
    with pytest.raises(DeviceError, match=f"out of memory at step 5 on cpu .*{said}.*pvae resume") as caught:
        fit(tiny(**CALM), tmp_path / "part")
    monkeypatch.undo()
    assert caught.value.exit_code == 71
    run = pvae.Run.load(next((tmp_path / "part").glob("*/*")))
    assert (run.status["state"], run.checkpoint.step) == ("failed", 5)
    done = pvae.resume(run, device="cpu", progress=False)
    assert_same(whole, done)


def test_memory_that_runs_out_within_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 40: weights have moved and the step has not ended, so they are in no checkpoint."""
    whole = fit(tiny(**CALM), tmp_path / "whole")
    original, calls = torch.optim.Adam.step, itertools.count()

    def step(self: torch.optim.Adam) -> None:
        original(self)
        if next(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(DeviceError, match="out of memory at step 3"):
        fit(tiny(**CALM), tmp_path / "part")
    monkeypatch.undo()
    run = pvae.Run.load(next((tmp_path / "part").glob("*/*")))
    assert run.checkpoint.step == 0
    done = pvae.resume(run, device="cpu", progress=False)
    assert_same(whole, done)


def test_memory_that_runs_out_in_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 40: half of an epoch's end is in no checkpoint, so that a continuation lacks no row of the metrics."""
    whole = fit(tiny(**CALM), tmp_path / "whole")
    original, calls = evaluation.evaluate, itertools.count()

    def evaluate(*given: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise MemoryError
        return original(*given)

    monkeypatch.setattr("pvae.training.loop.evaluate", evaluate)
    with pytest.raises(DeviceError, match="out of memory"):
        fit(tiny(**CALM), tmp_path / "part")
    monkeypatch.undo()
    done = pvae.resume(next((tmp_path / "part").glob("*/*")), device="cpu", progress=False)
    assert_same(whole, done)
    columns = [name for name in whole.metrics.columns if name != "seconds"]
    assert done.metrics[columns].equals(whole.metrics[columns])


def test_a_lost_device_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 40."""
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(Loss, "forward", fails_after(5, lambda _: lost))
    with pytest.raises(DeviceError, match="device lost at step 5 .*Go on from the last checkpoint") as caught:
        fit(tiny(**CALM), tmp_path)
    assert caught.value.exit_code == 71
    assert pvae.Run.load(next(tmp_path.glob("*/*"))).checkpoint.step == 0


ABSURD: dict[str, list[str]] = {
    "dim and width": ["latents.z.dim=100000", "encoder.network.hidden=[100000]"],
    "width": ["encoder.network.hidden=[1000000000000]"],
    "more than 2^63": ["encoder.network.hidden=[9000000000000000]", "decoder.network.hidden=[9999999999]"],
    "components": ['latents.z.prior={kind="mixture", components=10000000000}'],
    "pseudo-inputs": ['latents.z.prior={kind="vamp", components=1000000000}'],
    "full rank": ["latents.z.dim=100000", "latents.z.posterior.kind=full_rank_normal"],
    "channels": ['decoder.network={kind="conv", channels=[1000000, 1000000]}'],
    "many layers": [f"decoder.network.hidden={[20_000] * 40}"],
}


TRAINED = {
    "components and batch": ['latents.z.prior={kind="mixture", components=3000000}', "train.batch_size=1000"],
    "components of the most": ['latents.z.prior={kind="mixture", components=16000000}'],
    "pseudo-inputs and a guide": ['latents.z.prior={kind="vamp", components=1000000}'],
    "particles": ['objective={kind="iwae", particles=1000000}'],
    "a batch of all rows": ["train.batch_size=1000000000"],
    "covariances": ["latents.z.dim=1000", "latents.z.posterior.kind=full_rank_normal", "train.batch_size=9000"],
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_step_that_does_not_fit_is_refused_before_anything_is_allocated(case: str) -> None:
    """FAULTS 45 and 57: weights that fit, whose batches do not."""
    before, experiment = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Experiment.load("vae", TRAINED[case])
    with pytest.raises(DeclarationError, match=r"at least [\d,.]+ GiB to be trained in batches of"):
        experiment.build((1, 28, 28), experiment.train.batch_size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


HUGE: dict[str, Callable[[pvae.Pair, Tensor], object]] = {
    "samples": lambda pair, x: analysis.sample(pair, 10**11),
    "steps": lambda pair, x: analysis.traverse(pair, x[:1], steps=10**11),
    "points": lambda pair, x: analysis.interpolate(pair, x[0], x[1], steps=10**11),
    "simulated rows": lambda pair, x: analysis.calibration(pair, 10**11),
    "ranks": lambda pair, x: analysis.calibration(pair, 100, 10**11),
    "weighted ranks": lambda pair, x: analysis.calibration(pair, 100, importance=10**10),
    "surgery": lambda pair, x: analysis.surgery(pair, x, samples=10**11),
    "chains": lambda pair, x: analysis.ais(pair, x, chains=10**11),
    "temperatures": lambda pair, x: analysis.ais(pair, x, temperatures=10**11),
    "brackets": lambda pair, x: analysis.bracket(pair, x, rows=10**11),
}


@pytest.mark.parametrize("case", HUGE)
def test_an_analysis_that_does_not_fit_is_refused_before_anything_is_allocated(case: str) -> None:
    """FAULTS 45 and 57: whatever its result, or what it keeps on the way, would take."""
    pair, x = example_pair()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match=r"which need [\d,]+\.\d+ GiB\. Ask for fewer\.$"):
        HUGE[case](pair, x)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


MEASURED = {
    "dense": ("vae", ["train.batch_size=2000"]),
    "mixture": ("vae", ['latents.z.prior={kind="mixture", components=20000}']),
    "convolutions": ("vq_vae", []),
    "attention": ("transformer_prior", []),
    "covariances": ("vae", ["latents.z.dim=40", "latents.z.posterior.kind=full_rank_normal", "train.batch_size=500"]),
    "splines": ("spline_prior", []),
    "particles": ("vae", ['objective={kind="iwae", particles=20}']),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_memory_of_a_step_is_told_to_a_factor_of_two(case: str) -> None:
    """FAULTS 57: beside what torch's profiler counts in a step with its gradient, and Adam's."""
    name, overrides = MEASURED[case]
    experiment = Experiment.load(name, overrides)
    pair, row, rows = experiment.build((1, 8, 8)), experiment.frame((1, 8, 8)).row, experiment.train.batch_size
    told = memory.training_memory(pair, lambda copy: weigh_step(experiment.objective, copy, row, rows))
    x = torch.zeros(rows, *row)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        best = [p.detach().clone() for p in pair.parameters()]
        adam = torch.optim.Adam(pair.parameters())
        Loss(experiment.objective, pair, rows)(x)[0].backward()
        adam.step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    most = max(itertools.accumulate(event.nbytes() for event in changes)) + sum(p.nbytes for p in best)
    assert most / 2 < told < 2 * most


def test_graphs_of_many_latents_are_built_in_seconds() -> None:
    """FAULTS 57: 40 latents, each given all before it in model and guide."""
    small, names = {"network": {"kind": "mlp", "hidden": [4]}}, [f"z{i}" for i in range(40)]
    above = {name: names[:i] for i, name in enumerate(names)}
    latents = {n: {"dim": 2, "given": g, "posterior": {"kind": "normal", "given": ["x", *g]}} for n, g in above.items()}
    for name in names[1:]:
        latents[name]["prior"] = {"kind": "conditional_normal", **small}
    started = time.monotonic()
    pair = Experiment.from_dict({"latents": latents, "encoder": small, "decoder": small}).build((1, 8, 8), 100)
    assert len(pair.layout.latents) == 40
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("case", ABSURD, ids=list(ABSURD))
def test_absurd_declarations_are_refused_before_anything_is_allocated(case: str) -> None:
    """FAULTS 45: with the memory they would need; within a second, and without taking it."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DeclarationError, match=r"got one that needs (at least [\d,.]+ GiB|more than 2\^63 bytes)") as e:
        Experiment.load("vae", ABSURD[case]).build((1, 28, 28))
    assert e.value.exit_code == 2
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * (1 << 20)  # KiB: at most a GiB is tried


def test_what_fits_is_built_as_ever_though_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 45: counting first changes no weight."""
    experiment = Experiment.load("vae")
    plain = experiment.build((1, 8, 8)).state_dict()
    monkeypatch.setattr(memory, "COUNTED_BYTES", 1000)
    assert_same(dict(plain), dict(experiment.build((1, 8, 8)).state_dict()))


def test_a_fit_that_cannot_be_trained_here_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 45: weights that fit, but not with gradients, optimiser and a batch."""
    monkeypatch.setattr("pvae.util.memory.total_memory", lambda *_: 100_000)
    with pytest.raises(DeclarationError, match="to be trained in batches of 96 rows"):
        fit(tiny(), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- hostile text

EVIL = "\x1b[31m\x1b]0;title\x07\u202e=cmd [red] $\\foo$ <script>"


def test_a_declaration_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    """FAULTS 33: 1 MiB is the most that is looked at; neither a device nor a folder is a declaration."""
    path = tmp_path / "huge.toml"
    path.touch()
    os.truncate(path, 1 << 30)
    started = time.monotonic()
    for wrong, said in ((path, "at most 1 MiB"), (Path("/dev/zero"), "got neither"), (tmp_path, "got neither")):
        with pytest.raises(DeclarationError, match=said):
            Experiment.load(wrong)
    assert time.monotonic() - started < 1


def test_terminal_escapes_come_out_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 38: in names, in files' keys, in folders, in tables and in exceptions."""
    (tmp_path / "runs" / EVIL.replace("/", "") / "id").mkdir(parents=True)
    out, _ = run_cli("runs", "--run-dir", str(tmp_path / "runs"))
    (tmp_path / "evil.toml").write_text('[latents.z]\ndim = 2\n"\\u001b[2J\\u202e" = 1\n')
    _, err = run_cli("check", str(tmp_path / "evil.toml"), code=2)
    _, more = run_cli("check", f"{EVIL}.toml", code=2)
    say(Text(EVIL))
    tell(EVIL)
    out += capsys.readouterr().out
    for text in (out, err, more):
        assert "\\x1b" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "[red] $\\foo$ <script>" in out


def test_what_a_fit_tells_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS 37, 38: a run of an evil name is fitted, kept and told."""
    experiment = tiny(epochs=1).with_changes({"name": EVIL})
    run = pvae.fit(experiment, run_dir=tmp_path, device="cpu")
    assert run.name == EVIL
    assert run.path.parent.parent == tmp_path
    assert "\x1b" not in capsys.readouterr().err


def test_cells_of_a_table_of_runs_are_no_formulas(tmp_path: Path) -> None:
    """FAULTS 39, and 38: the same name in a picture is no mathematics."""
    name = "=cmd|' /C calc'!A0 $\\foo$"
    run = fit(tiny(epochs=1).with_changes({"name": name}), tmp_path)
    run_cli("rate-distortion", str(run.path), "--rows", "20", "--out", str(tmp_path / "plane"))
    (row,) = csv.DictReader((tmp_path / "plane.csv").read_text().splitlines())
    assert row["run"] == f"'{name}"
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")


def test_printable_keeps_what_people_write() -> None:
    """FAULTS 38."""
    assert printable("naïve 潜 🙂 [a]\n\tb") == "naïve 潜 🙂 [a]\n\tb"
    assert printable("\x1b\x00\x9b\u202e\ud800") == "\\x1b\\x00\\x9b\\u202e\\ud800"


# ---------------------------------------------------------------------- a bad place to run in


def test_no_home_no_terminal_no_locale_no_temporary_folder_no_warning(tmp_path: Path) -> None:
    """FAULTS 42: it works, under `python -W error` too. (In /proc nobody can make a folder, not even root.)"""
    nowhere = "/proc/nowhere"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS.parent), "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    environment |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR"), nowhere)
    environment |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "MPLCONFIGDIR": os.environ["MPLCONFIGDIR"]}
    fitting = ["fit", "vae", *TINY, *FEW_ROWS, "train.epochs=1", "name=naïve 🙂", "--run-dir", "runs"]
    script = "import sys\nfrom pvae import cli\nfor command in COMMANDS:\n    sys.argv = ['pvae', *command]\n    try:\n"
    script += "        cli.main()\n    except SystemExit as end:\n        assert end.code == 0, (command, end.code)\n"
    hasty = ["--evidence-samples", "10", "--gap-steps", "5"]
    commands = [
        ["new", "vq"],
        fitting,
        ["report", "latest", "--run-dir", "runs", *hasty],
        ["runs", "--run-dir", "runs"],
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script.replace("COMMANDS", ascii(commands))],
        cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert pvae.Run.load("latest", root=tmp_path / "runs").name == "naïve 🙂"
