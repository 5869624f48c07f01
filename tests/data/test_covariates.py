"""Covariates: entries of a row beside x, from the label, from values beside x, or from x itself."""

from dataclasses import replace

import pytest
import torch

from pvae.data import Dataset
from pvae.errors import DataError
from pvae.graph.frame import Entry, Frame

ENTRIES = {
    "batch": Entry(codes=3),
    "stage": Entry(codes=4, ordinal=True, source="side"),
    "age": Entry(width=2, source="side"),
    "size": Entry(source="sum"),
    "kind": Entry(codes=2, source="side", latent=True),
}


def beside(n: int = 40) -> Dataset:
    torch.manual_seed(0)
    side = {"stage": torch.arange(n) % 4.0, "age": torch.rand(n, 2), "kind": torch.arange(n) % 2.0}
    side["kind"][::5] = torch.nan
    data = Dataset.of((torch.rand(n, 2, 3), torch.arange(n) % 3))
    return data._each(lambda split: replace(split, side={k: v[split.numbers] for k, v in side.items()}))


def test_a_row_holds_all_entries_behind_its_datum():
    data, frame = beside(), Frame((2, 3), ENTRIES)
    split = data.conditioned(ENTRIES).train
    assert split.rows.shape[1:] == frame.row == (6 + 1 + 1 + 2 + 1 + 1,)
    x, seen = frame.split(split.rows)
    assert torch.equal(x, data.train.rows)
    assert {name: tuple(t.shape[1:]) for name, t in seen.items()} == frame.shapes
    assert frame.shapes == {"batch": (3,), "stage": (3,), "age": (2,), "size": (1,)}  # a latent is no covariate
    assert torch.equal(seen["stage"].sum(1), data.train.side["stage"])  # a thermometer
    torch.testing.assert_close(seen["size"][:, 0], x.flatten(1).sum(1))
    torch.testing.assert_close(frame.columns(split.rows)["kind"], data.train.side["kind"], equal_nan=True)
    frame.require(split.rows)
    number = data.train.y * 4 + data.train.side["stage"]
    assert torch.equal(frame.groups(split.rows), number.long())
    assert frame.continuous == ("age", "size")
    assert Frame((2, 3), {"size": ENTRIES["size"]}).groups(split.rows[:, :7]) is None
    assert torch.equal(data.conditioned(ENTRIES).whole().plain().x, data.whole().x)


@pytest.mark.parametrize(
    ("name", "entry", "match"),
    [
        (
            "stage",
            Entry(codes=3, source="side"),
            r"row 3: expected a value of stage, an integer 0 \.\. 2; got 3",
        ),
        ("kind", Entry(codes=2, source="side"), r"expected a value of kind, an integer 0 \.\. 1; got nan"),
        (
            "mass",
            Entry(source="side"),
            r"expected values of .mass., on which the model is",
        ),
    ],
)
def test_what_an_entry_cannot_have_is_refused(name, entry, match):
    with pytest.raises(DataError, match=match):
        beside().conditioned({name: entry})
