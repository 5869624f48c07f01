"""Studies: what a sweep expands to, what is refused before anything runs, how runs are found, shared, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas
import pytest
import tomli_w
import torch

import pvae
from pvae.analysis.pages.study import STUDY_FIGURES, csv, frame, kept
from pvae.errors import DeclarationError, Interrupted, PvaeError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.runs.find import Claim
from pvae.runs.run import Run
from pvae.runs.rundir import RunDirectory
from pvae.studies.cases import Case, Declared
from pvae.studies.runner import Machine, Runner
from pvae.studies.study import Board, states, study, told
from pvae.studies.sweep import STUDIES_FOLDER, Measure
from pvae.studies.tasks import Shelf, Task, standing, tasks_of, work
from pvae.util.provenance import surroundings
from tests.cli_runner import run_cli
from tests.runs_shared import assert_same, fit, signalled_at

NETWORK = {"network": {"kind": "mlp", "hidden": [8]}}
TABLE: dict[str, Any] = {
    "data": {"source": "digits", "binarize": "threshold"},
    "latents": {"z": {"dim": 2}},
    "encoder": NETWORK,
    "decoder": {**NETWORK, "likelihood": "bernoulli"},
    "train": {"epochs": 2, "engine": "eager"},
}
MEASURE = {"rows": 50, "evidence": 5}
NORMAL = "standard_normal"
MIXTURE = {"kind": "mixture", "components": 3}
HOSTILE = ["[red]<script>", "=cmd|' /C calc'!A0", "\x1b[31mred $\\foo$"]


def write(folder: Path, sweep: Mapping[str, Any], name: str = "tiny", **changes: Any) -> Path:
    """A study file with the declaration of `TABLE`, or of `changes` alone where they name specs."""
    table = {} if "specs" in sweep else TABLE
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps({**table, **changes, "sweep": {"measure": MEASURE, **sweep}}))
    return path


def expand(folder: Path, sweep: Mapping[str, Any], **changes: Any) -> tuple[Case, ...]:
    return Declared.load(write(folder, sweep, **changes)).cases


def problems(folder: Path, sweep: Mapping[str, Any], **changes: Any) -> str:
    with pytest.raises(DeclarationError) as caught:
        expand(folder, sweep, **changes)
    return str(caught.value).replace(str(folder / "tiny.toml"), "FILE")


# ---------------------------------------------------------------------- expansion


def test_every_row_and_combination_under_every_seed_in_order(tmp_path):
    sweep = {
        "seeds": [5, 3],
        "grid": {"latents.z.dim": [2, 4], "train.optimizer.lr": [0.1, 0.2, 0.3]},
        "zip": {"latents.z.prior": [NORMAL, MIXTURE], "train.epochs": [1, 2], "label": ["N", "M"]},
    }
    cases = expand(tmp_path, sweep)
    assert len(cases) == 2 * 2 * 3 * 2
    assert len({case.key for case in cases}) == len({case.digest for case in cases}) == len(cases)
    titles = [f"N, dim=2, lr={lr}, seed {seed}" for lr in (0.1, 0.2) for seed in (5, 3)]
    assert [case.title for case in cases[:4]] == titles
    last = cases[-1]
    assert (last.label, last.seed, last.experiment.seed) == ("M, dim=4, lr=0.3", 3, 3)
    assert (last.experiment.latents["z"].dim, last.experiment.train.epochs) == (4, 2)
    assert last.experiment.latents["z"].prior.kind == "mixture"
    assert last.differences["latents.z.dim"] == "4"
    assert last.experiment.name == "tiny M, dim=4, lr=0.3"


LABELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "values that vary": (
        {"zip": {"latents.z.prior": [NORMAL, MIXTURE], "latents.z.dim": [2, 2]}},
        ["prior=standard_normal", 'prior={"kind": "mixture", "components": 3}'],
    ),
    "kinds": ({"zip": {"latents.z.prior": [{"kind": NORMAL}, MIXTURE]}}, ["standard_normal", "mixture"]),
    "paths of one end": (
        {"grid": {"encoder.network.hidden": [[4]], "decoder.network.hidden": [[4], [5]]}},
        [f"encoder.network.hidden=[4], decoder.network.hidden=[{width}]" for width in (4, 5)],
    ),
    "nested tables": ({"grid": {"latents": {"z": {"dim": [2, 3]}}}}, ["dim=2", "dim=3"]),
    "nothing": ({}, ["tiny"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_made_of_what_differs(tmp_path, case):
    sweep, labels = LABELS[case]
    assert [case.key for case in expand(tmp_path, sweep)] == [(label, 0, "fit") for label in labels]


def test_declarations_come_from_the_zoo_or_from_below_the_study(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.toml").write_text(tomli_w.dumps({**TABLE, "seed": 7}))
    cases = expand(tmp_path, {"specs": ["below/mine.toml", "vae"]})
    assert [(case.label, case.seed) for case in cases] == [("mine", 7), ("vae", 0)]
    assert cases[1].digest == Experiment.load("vae").digest()
    assert cases[1].differences == {"spec": "vae"}


def test_second_stages_belong_to_the_cases_they_name(tmp_path):
    sweep = {
        "seeds": [0, 1],
        "zip": {"latents.z.prior": [NORMAL, MIXTURE], "label": ["N", "M"]},
        "grid": {"latents.z.dim": [2, 3]},
        "refits": [{"label": "agg", "of": ["N"], "overrides": {"latents.z.prior.kind": "aggregated"}}],
    }
    cases = expand(tmp_path, sweep, refit={"priors": {"z": {"kind": "mixture", "components": 5}}})
    stages = [(case.label, case.stage) for case in cases if case.seed == 0]
    assert stages == [
        ("N, dim=2", "fit"), ("N, dim=2", "refit"), ("N, dim=2", "agg"),
        ("N, dim=3", "fit"), ("N, dim=3", "refit"), ("N, dim=3", "agg"),
        ("M, dim=2", "fit"), ("M, dim=2", "refit"), ("M, dim=3", "fit"), ("M, dim=3", "refit"),
    ]  # fmt: skip
    assert all((case.parent is None) == (case.stage == "fit") for case in cases)
    agg = cases[4 - 2]
    assert agg.experiment.latents["z"].prior.kind == "aggregated"
    assert agg.experiment.refit is None
    assert [len(task.cases) for task in tasks_of(cases)][:2] == [2, 1]


def test_a_digest_is_of_all_but_names(tmp_path):
    experiment = Experiment.from_dict(TABLE)
    renamed = experiment.with_changes({"name": "other", "description": "words"})
    assert experiment.digest() == renamed.digest() == Experiment.from_toml(renamed.to_toml()).digest()
    for override in ("seed=1", "train.epochs=3", "latents.z.dim=3", "data.binarize=dynamic"):
        assert experiment.with_overrides(override).digest() != experiment.digest()
    assert Experiment.from_dict({**TABLE, "seed": 0}).digest() == experiment.digest()  # a default written out


@pytest.mark.parametrize("name", zoo.names())
def test_the_digest_of_every_system_survives_its_file(name):
    experiment = Experiment.load(name)
    assert Experiment.from_toml(experiment.to_toml()).digest() == experiment.digest()


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES_FOLDER.glob("*.toml")))
def test_shipped_studies_expand(name):
    declared = Declared.load(name)
    assert declared.description
    assert (declared.search.trials if declared.search else len(declared.cases)) >= (5 if name == "colour" else 12)
    source = "patches" if name == "colour" else "fashion_mnist"
    assert {case.experiment.data.source for case in declared.cases} <= {source}  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- refusals

AGG = {"label": "agg", "overrides": {"latents.z.prior.kind": "aggregated"}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"zip": {"train.epochs": [1, 2], "seed": [1]}}, "sweep.zip: expected lists of one length; got"),
    "labels alone": ({"zip": {"label": ["a"]}}, "sweep.zip: expected labels with values; got labels alone"),
    "label twice": ({"zip": {"train.epochs": [1, 2], "label": ["a", "a"]}}, "expected a name of its own for each row"),
    "label is text": ({"zip": {"train.epochs": [1], "label": [True]}}, "sweep.zip.label: expected texts of 1 to 100"),
    "seed as a path": ({"grid": {"seed": [1]}}, "got 'seed'. Use sweep.seeds."),
    "name as a path": ({"grid": {"name": ["a"]}}, "expected a dotted path of the declaration; got 'name'"),
    "path twice": ({"grid": {"latents.z.dim": [1]}, "zip": {"latents.z": [{"dim": 2}]}}, "expected paths apart"),
    "seed twice": ({"seeds": [1, 1]}, "sweep.seeds: expected each once; got [1, 1]"),
    "negative seed": ({"seeds": [-1]}, "sweep.seeds.0: expected greater than or equal to 0; got -1."),
    "bool for a seed": ({"seeds": [True]}, "sweep.seeds.0: expected a valid integer; got true."),
    "unknown key": ({"sead": [1]}, "sweep.sead: expected one of grid, measure, refits, seeds, specs, zip; got an unk"),
    "no values": ({"grid": {"train.epochs": []}}, "sweep.grid.train.epochs: "),
    "no list": ({"grid": {"train.epochs": 3}}, "sweep.grid.train.epochs: expected a valid tuple; got 3."),
    "bad value": ({"grid": {"latents.z.dim": [2, -1]}}, "FILE: case 'dim=-1': latents.z.dim: expected greater than 0"),
    "bad path": ({"grid": {"train.epoch": [2, 3]}}, "FILE: every case: train.epoch: expected one of "),
    "too many": ({"seeds": list(range(999)), "grid": {"latents.z.dim": [1, 2]}}, "got 1998 (1 specs x 1 rows x 2 comb"),
    "one declaration": ({"grid": {"latents.z.prior": [NORMAL, {"kind": NORMAL}], "train.epochs": [2]}}, "got the same"),
    "stage of none": ({"refits": [{**AGG, "of": ["tinny"]}]}, "expected labels among 'tiny'; got 'tinny' (did you mea"),
    "stage called fit": ({"refits": [{**AGG, "label": "fit"}]}, "expected labels of their own, none 'fit' or 'refit'"),
    "stage of nothing": (
        {"refits": [{"label": "a", "overrides": {"train.epochs": 3}}]},
        "case 'tiny': refit 'a': refit: expected another prior",
    ),
    "stage of more": (
        {"refits": [{"label": "a", "overrides": {"latents.z.dim": 3}}]},
        "case 'tiny': refit 'a': refit: expected the run's own latents.z.dim = 2; got 3.",
    ),
    "no such spec": ({"specs": ["vea"]}, "expected a zoo name, or a TOML file below the study's folder; got 'vea'"),
    "spec elsewhere": ({"specs": ["../x.toml"]}, "below the study's folder; got '../x.toml'"),
    "absolute spec": ({"specs": ["/etc/hostname.toml"]}, "below the study's folder; got '/etc/hostname.toml'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_before_anything_runs(tmp_path, case):
    """FAULTS 34 and 36: each with its place, what was expected and what was found."""
    sweep, expected = BAD[case]
    assert expected in problems(tmp_path, sweep)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    """FAULTS 36."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out.toml").write_text(tomli_w.dumps(TABLE))
    (tmp_path / "in" / "link.toml").symlink_to(tmp_path / "out.toml")
    assert "below the study's folder; got 'link.toml'" in problems(tmp_path / "in", {"specs": ["link.toml"]})


