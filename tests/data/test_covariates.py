"""Covariates: entries of a row beside x, from the label, from values beside x, or from x itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import torch

import pvae
from pvae import Experiment, Run
from pvae.cli.making import given_of
from pvae.data import Dataset, load
from pvae.data.new import rows_of_new
from pvae.data.rows.columns import ContinuousColumn
from pvae.data.sources.python import TensorSource
from pvae.errors import DataError, DeclarationError
from pvae.graph.frame import Entry, Frame
from tests.data.writers import h5ad, npz

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
    assert frame.columns(split.rows)["kind"].isnan().all()  # known to a fit alone
    found = data.train.values("kind", ENTRIES["kind"])[:, 0]
    torch.testing.assert_close(found, data.train.side["kind"], equal_nan=True)
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


# Fits


N = 60
COLUMNS = {name: {"type": "continuous"} for name in "ab"}
COVARIATES: dict[str, Any] = {
    "batch": {"levels": ["one", "two", "three"], "of": "plate"},
    "age": {"dim": 1, "of": "years"},
    "stage": {"codes": 4, "ordinal": True, "of": "stage"},
}


def table(n: int = N, seed: int = 0) -> pandas.DataFrame:
    rng = np.random.default_rng(seed)
    plate = rng.choice(["one", "two", "three"], n)
    x = {"a": rng.normal(size=n) + 2.0 * (plate == "two"), "b": rng.normal(size=n)}
    beside = {"plate": plate, "years": rng.normal(50, 10, n), "stage": rng.integers(0, 4, n)}
    return pandas.DataFrame({**x, **beside, "kind": rng.choice(["u", "v"], n)})


def declared(data: dict[str, Any], **changes: Any) -> Any:
    given = ["z", "batch", "age", "stage"]
    network = {"kind": "mlp", "hidden": [8]}
    return Experiment.from_dict(
        {
            "name": "covariates",
            "data": data,
            "covariates": COVARIATES,
            "latents": {"z": {"dim": 2, "posterior": {"kind": "normal", "given": ["x", "batch", "age"]}}},
            "encoder": {"kind": "per_latent", "network": network},
            "decoder": {"given": given, "network": network, "likelihood": {"kind": "columns"}},
            "train": {"epochs": 2, "batch_size": 16},
            **changes,
        }
    )


def csv(path: Path) -> dict[str, Any]:
    table().to_csv(path / "t.csv", index=False)
    return {"source": "csv", "path": str(path / "t.csv"), "columns": COLUMNS, "label": "kind"}


def test_a_table_with_covariates_is_fitted_encoded_and_sampled(tmp_path):
    run = pvae.fit(declared(csv(tmp_path)), run_dir=tmp_path / "runs", progress=False)
    run = Run.load(run.path)
    assert run.data.label_names == ("u", "v")  # the label stays free
    frame, whole = run.pair.frame, run.data.whole()
    columns, raw = frame.columns(whole.x), table()
    assert [COVARIATES["batch"]["levels"][int(i)] for i in columns["batch"]] == raw["plate"].tolist()
    train = raw["years"][run.data.train.numbers]
    want = (raw["years"] - train.mean()) / train.std(ddof=0)
    np.testing.assert_allclose(columns["age"][:, 0], want, atol=1e-5)

    new = table(7, seed=1).drop(columns="kind")
    rows = run.rows(new)
    np.testing.assert_allclose(
        frame.columns(rows.x)["age"][:, 0], (new["years"] - train.mean()) / train.std(ddof=0), atol=1e-5
    )
    assert run.encode(new, mean=True).latents["z"].value.shape == (7, 2)
    found = run.sample(3, given={"batch": "two", "age": 40, "stage": 3})
    assert found.covariates["batch"].tolist() == [1, 1, 1]
    torch.testing.assert_close(
        found.covariates["age"][0, 0], torch.tensor((40 - train.mean()) / train.std(ddof=0)).float()
    )
    drawn = run.sample(50, given={"batch": "three"}).covariates  # the others from the training rows
    assert set(drawn["stage"].tolist()) == {0, 1, 2, 3}
    one, other = (run.reconstruct(new, given={"batch": word}).x for word in ("one", "two"))
    assert not torch.allclose(one, other)
    same = run.reconstruct(new)
    own = torch.tensor((new["plate"] == "two").tolist())
    torch.testing.assert_close(same.x[own], other[own])

    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"plate": "four"}, r"row 2, column 'batch': expected one of 'one', 'two', 'three'; got 'four'"),
        ({"years": np.nan}, r"row 2, column 'age': expected a value; got none. Leave the row out, or fill it in"),
        ({"stage": 9}, r"row 2: expected a value of stage, an integer 0 \.\. 3; got 9"),
    ]
    for change, match in wrongs:
        wrong = new.copy()
        for name, value in change.items():
            wrong.loc[2, name] = value
        with pytest.raises(DataError, match=match):
            run.rows(wrong)
    with pytest.raises(DataError, match=r"expected .*'plate'"):
        run.rows(new.drop(columns="plate"))
    with pytest.raises(DeclarationError, match=r"given.batch: .*expected one of 'one', 'two', 'three'; got 'ten'"):
        run.sample(2, given={"batch": "ten"})
    ages = run.sample(2, given={"age": [[40], [50]]}).covariates["age"]  # (n, d) as (n,)
    assert torch.equal(ages, run.sample(2, given={"age": [40, 50]}).covariates["age"])
    odd: list[tuple[Any, str]] = [
        ({"age": {"a": 1}}, "given.age: expected a value, or 2 of them; got {'a': 1}"),
        ({"age": [[40, 1], [50, 2]]}, r"given.age: .* one for each row; got an array of shape \[1, 2, 2\]"),
        ({"age": [40, 50, 60]}, r"given.age: expected 1 numbers, or 2 of them; got \[40, 50, 60\]"),
        ([("age", 40)], r"given: expected values by covariate, as {'y': 3}; got \[\('age', 40\)\]"),
    ]
    for given, match in odd:
        with pytest.raises(DeclarationError, match=match):
            run.sample(2, given=given)
    with pytest.raises(DeclarationError, match="--given: expected each covariate once; got age=1, age=2"):
        given_of(["age=1", "age=2"])


def test_new_values_beside_x_have_the_width_of_the_fit():
    source = TensorSource(side={"age": ContinuousColumn()})
    x, age = torch.rand(20, 2), torch.rand(20)
    for fitted, same in ((age, age[:, None]), (age[:, None], age)):
        known = Dataset.of({"x": x, "age": fitted}, source).transforms
        assert known is not None
        found = [known.split(rows_of_new({"x": x, "age": v}, source, known)).side for v in (fitted, same)]
        assert torch.equal(*(next(iter(side.values())) for side in found))
        with pytest.raises(DataError, match="expected 1 values of 'age' a row; got 2"):
            known.split(rows_of_new({"x": x, "age": torch.rand(20, 2)}, source, known))
        with pytest.raises(DataError, match=r"expected 20 values of 'age', one for each row; got .*\[20, 1, 1\]"):
            rows_of_new({"x": x, "age": age[:, None, None]}, source, known)


def test_values_beside_x_come_from_every_kind_of_source(tmp_path):
    frame = table()
    x = np.ascontiguousarray(frame[["a", "b"]], np.float32)
    side = {
        "plate": frame["plate"].to_numpy(str),
        "years": frame["years"].to_numpy(),
        "stage": frame["stage"].to_numpy(),
    }
    frame.to_parquet(tmp_path / "x.parquet")
    obs = frame[["plate", "years", "stage"]].astype({"plate": "category"})
    h5ad(tmp_path / "x.h5ad", x, obs)
    adata = anndata.AnnData(x, obs=obs.set_axis([f"c{i}" for i in range(N)]))
    gauss = {"decoder": {"given": ["z", "batch", "age", "stage"], "likelihood": {"kind": "normal"}}}
    arrays = npz(tmp_path, np.savez, x=x, **side)
    plain = [{"source": "npz", "path": arrays}, {"source": "h5ad", "path": str(tmp_path / "x.h5ad")}]
    datasets = [load(declared(data, **gauss).source) for data in plain]
    datasets.append(load(declared({**plain[0], "stream": True}, **gauss).source))
    of = declared({"source": "tensor"}, **gauss).source
    datasets += [Dataset.of(data, of) for data in (adata, {"x": x, **side})]
    datasets.append(Dataset.of(torch.from_numpy(x), of, covariates={k: v.tolist() for k, v in side.items()}))
    parquet = {"source": "parquet", "path": str(tmp_path / "x.parquet"), "columns": COLUMNS}
    datasets.append(load(declared(parquet).source))
    datasets.append(Dataset.of(frame, declared({"source": "frame", "columns": COLUMNS}).source))
    other = {"covariates": {**COVARIATES, "batch": {"levels": ["two", "one", "three"], "of": "plate"}}}
    with pytest.raises(DataError, match=r"batch: expected data with the levels \('two', 'one', 'three'\); got"):
        declared(plain[0], **gauss, **other).conditioned(datasets[0])
    first = datasets[0].whole().side
    assert first.keys() == {"batch", "age", "stage"}
    for data in datasets[1:]:
        for name, values in data.whole().side.items():
            torch.testing.assert_close(values, first[name], msg=f"{data.source}: {name}")
    with pytest.raises(DataError, match=r"expected 60 values of 'years', one for each row; got .* \[59\]"):
        Dataset.of({"x": x, **side, "years": side["years"][1:]}, of)
    with pytest.raises(DataError, match=r"expected values of 'years' beside x"):
        Dataset.of({"x": x, "plate": side["plate"], "stage": side["stage"]}, of)
    with pytest.raises(DataError, match=r"expected a source with values of batch, age, stage beside x"):
        load(declared({"source": "digits"}, **gauss).source)


def test_a_fit_with_covariates_resumes_bit_for_bit(tmp_path):
    experiment, runs = declared(csv(tmp_path)), tmp_path / "runs"
    whole = pvae.fit(experiment, "train.epochs=3", "train.shards=2", run_dir=runs, progress=False)
    begun = pvae.fit(experiment, "train.shards=2", run_dir=runs, progress=False)
    again = pvae.resume(Run.load(begun.path), "train.epochs=3", allow_changes=True, progress=False)
    tensors, others = again.checkpoint.tensors, whole.checkpoint.tensors
    for part, found in tensors.items():
        assert all(torch.equal(t, others[part][name]) for name, t in found.items()), part


def test_numbers_that_are_not_standardised_are_given_as_they_are():
    source = TensorSource(side={"size": ContinuousColumn(transform="none")})
    data = Dataset.of({"x": torch.rand(20, 2), "size": torch.rand(20)}, source)
    assert data.transforms is not None
    assert data.transforms.given("size", 2.5).tolist() == [2.5]
