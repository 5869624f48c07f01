"""Exporters: what is read back is what the metrics say, once for each step; whatever fails stops nothing."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from pvae.data import Dataset
from pvae.errors import BusyError, DataError, DeclarationError, MissingExtraError, StorageError
from pvae.experiment.experiment import Experiment
from pvae.runs.export import exporting as module, trackers
from pvae.runs.export.base import Exporter, safe_key
from pvae.runs.export.exporting import KINDS, export, exporting
from pvae.runs.export.trackers import MLflow, TensorBoard
from pvae.runs.run import Run
from pvae.runs.rundir import RunDirectory
from pvae.training.fit import fit
from pvae.training.resume import refit, resume
from tests.cli_runner import run_cli, run_cli_json
from tests.runs_shared import assert_same

TINY = (
    "train.epochs=3", "train.batch_size=20", "train.engine=eager", "train.schedule=constant", "latents.z.dim=2",
    "encoder.network.hidden=[8]", "decoder.network.hidden=[8]",
)  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>", r"$\foo$", "=cmd|' /C calc'!A0", "[red]", "\x1b[31m", "\u202e", "../../x", "a" * 300,
    "a" * 301, "\ud800", "a//b", "", ".", "kl/z", "kl.z", "é",
)  # fmt: skip
THEIRS = "tags.`pvae.id` = '{}'"
Points = dict[tuple[str, int], list[float]]


@pytest.fixture(scope="module", autouse=True)
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One SQLite store for all tests: making one takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_LOGGING_LEVEL", "ERROR")
        patch.chdir(folder)  # a store that is named says itself where its files go: here ./mlruns
        yield os.environ["MLFLOW_TRACKING_URI"]


def tiny(root: Path, *overrides: str, **options: Any) -> Run:
    data = Dataset.from_tensors(torch.rand(80, 6, generator=torch.Generator().manual_seed(0)).round())
    return fit(Experiment.load("vae", [*TINY, *overrides]), data=data, run_dir=root, progress=False, **options)


def again(run: Run, *overrides: str, **options: Any) -> Run:
    return resume(Run.load(run.path, data=run.data), *overrides, allow_changes=True, progress=False, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny(tmp_path_factory.mktemp("exported"), export=("tensorboard", "mlflow"))


@pytest.fixture
def made(tmp_path: Path) -> RunDirectory:
    """A run directory of two rows, without any fit behind it."""
    files = RunDirectory.create(tmp_path, "made")
    files.write_spec('name = "made"\n[train]\nepochs = 3\n')
    files.update_status(state="finished", step=20, epoch=2, elbo=-2.0, skipped=0, seconds=2.0)
    for epoch in (1, 2):
        log(files, epoch, -float(epoch))
    return files


def log(files: RunDirectory, epoch: int, elbo: float, **more: Any) -> None:
    row = {"epoch": epoch, "step": 10 * epoch, "seconds": float(epoch), "split": "train", "elbo": elbo}
    files.log_metrics({**row, **more})


# ---------------------------------------------------------------------- reading back


def export_all(files: RunDirectory) -> None:
    for kind in KINDS:
        export(files, kind)


def events(files: RunDirectory) -> list[Event]:
    """All events of all event files, every checksum compared."""
    found = []
    for path in sorted((files.path / "exports" / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            data = content[12 : 12 + size]
            assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
            assert struct.unpack("<I", content[12 + size : 16 + size])[0] == masked_crc32c(data)
            found.append(Event.FromString(data))
            content = content[16 + size :]
    return found


def summaries(files: RunDirectory) -> list[tuple[Event, Any]]:
    return [(event, value) for event in events(files) for value in event.summary.value]


def scalars(files: RunDirectory) -> Points:
    found: Points = {}
    for event, value in summaries(files):
        if value.WhichOneof("value") == "simple_value":
            found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def texts(files: RunDirectory) -> dict[str, str]:
    return {v.tag: v.tensor.string_val[0].decode() for _, v in summaries(files) if v.WhichOneof("value") == "tensor"}


def mlflow_runs(files: RunDirectory) -> list[Any]:
    """The MLflow runs of a run, the one that holds last."""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, THEIRS.format(files.path.name))
    return sorted(found, key=lambda run: "pvae.superseded" not in run.data.tags)


def metrics(files: RunDirectory) -> Points:
    run, client = mlflow_runs(files)[-1], MlflowClient()
    found: Points = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            found.setdefault((metric.key, metric.step), []).append(metric.value)
    return found


def wanted(files: RunDirectory, cls: type[TensorBoard] | type[MLflow]) -> Points:
    """What the metrics say, by the names that an exporter gives them; figures of the whole run left out."""
    name = cls(files).key
    return {
        (name(row["split"], term), row["step"]): [float(value)]
        for row in files.metrics_rows()
        for term, value in row.items()
        if term not in ("step", "seconds", "split") and value is not None
    }


def of_rows(points: Points) -> Points:
    return {key: value for key, value in points.items() if not key[0].startswith("last/")}


def assert_exported(files: RunDirectory) -> None:
    """Both hold the metrics and nothing else, every point once."""
    assert of_rows(metrics(files)) == wanted(files, MLflow)
    found = of_rows(scalars(files))
    assert found == {k: pytest.approx(v, rel=1e-6) for k, v in wanted(files, TensorBoard).items()}


def complaints(files: RunDirectory) -> list[str]:
    """The alerts of exporters."""
    return [alert for alert in files.alerts() if alert.startswith("Expected to export to ")]


# ---------------------------------------------------------------------- what is exported


def test_the_metrics_are_read_back(exported: Run) -> None:
    assert_exported(exported.files)
    step, elbo = exported.files.status()["step"], exported.files.status()["elbo"]
    assert ("validation/elbo", step) in scalars(exported.files)
    assert metrics(exported.files)["last/elbo", step] == [elbo]
    assert scalars(exported.files)["last/elbo", step] == [pytest.approx(elbo)]
    assert ("train/kl/z", step) in scalars(exported.files)
    assert ("train/kl.z", step) in metrics(exported.files)
    assert complaints(exported.files) == []


def test_parameters_and_tags_are_read_back(exported: Run) -> None:
    (run,) = mlflow_runs(exported.files)
    manifest = exported.files.manifest
    assert run.info.status == "FINISHED"
    assert run.data.params["latents.z.prior.kind"] == "standard_normal"
    assert run.data.params["train.batch_size"] == "20"
    assert run.data.tags["pvae.fingerprint"] == manifest["data"]["fingerprint"]
    assert run.data.tags["pvae.seed"] == "0"
    assert manifest["id"] in run.info.run_name
    hparams = {v.tag: v.metadata.plugin_data.content for _, v in summaries(exported.files) if "_hparams_" in v.tag}
    assert b"latents.z.prior.kind" in hparams["_hparams_/session_start_info"]
    assert "_hparams_/session_end_info" in hparams
    assert manifest["data"]["fingerprint"] in texts(exported.files)["run/text_summary"]


def test_the_weights_are_those_of_a_run_without(exported: Run, plain: Run) -> None:
    assert_same(exported.pair.state_dict(), plain.pair.state_dict())
    assert [{**row, "seconds": 0} for row in exported.files.metrics_rows()] == [
        {**row, "seconds": 0} for row in plain.files.metrics_rows()
    ]


def test_alerts_and_pictures_are_exported_and_links_are_not(made: RunDirectory, tmp_path: Path) -> None:
    """FAULTS 36, 38."""
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 7, 5) + b"\x08\x02\0\0\0"
    (made.analysis / "sample.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(b"secret" * 10)
    (made.report / "link.png").symlink_to(tmp_path / "secret.png")
    made.log_event("alert", "z has collapsed <script>\nsecond \x1b[31m line")
    export_all(made)
    images = {value.tag: value.image for _, value in summaries(made) if value.WhichOneof("value") == "image"}
    assert images.keys() == {"analysis/sample.png"}
    assert (images["analysis/sample.png"].width, images["analysis/sample.png"].height) == (7, 5)
    assert images["analysis/sample.png"].encoded_image_string == png
    shown = texts(made)["alerts/text_summary"]
    assert shown == "    z has collapsed <script>\n    second \\x1b[31m line"  # Markdown shows indented text as it is
    (run,) = mlflow_runs(made)
    client = MlflowClient()
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"alerts.txt", "analysis", "spec.toml"}
    told = Path(client.download_artifacts(run.info.run_id, "alerts.txt")).read_text()
    assert told == "z has collapsed <script>\nsecond \\x1b[31m line\n"


def test_hostile_names_become_keys_that_differ(made: RunDirectory) -> None:
    """FAULTS 37, 38, 39."""
    log(made, 3, -3.0, **dict.fromkeys(HOSTILE, 1.0), **{"not finite": float("nan")})
    export_all(made)
    assert_exported(made)
    for found in (metrics(made), scalars(made)):
        keys = {key for key, step in found if step == 30 and key.startswith("train/")}
        assert len(keys) == len(HOSTILE) + 2  # elbo and epoch
        assert all(key.isascii() and key.isprintable() and not set(key) & set("<>$'[]|") for key in keys)


@pytest.mark.parametrize("separator", ["/", "."])
def test_keys_are_safe_stable_and_do_not_collide(separator: str) -> None:
    keys = {name: safe_key(name, separator) for name in (*HOSTILE, "elbo", "train/elbo")}
    assert len(set(keys.values())) == len(keys)
    assert keys["elbo"] == "elbo"
    assert keys["train/elbo"] == f"train{separator}elbo"
    assert all(len(key) <= 200 and ".." not in key.split("/") for key in keys.values())


def test_without_an_address_the_store_is_beside_the_runs(
    made: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 61: in a folder whose name means something in an address."""
    root = tmp_path / "a?b#c %41 ä&d=1"
    made = RunDirectory(shutil.copytree(made.path, root / "made" / made.path.name))
    MlflowClient().search_experiments()  # the store of these tests is made by now, and making one takes seconds
    shutil.copy(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///"), root / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of_its_own")
    assert quote(str(root / "mlflow.db")) in export(made, "mlflow")
    monkeypatch.chdir(root)
    client = MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], THEIRS.format(made.path.name))
    assert run.data.metrics["train/elbo"] == -2.0
    kept = root / "mlflow-files" / "of_its_own" / run.info.run_id / "artifacts" / "spec.toml"
    assert kept.read_text() == made.spec_text