def test_all_problems_come_at_once(tmp_path):
    found = problems(
        tmp_path, {"grid": {"latents.z.dim": [-1, 2], "train.epochs": [0, 1]}, "refits": [{**AGG, "of": ["nobody"]}]}
    ).splitlines()
    assert len(found) == 5  # either value in two cases, and the stage
    beside = problems(tmp_path, {"specs": ["vae", "vae"]}, latents={"z": {"dim": 2}}).splitlines()
    assert "FILE: latents: expected in the files of sweep.specs; got it beside them. Move it there." in beside
    assert any("sweep.specs: expected each once" in line for line in beside)


def test_a_file_without_a_sweep_and_a_name_that_is_none(tmp_path):
    (tmp_path / "plain.toml").write_text(tomli_w.dumps(TABLE))
    with pytest.raises(DeclarationError, match=r"sweep: expected a table; got none. Fit one experiment with: pvae fit"):
        Declared.load(tmp_path / "plain.toml")
    with pytest.raises(DeclarationError, match=r"\(capacity, codes, colour, discrete, priors\).*did you mean 'priors'"):
        Declared.load("prior")


# ---------------------------------------------------------------------- running


class InProcess:
    """A worker of a study that does its work here, when it is looked at for the second time."""

    def __init__(self, command: list[str], *, stdin: IO[bytes], **_settings: object) -> None:
        assert command[1] == "-P"  # nothing is imported from the working directory
        stdin.seek(0)
        self.order = json.load(stdin)
        self.pid, self.looks, self.code = os.getpid(), 0, 0

    def poll(self) -> int | None:
        self.looks += 1
        return self.wait() if self.looks > 1 else None

    def wait(self) -> int:
        order, self.order = self.order, {}
        threads = torch.get_num_threads()
        try:
            if order:
                with Claim(Path(order["claim"]), "a case"):
                    work(order)
        except PvaeError as error:
            self.code = error.exit_code
        finally:
            torch.set_num_threads(threads)
        return self.code

    def send_signal(self, number: int) -> None:
        self.code = 128 + number


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """A study writes its page where it is called."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Orders of the workers that were begun; processes are replaced, which would import torch for seconds each."""
    begun: list[str] = []
    begin = Machine.begin

    def beginning(self: Machine, orders: Mapping[Task, dict[str, Any]]) -> None:
        begun.extend(task.doing for task in orders)
        begin(self, orders)

    monkeypatch.setattr("pvae.util.attempt.Popen", InProcess)
    monkeypatch.setattr(Machine, "begin", beginning)
    return begun


