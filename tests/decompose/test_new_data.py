"""Sentences on what a better prior wins on new data: an interval, or plainly none; in tables, JSON and a gain."""

import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from pvae.analysis.decompose.result import Surgery, side_by_side
from pvae.analysis.decompose.surgery import Gain, gain, surgery
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.population.interval import Population, SubsetInformation
from tests.decompose.pairs import channel, correlated


def lower(value: float, error: float = 0.03) -> Estimate:
    return Estimate(value, error, "lower_bound")


def upper(value: float, error: float = 0.1) -> Estimate:
    return Estimate(value, error, "upper_bound")


SATURATED = Population(
    n=10_000,
    gain=lower(2.04),
    gain_upper=upper(3.9),
    information=lower(12.2, 0.1),
    information_upper=upper(14.06, 0.03),
    prior="kernels on the other rows, widened by 0.2, mixed with a normal",
    seen=0.8,
    largest=0.02,
    sizes=tuple(SubsetInformation(n, lower(value, 0.01), None) for n, value in ((100, 4.6), (1000, 6.86))),
    slope=0.93,
)
KNOWN = Estimate(6.52, 0.04)
WORDING = (
    "On new data a better prior wins at least 2.04 +- 0.03 nats with this encoder (a stated prior does it: kernels on "
    "the other rows, widened by 0.2, mixed with a normal), at most 3.90 +- 0.10 (assuming codes of new rows overlap as "
    "those of these rows do; without it no figure below KL - 2 log n can be given). On these 10000 rows alone a prior "
    "that knows them would win 6.52; most of that is knowing the rows."
)


@pytest.fixture(scope="module")
def plain_surgery() -> Surgery:
    return surgery(channel(lambda x: torch.full_like(x, 0.4)), correlated(0.3, 300), samples=2, population=None)


def shown(table: object, width: int = 80) -> list[str]:
    """Lines of a table as a terminal of this width shows them."""
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as lines:
        console.print(table)
    return lines.get().splitlines()


def test_the_interval_in_words():
    assert SATURATED.sentence(KNOWN) == WORDING
    assert SATURATED.interval == "1.98 to 4.10"
    crossed = replace(SATURATED, gain=lower(3.97, 0.2), gain_upper=upper(3.95, 0.2))
    assert crossed.interval == "3.57 to 4.35"
    assert replace(SATURATED, gain=lower(0.01), gain_upper=None).interval == "at least 0"
    (size,) = SATURATED.remarks
    assert size.startswith(
        "I_n still grows by 0.93 nats where log n grows by 1: 10000 rows cannot tell the information of new data"
    )
    assert "2 log n = 18.4 nats" in size


@pytest.mark.parametrize(
    ("changes", "known", "said"),
    [
        ({"gain_upper": None}, KNOWN, "; no upper bound below the KL is known. On these 10000 rows alone"),
        (
            {"gain": lower(-0.04)},
            KNOWN,
            "at least 0 nats with this encoder (the stated prior does not win, -0.04 +- 0.03:",
        ),
        ({"gain": lower(5.0), "gain_upper": upper(5.5)}, KNOWN, "win 6.52; part of that is knowing the rows."),
        ({"gain": lower(6.3), "gain_upper": upper(6.4)}, KNOWN, "a prior that knows them would win 6.52."),
        ({"gain": lower(5.0), "gain_upper": upper(5.5)}, Estimate(6.52, 0.6), "that knows them would win 6.52."),
        ({}, None, "no figure below KL - 2 log n can be given)."),
    ],
    ids=["no upper end", "a prior that loses", "part", "unsaturated", "a marginal KL known poorly", "no marginal KL"],
)
def test_every_case_has_its_sentence(changes, known, said):
    found = replace(SATURATED, **changes).sentence(known)
    assert said in found if known else found.endswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"slope": 0.02, "midpoint": Estimate(1.51, 0.02)},
            "10000 rows tell the information of new data, I_pi: 1.51 +- 0.02 nats",
        ),
        ({"seen": 0.12}, "Only 12 % of the pairs bound come from pairs of rows"),
        ({"largest": 0.7}, "One row alone gives 70 % of the pairs bound"),
        ({"notes": ("told",)}, "told"),
    ],
    ids=["a midpoint", "the guard", "one row", "a note"],
)
def test_remarks_say_what_limits_the_interval(changes, said):
    assert any(said in remark for remark in replace(SATURATED, **changes).remarks)
    assert not any(said in remark for remark in SATURATED.remarks)


