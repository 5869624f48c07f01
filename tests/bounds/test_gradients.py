"""Figures of estimators of the gradient: against moments by torch, and against sums over codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.analysis.bounds.gradients import gradients
from pvae.analysis.figures.estimate import text
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.objectives.elbo import TraceELBO
from pvae.objectives.importance import IWAE
from pvae.util import seeds
from tests.cli_runner import run_cli
from tests.runs_shared import fit, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pvae.Run:
    return fit(tiny(epochs=1, batch_size=500), tmp_path_factory.mktemp("runs"))


def test_every_estimator_of_the_elbo_is_measured(run: pvae.Run) -> None:
    """Unbiased ones are not found biased; the same seed gives the same figures."""
    seen: list[int] = []
    found = gradients(run, rows=20, draws=20, on_progress=lambda done, total: seen.append(total - done))
    frame = found.frame.set_index(["group", "estimator"])
    assert {*frame.index.unique(0)} == {"encoder", "decoder", "posterior of z"}
    assert {*frame.index.unique(1)} == {"reparameterised", "stick_the_landing", "closed_form"}
    assert not frame["biased"].any()
    assert seen[-1] == 0
    assert len(found.verdicts) == 3
    again = gradients(run, rows=20, draws=20).frame
    for column in ("bias", "variance", "signal_to_noise"):
        assert again[column].equals(found.frame[column])
    with pytest.raises(DataError, match="draws"):
        gradients(run, draws=3)


def test_variance_and_signal_are_those_of_many_gradients(run: pvae.Run) -> None:
    """The trace of the covariance, and the squared mean less its share, by torch, from other draws."""
    found = gradients(run, rows=10, draws=40).frame.set_index(["estimator", "group"])
    x = run.data.test.rows[seeds.subset(len(run.data.test), 10, 0)]
    weights = [p for name, p in run.pair.named_parameters() if ".posteriors." in name]
    for kind in ("reparameterised", "stick_the_landing"):
        objective = TraceELBO(gradient=kind)

        def one(seed: int, objective: TraceELBO = objective) -> Tensor:
            torch.manual_seed(seed)
            loss, _ = objective.evaluate(run.pair, x, None, torch.ones(()))
            return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)]).double()

        drawn = torch.stack([one(seed) for seed in range(40)])
        row: Any = found.loc[(kind, "posterior of z")]
        variance = float(drawn.var(0).sum())
        power = float(drawn.mean(0).square().sum()) - variance / 40
        assert row["variance"] == pytest.approx(variance, rel=0.4)
        assert row["signal_to_noise"] == pytest.approx((power / variance) ** 0.5, rel=0.4)


@pytest.mark.parametrize(("posterior", "biased"), [("bernoulli", False), ("relaxed_onehot", True)])
def test_gradients_of_codes_are_held_against_their_sum(tmp_path: Path, posterior: str, biased: bool) -> None:
    """A score function has no bias; a relaxation at a high temperature has one."""
    latent: dict[str, object] = (
        {"bits": 3, "prior": "bernoulli", "posterior": {"kind": "bernoulli", "estimator": "score"}}
        if posterior == "bernoulli"
        else {"codes": 4, "prior": "categorical", "posterior": posterior, "temperature": 3.0}
    )
    table = tiny(epochs=1, batch_size=500).model_dump(mode="json", exclude_defaults=True)
    run = fit(Experiment.from_dict({**table, "latents": {"c": latent}}), tmp_path)
    found = gradients(run, rows=10, draws=40)
    assert found.exact
    rows = found.frame[found.frame["estimator"] == "as declared"].set_index("group")
    assert rows["biased"]["decoder"] == biased


SCORED = {"kind": "categorical", "estimator": "score"}
CODED: dict[str, tuple[dict[str, object], str, set[str]]] = {
    "beside a vector": ({"c": {"codes": 3, "posterior": SCORED}, "z": {"dim": 2}}, "trace_elbo", {"stick_the_landing"}),
    "summed beside a vector": ({"c": {"codes": 3, "posterior": "categorical"}, "z": {"dim": 2}}, "trace_elbo", set()),
    "importance weights": ({"c": {"codes": 3, "posterior": SCORED}}, "iwae", set()),
    "nearest": ({"c": {"codes": 8, "grid": [2], "embedding": 3, "posterior": "nearest_code"}}, "trace_elbo", set()),
}


@pytest.mark.parametrize("case", CODED)
def test_estimators_of_codes_are_held_against_their_own_bound(tmp_path: Path, case: str) -> None:
    """Those of real latents are for these alone; a reference that is itself drawn has an error."""
    latents, kind, more = CODED[case]
    table = tiny(epochs=1, batch_size=500).model_dump(mode="json", exclude_defaults=True)
    table["decoder"] |= {"given": [*latents]}
    found = gradients(
        fit(Experiment.from_dict({**table, "latents": latents, "objective": kind}), tmp_path), rows=20, draws=20
    )
    assert {*found.frame["estimator"]} == {"as declared", *more, *({"closed_form"} if kind == "trace_elbo" else ())}
    assert found.exact == (case == "beside a vector")
    assert not found.frame["biased"].any()


def test_the_noise_of_the_reference_is_its_own(tmp_path: Path) -> None:
    """An estimator of a fifth of its variance is not biased for the reference's noise; 6 seeds, 2 groups, 3 errors."""
    run = fit(tiny(epochs=1, batch_size=500).model_copy(update={"objective": IWAE(particles=64)}), tmp_path)
    frames = [gradients(run, rows=4, draws=6, seed=seed).frame for seed in range(6)]
    of = [frame[(frame["estimator"] == "doubly_reparameterised") & (frame["group"] != "decoder")] for frame in frames]
    assert sum(int(frame["biased"].sum()) for frame in of) <= 1