def run(file: Path, **settings: Any) -> pvae.Study:
    return study(file, run_dir=file.parent / "runs", device="cpu", progress=False, **settings)


def command(file: Path, *options: str, code: int = 0) -> tuple[str, str]:
    return run_cli("study", str(file), "--run-dir", str(file.parent / "runs"), "--device", "cpu", *options, code=code)


PRIORS = {"latents.z.prior": [NORMAL, MIXTURE], "label": ["N", "M"]}


def test_a_study_is_run_once_and_read_off_as_tables(tmp_path, started):
    file = write(tmp_path, {"seeds": [0, 1], "zip": PRIORS, "refits": [{**AGG, "of": ["N"]}]})
    found = run(file)
    assert sorted(started) == ["fit"] * 4 + ["refit"] * 2
    assert not found.failures
    assert list(found.runs) == [case.key for case in found.declared.cases]
    child = found.runs["N", 1, "agg"]
    assert child.files.manifest["parent"]["run"].endswith(found.runs["N", 1, "fit"].path.name)

    table = found.to_frame()
    assert len(table) == 6
    assert not table[[name for name in STUDY_FIGURES if name != "new_gain_upper"]].isna().any(axis=None)
    written = json.loads((found.runs["N", 0, "fit"].path / "analysis" / "study.json").read_text())["figures"]
    assert "new_gain" not in written["train"]  # on rows that were fitted on nothing is said of new data
    assert table["new_gain"].iloc[0] == written["test"]["new_gain"]["value"]
    assert table["latents.z.prior"].tolist() == ["standard_normal"] * 4 + [json.dumps(MIXTURE)] * 2
    assert (table["elbo"] - (table["reconstruction"] - table["kl"])).abs().max() < 1e-6
    assert (table["kl"] - table["mutual_information"] - table["marginal_kl"]).abs().max() < 1e-6
    x = found.runs["M", 0, "fit"].data.test.x
    assert len(x) > 50  # figures are of the rows that were asked for
    means = found.summary()
    assert means[["case", "stage", "seeds"]].values.tolist() == [["N", "fit", 2], ["N", "agg", 2], ["M", "fit", 2]]
    both = table[(table["case"] == "M")]["elbo"]
    assert means["elbo"].iloc[2] == pytest.approx(both.mean())
    assert means["elbo_error"].iloc[2] == pytest.approx(both.std() / 2**0.5)

    again = run(file)
    assert len(started) == 6  # nothing was begun
    assert again.to_frame().equals(table)