# ---------------------------------------------------------------------- going on


def test_a_resume_goes_on_exporting_without_being_told(exported: Run, tmp_path: Path) -> None:
    """FAULTS 10; and a parameter that changed is kept beside the first."""
    run = tiny(tmp_path, export="mlflow")
    assert run.files.manifest["exports"] == ["mlflow"]
    longer = again(run, "train.epochs=5", export=("tensorboard",))
    assert longer.files.manifest["exports"] == ["mlflow", "tensorboard"]
    longest = again(longer, "train.epochs=6")
    assert longest.status["epoch"] == 6
    assert complaints(longest.files) == []
    assert_exported(longest.files)
    (found,) = mlflow_runs(longest.files)
    assert found.data.params["train.epochs"] == "3"
    assert found.data.tags["pvae.now.train.epochs"] == "6"


def test_a_second_stage_is_a_run_of_its_own(exported: Run) -> None:
    changed = ("latents.z.prior.kind=mixture", "train.epochs=1")
    child = refit(exported, *changed, export="mlflow", progress=False)
    (found,) = mlflow_runs(child.files)
    assert found.data.tags["pvae.parent"] == f"vae/{exported.path.name}"
    assert of_rows(metrics(child.files)) == wanted(child.files, MLflow)
    assert refit(exported, *changed, progress=False).files.manifest["exports"] == []


