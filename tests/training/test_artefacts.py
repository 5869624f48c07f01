"""Compiled steps that are kept between fits: the choice of the engine, the folder, its damage."""

import os
from pathlib import Path

import pytest
import torch

import pvae
from pvae.data.rows.cache import cache_folder
from pvae.experiment.experiment import Experiment
from pvae.nn.precision import resolved
from pvae.objectives.base import Loss
from pvae.training import artefacts, step
from pvae.training.step import choose_engine, compile_forward
from tests.runs_shared import fit, tiny


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of compiled steps for one test."""
    monkeypatch.setattr(artefacts, "shelf", lambda: tmp_path / "compiled")
    return tmp_path / "compiled"


def key(experiment: Experiment, batch: int = 100) -> str:
    pair = experiment.build((1, 8, 8))
    precision = resolved(experiment.train.precision, torch.device("cpu"))
    return artefacts.entry_of(pair, experiment.objective, precision, (batch, 1, 8, 8)).name


def leave(entry: Path, content: str = "code") -> None:
    """Do as torch: write a file into the folder that the environment names."""
    with artefacts.kept(entry):
        place = Path(os.environ[artefacts.TORCHS_OWN])
        assert place == entry
        assert place.stat().st_mode & 0o077 == 0
        (place / "ab").mkdir()
        (place / "ab" / "step.so").write_text(content)


def test_a_middling_fit_is_compiled_where_its_code_is_kept() -> None:
    cpu = torch.device("cpu")
    few, middling, many = 5_000, 25_000, 60_000
    assert [choose_engine(n, 10_000, 100, cpu) for n in (few, middling, many)] == ["eager", "eager", "compiled"]
    assert [choose_engine(n, 10_000, 100, cpu, True) for n in (few, middling)] == ["eager", "compiled"]


def test_a_second_fit_of_a_shape_starts_compiled(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code itself is no matter here: `compile_forward` gives the eager program."""
    monkeypatch.setitem(step.COMPILE_SECONDS, True, 0.0)
    monkeypatch.setattr(step, "compile_forward", lambda loss, x: loss)
    first = fit(tiny(epochs=1, engine="auto"), tmp_path)
    rows = (first.plan.train.batch_size, *first.data.train.rows.shape[1:])
    leave(artefacts.entry_of(first.pair.train(), first.plan.objective, "float32", rows))
    second, other = (
        fit(tiny(epochs=1, engine="auto"), tmp_path),
        fit(tiny(epochs=1, engine="auto", batch_size=50), tmp_path),
    )
    assert [run.files.manifest["engine"] for run in (first, second, other)] == ["eager", "compiled", "eager"]


def test_the_name_follows_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tiny()
    name = key(declared)
    assert name == key(declared.with_overrides("objective.beta=0.5", "train.epochs=7", "seed=3"))
    others = ["decoder.network.hidden=[7]", "latents.z.dim=4", "train.precision=bfloat16", "objective.particles=2"]
    changed = [key(declared.with_overrides(override)) for override in others]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert len({name, key(declared), key(declared, 50), *changed}) == 3 + len(others)


def test_code_is_kept_whole_or_not_at_all(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(artefacts.TORCHS_OWN, raising=False)
    entry = shelf / "entry"
    assert not artefacts.is_kept(entry)
    leave(entry)
    assert artefacts.TORCHS_OWN not in os.environ
    with artefacts.kept(entry):
        assert (entry / "ab" / "step.so").read_text() == "code"
    (entry / "ab" / "step.so").write_text("c")
    leave(entry)  # it makes the folder that it finds gone
    with pytest.raises(ZeroDivisionError), artefacts.kept(entry):
        raise ZeroDivisionError
    assert not entry.exists()


def test_a_folder_that_others_can_write_to_is_not_used(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(artefacts.TORCHS_OWN, "before")
    leave(shelf / "entry")
    shelf.chmod(0o777)
    with artefacts.kept(shelf / "entry"):
        assert os.environ["PYTHONSAFEPATH"] == "1"  # for the compiler's processes
        place = Path(os.environ[artefacts.TORCHS_OWN])
        assert shelf not in place.parents
        assert not list(place.iterdir())
    assert not place.exists()
    assert os.environ[artefacts.TORCHS_OWN] == "before"


@pytest.mark.slow
def test_torch_finds_the_code_that_it_left(shelf: Path) -> None:
    from torch._dynamo.utils import counters

    experiment = tiny()
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        loss = Loss(experiment.objective, experiment.build((1, 8, 8)))
        compile_forward(loss, torch.ones(50, 1, 8, 8))
        found.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    assert found == [(2, 0), (0, 2)]
    assert len([*shelf.glob(f"*/{artefacts.INDEX}")]) == 1


def test_clean_removes_kept_code(tmp_path: Path) -> None:
    entry = cache_folder() / "compiled" / "entry"
    leave(entry)
    assert [removal.path for removal in pvae.clean(tmp_path, cache=True, apply=True).removals] == [entry]
    assert not entry.exists()