def test_interval_in_words_table_and_json(plain_surgery):
    found = replace(plain_surgery, population=SATURATED)
    assert found.headline() == SATURATED.sentence(plain_surgery.marginal_kl)
    assert found.remarks[:2] == (found.headline(), *SATURATED.remarks)
    terms = [name for name, _, _ in found.known()]
    assert terms.index("new_gain") == terms.index("marginal_kl") + 1
    assert {"new_gain_upper", "new_information", "new_information_upper"} < set(terms)
    assert not [name for name, _, _ in plain_surgery.known() if name.startswith("new_")]
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["population"]["gain_upper"] == upper(3.9).to_dict()
    assert [size["n"] for size in written["population"]["sizes"]] == [100, 1000]
    assert written["figures"]["new_gain"] == written["population"]["gain"]
    assert written["seen"] is False
    assert json.loads(json.dumps(plain_surgery.to_dict()))["population"] is None
    assert replace(found, marginal_kl=None).headline() == SATURATED.sentence()


def test_without_an_interval_nothing_is_said_of_new_data(plain_surgery):
    told = "no figure on new data: too few rows"
    for changes, said in (
        ({}, "No figure on new data was computed."),
        ({"notes": (told, "another")}, "No figure on new data: too few rows."),
        ({"seen": True}, "The model was fitted on these rows"),
    ):
        found = replace(plain_surgery, **{"population": None, "seen": False, "notes": (), **changes})
        assert found.headline().startswith(f"The marginal KL on these 300 rows is {found.marginal_kl.value:.2f} nats")
        assert said in found.headline()
        assert not re.search(r"the most|at most|better prior", found.headline())
        assert found.to_dict()["seen"] is changes.get("seen", False)
        assert told not in found.remarks


def test_rows_that_were_fitted_on_are_told(plain_surgery):
    pair, x = channel(lambda x: torch.full_like(x, 0.4)), correlated(0.3, 300)
    assert surgery(pair, x, seen=True).seen
    assert surgery(pair, x, seen=True).population is None
    assert not plain_surgery.seen


def test_tables_fit_80_columns(plain_surgery):
    held = replace(plain_surgery, population=SATURATED)
    for table in (held.table(), side_by_side({"train": replace(plain_surgery, population=None), "test": held})):
        lines = shown(table)
        assert max(len(line) for line in lines) <= 80
        text = " ".join(line.strip() for line in lines)
        assert "new_information_upper" in text
        assert "On new data a better prior wins at least 2.04" in text
        assert "cannot tell the information of new data" in text


def test_a_gain_stands_beside_the_interval(plain_surgery):
    gained, held = Estimate(0.91, 0.02), replace(plain_surgery, population=SATURATED)
    found = Gain(held, plain_surgery, gained)
    assert found.sentence() == (
        "gained 0.910 +- 0.020 nats per datum; the interval on new data before the refit was 1.98 to 4.10"
    )
    assert json.loads(json.dumps(found.to_dict()))["interval"]["gain"]["value"] == 2.04
    none = replace(plain_surgery, population=None)
    assert "there is no interval for new data" in Gain(none, none, gained).sentence()
    assert "this is no gain on new data" in Gain(replace(none, seen=True), none, gained).sentence()
    assert not any("%" in Gain(before, none, gained).sentence() for before in (held, none))  # no share of a promise


def test_gain_on_rows_that_were_fitted_on():
    pair, x = channel(lambda x: torch.full_like(x, 0.4)), correlated(0.3, 100)
    found = gain(pair, pair, x, seen=True)
    assert found.before.seen
    assert found.interval is None
