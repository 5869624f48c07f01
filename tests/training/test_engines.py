"""Engines of a step give the same numbers; alternation; the choice of engine and device."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvae.errors import DeclarationError, DeviceError
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss
from pvae.training.launch import pick_device
from pvae.training.step import Step, choose_engine, compile_forward, require_equal
from tests.runs_shared import fit, tiny
from tests.training.kinds import KINDS, SMALL
from tests.training.pairs import assert_equal_steps, stepper


def test_alternate_moves_one_side_at_a_time() -> None:
    step = stepper(tiny(alternate=2), "eager")
    pair = step.loss.pair
    x = (torch.rand(96, 1, 8, 8) > 0.5).float()
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    step(x, [p for name, p in pair.named_parameters() if name.startswith("model.")])
    moved = {name for name, p in pair.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if name.startswith("guide.")}


def test_alternation_is_so_many_guide_steps_and_then_one_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    run = Step.run

    def watched(self: Step, x: Tensor, frozen: Sequence[torch.nn.Parameter] = ()) -> Tensor:
        named = list(self.loss.pair.named_parameters())
        before = [p.detach().clone() for _, p in named]
        out = run(self, x, frozen)
        moved = {n.split(".")[0] for (n, p), old in zip(named, before, strict=True) if not torch.equal(p, old)}
        order.append("".join(sorted(side[0] for side in moved)))
        return out

    monkeypatch.setattr(Step, "run", watched)
    experiment = tiny(alternate=2, epochs=1, batch_size=150, engine="eager", schedule={"kind": "constant"})
    fit(experiment, tmp_path)
    assert order[:6] == ["g", "g", "m", "g", "g", "m"]


def test_gpu_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 40."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="Use --device cpu"):
        pick_device("cuda")
    with pytest.raises(DeclarationError, match="expected auto, cpu or cuda"):
        pick_device("gpu")


def test_the_compiled_step_equals_the_eager_one() -> None:
    assert_equal_steps(*(stepper(tiny(), engine) for engine in ("eager", "compiled")), tolerance=1e-5, weights=2e-5)


SLOW_TO_COMPILE = ["pseudo-inputs", "iwae on two levels", "grey values", "mixture prior", "full rank", "real nvp"]


@pytest.mark.parametrize(
    "case",
    ["iwae of scored bits", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_TO_COMPILE)],
)
def test_other_kinds_compile_to_the_same_numbers(case: str) -> None:
    """`compile_forward` itself compares value and gradient with the eager program's."""
    name, overrides = KINDS[case]
    experiment = Experiment.load(name, [*SMALL, *overrides])
    compile_forward(Loss(experiment.objective, experiment.build((1, 8, 8))), torch.ones(50, 1, 8, 8))


def test_a_fast_step_with_other_numbers_is_refused() -> None:
    with pytest.raises(RuntimeError, match="gradient differs"):
        require_equal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), "gradient")
    with pytest.raises(RuntimeError, match="value differs"):
        require_equal(torch.tensor([torch.nan]), torch.tensor([1.0]), "value")


def test_engine_is_chosen_by_the_work_to_come() -> None:
    cpu = torch.device("cpu")
    assert choose_engine(200, 10_000, 100, cpu) == "eager"
    assert choose_engine(250_000, 700_000, 100, cpu) == "compiled"
    assert choose_engine(10, 10, 10, torch.device("cuda")) == "captured"


def test_uncompilable_pair_goes_on_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("pvae.training.step.compile_forward", broken)
    run = fit(tiny(engine="compiled", epochs=1), tmp_path)
    assert run.files.manifest["engine"] == "eager"
    assert any("no compiler here" in event["message"] for event in run.files.events())