def test_runs_are_found_by_what_they_declare_and_measured_anew_with_other_settings(tmp_path, started):
    fitted = fit(Experiment.from_dict({**TABLE, "name": "by hand", "description": "words"}), tmp_path / "runs")
    file = write(tmp_path, {"grid": {"latents.z.dim": [2]}})
    found = run(file)
    assert found.runs["dim=2", 0, "fit"].path == fitted.path
    assert started == ["measure"]
    run(write(tmp_path, {"grid": {"latents.z.dim": [2]}, "measure": {**MEASURE, "rows": 40}}))
    assert started == ["measure", "measure"]
    path = fitted.path / "analysis" / "study.json"
    for damage in ("", "[]", path.read_text().replace('"test"', '"tset"'), path.read_text().replace("40", "41")):
        path.write_text(damage)
        assert kept(fitted.files, Measure(rows=40, evidence=5)) is None


def test_a_run_of_another_machine_is_gone_on_with_where_that_is_asked_for(tmp_path, started, monkeypatch):
    """FAULTS 55: as resume does; else its case fails, and what to say is told."""
    file = write(tmp_path, {})
    with signalled_at(10), pytest.raises(Interrupted):
        fit(Experiment.from_dict(TABLE), tmp_path / "runs")
    monkeypatch.setattr("pvae.training.launch.surroundings", lambda: {**surroundings(), "host": "elsewhere"})
    assert "say --allow-changes" in command(file, "--no-page", code=1)[1]
    command(file, "--no-page", "--allow-changes")
    [(_, state, _)] = states(Declared.load(file), tmp_path / "runs")
    assert state == "finished"


