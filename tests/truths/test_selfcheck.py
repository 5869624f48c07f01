"""The self-check: it passes, it fails on a broken estimator, and its results are shown."""

# Patched functions have no types.
# mypy: disable-error-code="arg-type, misc"

import importlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from pvae.analysis.aggregate.aggregated import AggregatedPosterior, Information
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.truths.linear import linear_vae
from pvae.analysis.truths.selfcheck import ESTIMATORS, FigureCheck, SelfCheck, selfcheck, standard
from tests.cli_runner import run_cli
from tests.samples.models import refused
from tests.truths.helpers import DIGITS, failures, wrong_line
from tests.truths.members import binary_input, disjoint, every, product_channel, random_code, symmetric_channel

# ---------------------------------------------------------------------- the self-check as a whole


@pytest.fixture(scope="module")
def whole() -> SelfCheck:
    return selfcheck(truths=every())


def test_selfcheck_passes(whole):
    # At most 1 % of new seeds fail: it says so itself.
    assert whole.ok, failures(whole)
    assert len(whole.checks) > 190
    assert whole.failure_rate < 0.01
    assert {check.estimator for check in whole.checks} == set(ESTIMATORS)
    assert {check.truth for check in whole.checks} == {truth.name for truth in every()}


def test_the_command_checks_every_figure_of_every_estimator(whole):
    # The test models of the command are one of every family; the others know no figure that these do not.
    named = {truth.name for truth in standard()}
    asked = {(c.estimator, c.figure) for c in whole.checks}
    assert {(c.estimator, c.figure) for c in whole.checks if c.truth in named} == asked
    assert len(named) == len(standard())


def test_bias_has_the_spread_of_a_standard_normal(whole):
    # Without the rows that bound, and those of one draw: 4 standard errors of a deviation, for figures that hang
    # together in groups of about five.
    bias = [c.bias for c in whole.checks if c.bias is not None and not c.below and not c.above and not c.estimate.note]
    assert len(bias) > 80
    assert np.std(bias) == pytest.approx(1, abs=4 / math.sqrt(2 * len(bias) / 5))


def test_every_figure_that_is_known_is_checked(whole):
    # Figures of single positions are those of the code where there is but one.
    asked = {(c.truth, c.figure) for c in whole.checks}
    for truth in every():
        figures = {figure for name, figure in asked if name == truth.name}
        unseen = {f for f in truth.exact if f in SURGERY_FIGURES or "." in f} - figures
        single = truth.exact.get("total_correlation") == 0 and "symmetric" in truth.name
        assert unseen == ({"total_correlation", "coordinate_kl"} if single else set()), truth.name


PARTS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl", "total_correlation", "coordinate_kl")
SURGERY_FIGURES = {*PARTS, "label_information"}


def test_same_seed_same_numbers():
    small = [symmetric_channel(3, 0.2), binary_input(1.0, 20)]
    assert selfcheck(truths=small).to_dict() == selfcheck(truths=small).to_dict()
    assert selfcheck(truths=small, seed=1).to_dict() != selfcheck(truths=small).to_dict()


def test_progress_reaches_its_total():
    seen: list[tuple[int, int, str]] = []
    threads = torch.get_num_threads()
    selfcheck(truths=[symmetric_channel(3, 0.2), disjoint(5)], on_progress=lambda *said: seen.append(said))
    assert [said[:2] for said in seen] == [(i, 4) for i in range(1, 5)]  # three estimators and one
    assert seen[-1][2] == "disjoint, n=5"
    assert torch.get_num_threads() == threads


def test_no_truths_are_refused():
    refused("expected at least one truth; got none", selfcheck, truths=[])


# ---------------------------------------------------------------------- it can fail


def shifted_information(monkeypatch: pytest.MonkeyPatch) -> None:
    true = AggregatedPosterior.information

    def wrong(self, value, index, own):
        found = true(self, value, index, own)
        return Information(found.lower + 0.1, found.upper + 0.1, found.leave_one_out)

    monkeypatch.setattr(AggregatedPosterior, "information", wrong)