def caught_up(exporters: list[Exporter]) -> None:
    for exporter in exporters:
        exporter.catch_up()


def test_rows_taken_back_and_written_again_are_exported_once(made: RunDirectory) -> None:
    """FAULTS 1, 10: a crash after the last checkpoint, and an exact resume, whose clock alone differs."""
    export_all(made)
    made.truncate_metrics(1)
    both = [cls(made) for cls in KINDS.values()]
    caught_up(both)
    log(made, 2, -2.0, seconds=99.0)
    log(made, 3, -3.0)
    caught_up(both)
    assert_exported(made)
    assert len(mlflow_runs(made)) == 1


def test_rows_written_again_otherwise_begin_another_export(made: RunDirectory) -> None:
    """FAULTS 18: a rollback with other noise, in the process that exports."""
    both = [cls(made) for cls in KINDS.values()]
    caught_up(both)
    made.truncate_metrics(1)
    log(made, 2, -7.0)
    caught_up(both)
    for exporter in both:
        exporter.close()
    assert_exported(made)
    old, new = mlflow_runs(made)
    assert old.info.status == "KILLED"
    assert old.data.metrics["train/elbo"] == -2.0  # nothing of a user's is thrown away
    assert new.data.metrics["train/elbo"] == -7.0


def test_a_line_that_is_being_written_waits(made: RunDirectory) -> None:
    """FAULTS 43."""
    exporter = TensorBoard(made)
    with (made.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3, "step": 30, "split": "train", "el')
    exporter.catch_up()
    assert max(step for _, step in scalars(made)) == 20
    with (made.path / "metrics.jsonl").open("ab") as file:
        file.write(b'bo": -3.0}\n')
    exporter.catch_up()
    assert scalars(made)["train/elbo", 30] == [-3.0]


def test_a_damaged_row_is_named(made: RunDirectory) -> None:
    with (made.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3}\n')
    with pytest.raises(DataError, match="expected rows with a step and a split; got"):
        export(made, "tensorboard")


def test_a_run_at_work_is_left_alone(made: RunDirectory) -> None:
    """FAULTS 16."""
    with made.held(), pytest.raises(BusyError):
        export(RunDirectory(made.path), "tensorboard")
    assert not (made.path / "exports").exists()


# ---------------------------------------------------------------------- failing


def refusing(message: str = "no server at https://me:secret@host/api\nsecond line") -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError(message)

    return refuse


def the_alert(files: RunDirectory, kind: str) -> str:
    """The one alert of exporters, which says how to export later."""
    (alert,) = complaints(files)
    assert f"export to {kind}; got " in alert
    assert alert.endswith(f"The fit goes on. Later: pvae export RUN {kind}")
    return alert


CALLS = [
    *((TensorBoard, name) for name in ("__init__", "begin", "write", "finish", "key", "catch_up", "show")),
    *((MLflow, name) for name in ("__init__", "begin", "write", "finish", "_describe")),
    *((MlflowClient, name) for name in ("__init__", "get_experiment_by_name", "search_runs", "create_run")),
    *((MlflowClient, name) for name in ("log_batch", "set_tag", "update_run", "log_text", "set_terminated")),
]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[f"{owner.__name__}.{name}" for owner, name in CALLS])
def test_a_failure_anywhere_is_one_alert(
    owner: type, name: str, made: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 3, 31: the first line of the error, without passwords, and what to do."""
    kind = "tensorboard" if owner is TensorBoard else "mlflow"
    monkeypatch.setattr(module, "SECONDS_BETWEEN_EXPORTS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refusing())
        with exporting(made, [kind], show=False):
            log(made, 3, -3.0)
    alert = the_alert(made, kind)
    assert "ConnectionError: no server at https://***@host/api." in alert
    assert "second line" not in alert
    export(made, kind)  # the advice of the alert
    found, cls = (scalars, TensorBoard) if kind == "tensorboard" else (metrics, MLflow)
    assert of_rows(found(made)) == wanted(made, cls)


def test_a_fit_whose_exporters_fail_is_a_fit_without(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 3 and 31."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_EXPORTS", 0.0)
    for cls in KINDS.values():
        monkeypatch.setattr(cls, "write", refusing())
    run = tiny(tmp_path, export=("tensorboard", "mlflow"))
    assert run.status["state"] == "finished"
    assert_same(run.pair.state_dict(), plain.pair.state_dict())
    assert len(complaints(run.files)) == 2


def test_a_folder_that_cannot_be_made_is_an_alert(made: RunDirectory, tmp_path: Path) -> None:
    """FAULTS 3, 36: here a link out of the run stands in the place of the folder."""
    (made.path / "exports").symlink_to(tmp_path)
    with exporting(made, ["tensorboard"], show=False):
        pass
    assert "expected a folder inside the run; got a link" in the_alert(made, "tensorboard")


@pytest.mark.parametrize(("took", "calls"), [(0.0, 3), (0.5, 1)])
def test_an_exporter_follows_and_a_slow_one_pauses(
    took: float, calls: int, made: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [100.0], []
    monkeypatch.setattr(module, "SECONDS_BETWEEN_EXPORTS", 0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    send = TensorBoard._send

    def timed(exporter: TensorBoard, *more: Any) -> None:
        send(exporter, *more)
        asked.append(len(exporter.rows))
        clock[0] += took

    monkeypatch.setattr(TensorBoard, "_send", timed)
    with exporting(made, ["tensorboard"], show=False):
        for epoch in (3, 4, 5):
            log(made, epoch, -float(epoch))
        assert len(asked) == calls
    assert asked[-1] == 5
    assert ("train/elbo", 50) in scalars(made)
    assert made.alerts() == []


def test_an_interrupted_block_is_still_told(made: RunDirectory) -> None:
    """FAULTS 14: the error goes through, and what there is has been exported."""
    made.update_status(state="interrupted")
    with pytest.raises(KeyboardInterrupt), exporting(made, ["tensorboard", "mlflow"], show=False):
        raise KeyboardInterrupt
    assert_exported(made)
    assert mlflow_runs(made)[-1].info.status == "KILLED"


def test_exporting_by_hand_says_what_is_wrong(made: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlflowClient, "create_run", refusing())
    with pytest.raises(StorageError, match=r"got ConnectionError: no server at https://\*\*\*@host/api. Try"):
        export(made, "mlflow")
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *_: (_ for _ in ()).throw(MlflowException("gone")))
    with pytest.raises(StorageError, match="MlflowException: gone"):
        export(made, "mlflow")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_export_leaves_the_older_one_whole(
    kind: str, made: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 60: other values, of which all but the last can be exported."""
    export(made, kind)
    made.truncate_metrics(1)
    log(made, 2, -7.0)
    found = scalars if kind == "tensorboard" else metrics
    before = found(made)
    with monkeypatch.context() as patch:
        patch.setattr(Exporter, "attached", refusing())
        with pytest.raises(StorageError):
            export(made, kind)
    assert found(made) == before
    assert kind == "tensorboard" or mlflow_runs(made)[-1].info.status == "FINISHED"
    export(made, kind)
    assert found(made)["train/elbo", 20] == [-7.0]


def test_a_server_that_does_not_answer_is_not_waited_for(made: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 66: bytes come, and never the last; a fit goes on with an alert, a command ends with 74."""
    monkeypatch.setattr(trackers, "ANSWER_SECONDS", 0.2)
    listening = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listening.getsockname()[1]}")

    def drip() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not ended.wait(0.05):
                connection.sendall(b" ")

    ended = threading.Event()
    threads = [threading.Thread(target=drip, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    with exporting(made, ["mlflow"], show=False):
        pass
    assert "TimeoutError: no answer within 0.2 seconds" in the_alert(made, "mlflow")
    assert "no answer within 0.2 seconds" in run_cli("export", str(made.path), "mlflow", code=74)[1]
    ended.set()
    for thread in threads:
        thread.join()
    listening.close()


# ---------------------------------------------------------------------- kinds and packages


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_told_before_the_fit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.errors.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'pvae-pyro\[{kind}\]'"):
        tiny(tmp_path, export=[kind])
    _, err = run_cli("fit", "vae", "--export", kind, "--run-dir", str(tmp_path), code=69)
    assert "it is not installed" in err
    assert list(tmp_path.iterdir()) == []


def test_a_remembered_exporter_that_is_gone_is_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(tmp_path, export=["tensorboard"])
    run.files.write_manifest({**run.files.manifest, "exports": ["tensorboard", "from_the_future"]})
    for name in [name for name in sys.modules if name.startswith("tensorboardX")]:
        monkeypatch.setitem(sys.modules, name, None)
    longer = again(run, "train.epochs=4")
    assert longer.status["epoch"] == 4
    gone, unknown = complaints(longer.files)
    assert "tensorboard; got ModuleNotFoundError" in gone
    assert "from_the_future; got DataError: no exporter of that name, only tensorboard, mlflow" in unknown


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"got 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        tiny(tmp_path, export=["tensorbord"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports(made: RunDirectory) -> None:
    told = run_cli_json("export", str(made.path), "tensorboard")
    assert told["kind"] == "tensorboard"
    assert str(made.path / "exports" / "tensorboard") in told["where"]
    assert scalars(made)["train/elbo", 20] == [-2.0]


ALONE = """
import socket, sys, threading
def refuse(*_): raise AssertionError("an address was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
import pvae.cli, pvae.training.fit
assert not {"mlflow", "tensorboardX"} & sys.modules.keys(), "imported before they are asked for"
from pathlib import Path
from pvae.runs.export.exporting import KINDS
from pvae.runs.rundir import RunDirectory
for cls in KINDS.values():
    cls(RunDirectory(Path(sys.argv[1])))
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None, "telemetry"
assert threading.active_count() == 1, threading.enumerate()
"""


def test_nothing_is_imported_unasked_and_no_telemetry_begins(made: RunDirectory) -> None:
    here = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", ALONE, str(made.path)], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