def test_an_interrupted_run_is_gone_on_with(tmp_path, started):
    """FAULTS 10: bit for bit; and a run that never began, or whose files are damaged, is passed over."""
    whole = fit(Experiment.from_dict(TABLE), tmp_path / "whole")
    file = write(tmp_path, {})
    with signalled_at(10), pytest.raises(Interrupted):
        fit(Experiment.from_dict(TABLE), tmp_path / "runs")
    declared = Declared.load(file)
    [(_, state, files)] = states(declared, tmp_path / "runs")
    assert state == "stopped"
    assert files is not None
    RunDirectory.create(tmp_path / "runs", "empty").write_spec(declared.cases[0].experiment.to_toml())
    damaged = RunDirectory.create(tmp_path / "runs", "damaged")
    (damaged.path / "manifest.json").write_text("[]")
    found = run(file)
    assert started == ["resume"]
    assert found.runs["tiny", 0, "fit"].path == files.path
    assert standing(files) == "finished"
    assert_same(whole, found.runs["tiny", 0, "fit"])


def test_a_declared_second_stage_is_part_of_its_case(tmp_path, started):
    second = {"priors": {"z": MIXTURE}, "train": {"epochs": 1, "engine": "eager"}}
    found = run(write(tmp_path, {}, refit=second))
    assert started == ["fit"]
    assert list(found.runs) == [("tiny", 0, "fit"), ("tiny", 0, "refit")]
    child = found.runs["tiny", 0, "refit"].path
    child.rename(tmp_path / "elsewhere")
    run(write(tmp_path, {}, refit=second))
    assert started == ["fit", "resume"]
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 1  # the first stage was not fitted again


@pytest.mark.parametrize("kind", ["array", "frame", "file"])
def test_a_study_takes_data_from_python(kind: str, tmp_path, started):
    x = np.random.RandomState(0).standard_normal((60, 4))
    table = pandas.DataFrame(x, columns=list("abcd"))
    columns: dict[str, Any] = {"columns": dict.fromkeys("abcd", "continuous")}
    source = {"source": "frame", **columns} if kind == "frame" else {"source": "tensor"}
    np.save(tmp_path / "x.npy", x)
    data = {"array": x, "frame": table, "file": tmp_path / "x.npy"}[kind]
    likelihood = "columns" if kind == "frame" else "normal"
    changes: dict[str, Any] = {"data": source, "decoder": {**NETWORK, "likelihood": likelihood}}
    for orders in (["fit"], ["fit"]):  # the second finds its run
        found = run(write(tmp_path, {}, **changes), data=data)
        assert started == orders
    (only,) = found.runs.values()
    assert len(only.data.whole()) == 60
    assert only.rows(data).x.shape == (60, 4)