def shift(module: str, function: str, change):
    """Patch a function of a module with one whose result is changed."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        patched = importlib.import_module(f"pvae.analysis.{module}")
        true = getattr(patched, function)
        monkeypatch.setattr(patched, function, lambda *args, **kwargs: change(true(*args, **kwargs)))

    return patch


FAULTS = {
    "information off by .1": (shifted_information, lambda: binary_input(1.0), "surgery"),
    "densities of coordinates off by .1": (
        shift("decompose.account", "marginal_log_prob", lambda t: t + 0.1),
        lambda: product_channel([np.linspace(-1, 1, 8)] * 2, [0.5, 0.5]),
        "surgery",
    ),
    "sum over codes off by .001": (
        shift("decompose.account", "joint_codes", lambda j: j and replace(j, information=j.information + 1e-3)),
        lambda: random_code(5, 3, 4),
        "surgery",
    ),
    "errors of surgery ten times too small": (
        shift("decompose.account", "over_draws", lambda e: replace(e, standard_error=e.standard_error / 10)),
        lambda: linear_vae(DIGITS[:200], 2),
        "surgery",
    ),
    "evidence off by .1": (shift("bounds.evidence", "log_weights", lambda w: w + 0.1), wrong_line, "evidence"),
    "evidence of the prior off by .1": (
        shift("bounds.evidence", "_likelihood", lambda w: w + 0.1),
        wrong_line,
        "prior_evidence",
    ),
    "annealing off by .1": (shift("bounds.ais", "log_mean", lambda w: w + 0.1), wrong_line, "ais"),
    "an upper bound too low by .2": (shift("bounds.ais", "log_mean", lambda w: w + 0.2), wrong_line, "bracket"),
    "evidence of the gap off by .1": (
        shift("bounds.gap", "_measure", lambda found: {**found, "log_p": found["log_p"] + 0.1}),
        wrong_line,
        "gap",
    ),
}


@pytest.mark.parametrize(("patch", "make", "estimator"), FAULTS.values(), ids=list(FAULTS))
def test_selfcheck_finds_a_broken_estimator(patch, make, estimator, monkeypatch):
    truth = replace(make(), estimators=(estimator,))
    assert selfcheck(truths=[truth]).ok
    patch(monkeypatch)
    found = selfcheck(truths=[truth])
    assert not found.ok
    assert {check.estimator for check in found.failed} == {estimator}
    assert f"figures of {estimator} disagree with their exact values: do not trust" in found.summary()


def made(value: float, error: float, *, exact: float = 1.0, **slack: float) -> FigureCheck:
    return FigureCheck("a truth", "surgery", "kl", exact, Estimate(value, error), **slack)


@pytest.mark.parametrize(
    ("check", "verdict", "bias"),
    [
        (made(1.039, 0.01), "ok", 3.9),
        (made(1.041, 0.01), "too high", 4.1),
        (made(0.959, 0.01), "too low", -4.1),
        (made(0.5, 0.01, below=0.5), "ok", -50),
        (made(0.4, 0.01, below=0.5), "too low", -60),
        (made(1.041, 0.01, below=0.5), "too high", 4.1),
        (made(9.0, 0.01, above=math.inf), "ok", 800),
        (made(0.9, 0.01, above=math.inf), "too low", -10),
        (made(1 + 5e-7, 0.0), "ok", None),
        (made(1 + 2e-6, 0.0), "too high", None),
        (made(1000 + 5e-4, 0.0, exact=1000.0), "ok", None),
        (made(math.nan, 0.01), "not finite", None),
        (made(-math.inf, 0.01), "not finite", None),
        (made(1.0, math.nan), "not finite", None),
        (made(1.0, math.inf), "not finite", None),
    ],
)
def test_verdicts(check, verdict, bias):
    assert check.verdict == verdict
    assert check.ok == (verdict == "ok")
    told = check.to_dict()
    json.dumps(told, allow_nan=False)
    if bias is not None:
        assert told["bias"] == pytest.approx(bias)
    assert check.cells()[-1] == verdict


# ---------------------------------------------------------------------- how it is shown


def some(*checks: FigureCheck) -> SelfCheck:
    return SelfCheck("cpu", 7, checks)


def test_every_rendering_tells_the_figures():
    found = some(made(1.02, 0.01), made(1.1, 0.01), made(1.0, 0.0))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    for text in (console.export_text(), str(found), repr(found)):
        for part in ("a truth", "surgery.kl", "1.0200", "+2.00", "+10.00", "0e+00 nats", "too high", "2 of 3 figures"):
            assert part in text
        assert "by chance alone one run in 7937 fails" in text
    assert not found.ok
    assert found.to_dict()["failed"] == 1
    assert found.failure_rate == pytest.approx(2 * 6.3e-5)
    assert some(made(1.0, 0.0)).summary() == "all 1 figures agree with their exact values"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    truths = (symmetric_channel(2, 0.1), binary_input(1.0))
    monkeypatch.setattr("pvae.analysis.truths.selfcheck.standard", lambda: truths)


@pytest.mark.usefixtures("few")
def test_command():
    out, err = run_cli("selfcheck", "--device", "cpu", code=0)
    assert "2-ary symmetric, 0.1" in out
    assert "surgery.mutual_information" in out
    assert "figures ok" in out
    assert "selfcheck 100/100" in err
    out, err = run_cli("selfcheck", "--device", "cpu", "--seed", "3", "--json", code=0)
    told = json.loads(out)
    assert (told["ok"], told["seed"], told["device"], err) == (True, 3, "cpu", "")
    assert told["checks"][0].keys() >= {"truth", "estimator", "figure", "exact", "estimate_value", "bias", "verdict"}


@pytest.mark.usefixtures("few")
def test_command_fails_with_a_sentence(monkeypatch):
    shifted_information(monkeypatch)
    out, err = run_cli("selfcheck", "--device", "cpu", code=1)
    assert "too high" in out
    assert "of surgery disagree with their exact values: do not trust these on this device" in err
    out, err = run_cli("selfcheck", "--device", "cpu", "--json", code=1)
    assert json.loads(out)["ok"] is False
    assert "disagree" in err
    _, err = run_cli("selfcheck", "--device", "tpu", code=2)
    assert "expected auto, cpu or cuda; got 'tpu'" in err


@pytest.mark.cuda
def test_selfcheck_on_a_gpu():
    found = selfcheck("cuda", truths=every())
    assert found.ok, failures(found)