def row(estimator: str, variance: float, per_second: float, biased: bool = False) -> dict[str, Any]:
    """Figures of an estimator that a verdict reads; a signal of norm one."""
    noise = variance**0.5
    figures = {"estimator": estimator, "variance": variance, "per_second": per_second, "bias": 0.1, "biased": biased}
    return {**figures, "signal_to_noise": 1 / noise if noise else float("inf")}


VERDICTS = {
    "choose two: 2 times": [row("one", 1.0, 3.0), row("two", 1.0, 6.0)],
    "choose one; none is better by a quarter": [row("one", 1.0, 5.0), row("two", 1.0, 6.0)],
    "choose one.": [row("one", 1.0, float("nan")), row("two", 1.0, float("nan"))],
    "choose two, whose gradient is the same": [row("one", 1.0, 5.0), row("two", 0.0, float("inf"))],
    "choose two": [row("one", 1.0, 9.0, biased=True), row("two", 1.0, 6.0)],
    "every estimator is biased": [row("one", 1.0, 5.0, biased=True)],
    "nothing to choose": [row("one", 0.0, float("inf")), row("two", 0.0, float("inf"))],
    "nothing to choose, every gradient": [row("one", 1e-13, 1e13), row("two", 2e-13, 1e13)],
}


@pytest.mark.parametrize(("said", "rows"), VERDICTS.items(), ids=list(VERDICTS))
def test_a_verdict_names_another_estimator_only_for_a_gain(said: str, rows: list[dict[str, Any]]) -> None:
    assert f"encoder: {said}" in " ".join(text("gradients.verdict", group="encoder", rows=rows).split())


def test_the_command_prints_a_table_or_json(run: pvae.Run) -> None:
    said, _ = run_cli("gradients", str(run.path), "--draws", "4", "--rows", "5")
    assert "stick the landing" in said
    assert "decoder: choose" in said
    told, _ = run_cli("gradients", str(run.path), "--draws", "4", "--rows", "5", "--json")
    assert {row["estimator"] for row in json.loads(told)["rows"]} > {"closed_form"}