def test_a_failing_case_stops_no_other(tmp_path, started):
    """FAULTS 18: its last line is kept and shown, its second stage fails with it, and the command ends with 1."""
    optimizers = [{"kind": "adam", "lr": 1e30}, {"kind": "sgd", "lr": 0.01}]
    file = write(tmp_path, {"grid": {"train.optimizer": optimizers}, "refits": [{**AGG, "of": ["adam"]}]})
    out, err = command(file, "--json", code=1)
    found = json.loads(out)
    assert [row["case"] for row in found["runs"]] == ["sgd"]
    assert [(row["case"], row["stage"]) for row in found["failures"]] == [("adam", "fit"), ("adam", "agg")]
    assert "NaN" in found["failures"][0]["error"] or "finite" in found["failures"][0]["error"]
    assert "tiny: sgd, seed 0: finished" in err
    assert f"failed: adam, fit, seed 0: {found['failures'][0]['error']}" in err
    assert "failed: adam, agg, seed 0: its first stage failed" in err


def runner(file: Path, root: Path, place: Machine | None = None) -> Runner:
    setting = {
        "run_dir": str(root), "data_dir": None, "device": "cpu", "threads": 1, "measure": MEASURE,
        "allow_changes": False,
    }  # fmt: skip
    place = place or Machine(root, "tiny", 1)
    return Runner(tasks_of(Declared.load(file).cases), setting, place, lambda _tasks: None, str(file))


def test_two_studies_at_once_fit_no_case_twice(tmp_path, started, monkeypatch):
    """FAULTS 16: what the other has is waited for, then found finished."""
    monkeypatch.setattr("pvae.studies.runner.LOOK_SECONDS", 0.0)
    file, root = write(tmp_path, {"zip": PRIORS}), tmp_path / "runs"
    both = runner(file, root), runner(file, root)
    seen: set[str] = set()
    for _ in range(20):
        for one in both:
            with Claim(both[0].tasks[0].claim(root).path, "a case") if not seen else nullcontext():
                one._look()
            seen |= {task.state for task in one.tasks}
    assert "held" in seen
    assert {task.state for one in both for task in one.tasks} <= {"finished", "found"}
    assert sorted(len(list(folder.iterdir())) for folder in root.iterdir() if folder.name != ".studies") == [1, 1]


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path, started):
    """FAULTS 16: also where it is no study's."""
    fitted = fit(Experiment.from_dict(TABLE), tmp_path / "runs")
    one = runner(write(tmp_path, {}), tmp_path / "runs")
    fitted.files.update_status(state="running", pid=os.getpid(), birth=None)
    one._look()
    assert [task.state for task in one.tasks] == ["held"]
    assert not started
    fitted.files.update_status(state="finished")
    one.place.due = 0.0
    while one.tasks[0].state != "finished":
        one._look()
    assert started == ["measure"]


def test_a_run_folder_that_cannot_be_made_fails_the_case(tmp_path, started):
    """FAULTS 42."""
    file = write(tmp_path, {})
    (tmp_path / "runs").write_text("a file")
    found = run(file)
    assert "expected a folder to keep runs in" in found.failures["tiny", 0, "fit"]
    assert not started


def test_a_case_belongs_to_its_worker_until_that_is_dead(tmp_path, started):
    """FAULTS 16 and 48: not to the study that started it, which may be dead before."""
    one = runner(write(tmp_path, {}), tmp_path / "runs")
    path = one.tasks[0].claim(tmp_path / "runs").path
    code = f"import pathlib, pvae.runs.find as c; c.Claim(pathlib.Path({str(path)!r}), '').acquire(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as worker:
        while not path.exists():
            time.sleep(0.02)
        one._look()
        assert [task.state for task in one.tasks] == ["held"]
        assert f"held by process {worker.pid} " in told(one.tasks[0])
        worker.kill()
    assert not started
    one.place.due = 0.0
    one._look()
    assert started == ["fit"]
    one.place.end()
    assert not path.exists()


@pytest.mark.slow
def test_a_study_whose_parent_was_killed_goes_on(tmp_path):
    """FAULTS 48: the worker writes a checkpoint and ends; nothing is done twice, nothing lost, bit for bit."""
    train = {"epochs": 600, "engine": "eager", "checkpoint_seconds": 1000}
    file, root = write(tmp_path, {}, train=train), tmp_path / "runs"
    whole = fit(Declared.load(file).cases[0].experiment, tmp_path / "whole")
    command = [sys.executable, "-m", "pvae", "study", str(file), "--run-dir", str(root), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
        while not list(root.glob("tiny/*/metrics.jsonl")):
            assert killed.poll() is None
            time.sleep(0.02)
        killed.kill()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tiny, seed 0: resume" in done.stderr
    (folder,) = root.glob("tiny/*")
    run = Run.load(folder)
    epochs = [row["epoch"] for row in run.files.metrics_rows() if row["split"] == "train"]
    assert epochs == list(range(1, 601))
    assert_same(whole, run)


def test_processes_of_a_study_end_with_it(tmp_path):
    """FAULTS 14: Ctrl-C is passed on, checkpoints are written, the message says how to go on; then 130."""
    file = write(tmp_path, {}, train={"epochs": 1_000_000, "engine": "eager", "checkpoint_seconds": 1000})
    root = tmp_path / "runs"
    command = [sys.executable, "-m", "pvae", "study", str(file), "--run-dir", str(root), "--device", "cpu"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 90
        while not list(root.glob("tiny/*/metrics.jsonl")):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
        [(_, state, _)] = states(Declared.load(file), root)
        assert state == "held"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert (
        f"0 of 1 cases are finished; those under way go on from their last checkpoints with: pvae study {file}" in err
    )
    assert "Traceback" not in err
    left = Run.load("tiny", root=root)
    assert left.status["state"] == "interrupted"
    assert left.files.manifest["threads"] == 1
    assert left.checkpoint.step > 0
    assert [state for _, state, _ in states(Declared.load(file), root)] == ["stopped"]


# ---------------------------------------------------------------------- what is shown


def test_a_dry_run_lists_the_cases_and_makes_nothing(tmp_path, started):
    file = write(tmp_path, {"seeds": [0, 1], "zip": PRIORS})
    out, _ = command(file, "--dry-run")
    assert out.splitlines() == [f"to do     {case}  seed {seed}  fit" for case in "NM" for seed in (0, 1)]
    out, _ = command(file, "--dry-run", "--json")
    assert json.loads(out)[3] == {"case": "M", "seed": 1, "stage": "fit", "state": "to do", "run": None}
    assert not (tmp_path / "runs").exists()
    assert not started


def test_hostile_labels_are_harmless_everywhere(tmp_path, started, capsys):
    """FAULTS 37, 38 and 39: in the terminal, in CSV, in JSON, as folders."""
    file = write(tmp_path, {"zip": {"train.epochs": [1, 2, 3], "label": HOSTILE}})
    table = tmp_path / "table"
    out, err = command(file, "--out", str(table))
    assert "\x1b" not in out + err
    assert "[red]" in out
    assert "<script>" in err
    for name in ("runs.csv", "summary.csv"):
        text = (table / name).read_text()
        assert "\n'=cmd|" in text
        assert "\n=cmd" not in text
    page = (table / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert {path.parent.parent for path in (tmp_path / "runs").glob("*/*/manifest.json")} == {
        path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")
    }
    task = Task(Declared.load(file).cases[:1], state="failed", error="\x1b[31m[red]<script>")
    capsys.readouterr()
    board = Board("[red]\x1b")
    for _ in range(2):
        board.update([task])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "[red]<script>" in shown
    assert len(shown.splitlines()) == 1
    assert list(Shelf(tmp_path / "runs").known) == []


def test_tables_of_a_study_without_finished_runs():
    empty = frame([])
    assert empty.empty
    assert csv(empty).startswith("case,seed,stage,elbo,elbo_error,")
