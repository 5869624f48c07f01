"""Data that stay on the disk: the values of memory, every row once an epoch, bit-exact resume, little memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvae
from pvae.data import Dataset, Npz, TensorSource, streamed
from pvae.data.dataset import _assembled
from pvae.data.rows.files import Joined, SparseRows, read_npy
from pvae.data.rows.rows import Rows, shared_rows, tenths
from pvae.data.streamed import Streamed, WindowOrder
from pvae.errors import DataError
from pvae.training import loop
from pvae.training.trainer import Trainer
from pvae.util import group
from pvae.util.group import Shards
from tests.data.writers import assert_same, refused
from tests.runs_shared import assert_resumes_exactly


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, three in memory: what large data meet, on small ones."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 7 * 4 * 64)
    monkeypatch.setattr(streamed, "WINDOW", 3)


def images(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    state = np.random.RandomState(0)
    return state.randint(0, 256, (n, 1, 8, 8)).astype(np.uint8), state.randint(0, 4, n)


def both(tmp_path: Path, declared: TensorSource, x: Any = None) -> tuple[Dataset, Dataset]:
    """One declaration of the same rows: in memory, and on the disk."""
    x, y = images() if x is None else (x, None)
    np.save(tmp_path / "x.npy", x)
    parts = tenths(len(x), ["validation", "test"], 0)
    largest = 255.0 if x.dtype == np.uint8 else None
    held, kept = (Rows(rows, y, parts, largest) for rows in (x, read_npy(tmp_path / "x.npy", stream=True)))
    return _assembled(declared, held), _assembled(declared, kept)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("scale", "binarize"), [("unit", "none"), ("raw", "none"), ("standardise", "none"), ("unit", "threshold")]
)
def test_streamed_rows_are_those_in_memory(tmp_path: Path, scale: str, binarize: str) -> None:
    held, kept = both(tmp_path, TensorSource.model_validate({"scale": scale, "binarize": binarize}))
    assert held.notes == kept.notes
    assert_same(kept, held)
    for mine, theirs in zip(kept.splits, held.splits, strict=True):
        assert isinstance(mine.rows, Streamed)
        where = torch.randint(len(mine), (50,))
        assert torch.equal(mine.draw(where), theirs.draw(where))
        assert torch.equal(mine.rows[5], theirs.rows[5])
        assert torch.equal(mine.rows[-4:], theirs.rows[-4:])
        assert torch.equal(torch.cat(list(mine.chunks())), theirs.data)


@pytest.mark.usefixtures("narrow")
def test_dynamic_binarisation_draws_the_same_from_the_same_seed(tmp_path: Path) -> None:
    held, kept = both(tmp_path, TensorSource(scale="unit", binarize="dynamic"))
    index = torch.randint(len(held.train), (40,))
    torch.manual_seed(3)
    a = held.train.draw(index)
    torch.manual_seed(3)
    assert torch.equal(kept.train.draw(index), a)


@pytest.mark.usefixtures("narrow")
def test_fixed_draws_stay_and_have_the_mean_of_the_intensities(tmp_path: Path) -> None:
    x = np.full((3000, 4), 64, np.uint8)
    x[:, 1:] = 191
    x[0] = 0
    _, kept = both(tmp_path, TensorSource(scale="unit", binarize="static"), x)
    first = kept.train.x
    assert torch.equal(kept.train.x, first)
    assert torch.equal(kept.train.rows[100:200], first[100:200])
    assert set(first.unique().tolist()) == {0.0, 1.0}
    expected = torch.tensor([64, 191, 191, 191]) / 255
    assert torch.allclose(first.mean(0), expected, atol=4 * 0.5 / len(first) ** 0.5)


def order_of(rows: int, block: int, seed: int, epoch: int) -> WindowOrder:
    return WindowOrder(rows, block, seed, epoch, lambda _blocks: None, 1, Shards(1))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 20, 21, 22, 240, 241])
def test_an_epoch_takes_every_row_once_in_an_order_of_seed_and_epoch(rows: int) -> None:
    order = order_of(rows, 7, 5, 2)
    taken = torch.cat([order[start : start + 9] for start in range(0, rows, 9)])
    assert sorted(taken.tolist()) == list(range(rows))
    again = order_of(rows, 7, 5, 2)
    assert torch.equal(again[rows // 2 : rows], taken[rows // 2 :]), "a resumed epoch goes on in the same order"
    if rows > 7:
        assert not torch.equal(taken, order_of(rows, 7, 5, 3)[0:rows])
        assert not torch.equal(taken, order_of(rows, 7, 6, 2)[0:rows])


@pytest.mark.usefixtures("narrow")
def test_a_batch_comes_from_the_blocks_of_its_window() -> None:
    order = order_of(700, 7, 0, 0)
    for start in range(0, 693, 21):
        assert len(set((order[start : start + 21] // 7).tolist())) == 3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("rows", "batch"), [(700, 21), (240, 50), (20, 9), (5, 100)])
def test_shards_have_blocks_of_their_own(rows: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once; the order is that of the shards, whatever the process; a window's blocks are dealt to them."""
    orders = []
    for process in (0, 1):
        monkeypatch.setattr(group, "rank", lambda process=process: process)
        monkeypatch.setattr(group, "size", lambda: 2)
        expected: list[int] = []
        order = WindowOrder(rows, 7, 3, 0, expected.extend, batch, Shards(4))
        orders.append(torch.cat([order[start : start + batch] for start in range(0, rows, batch)]))
        mine = []
        for start in range(0, rows, batch):
            index = order[start : start + batch]
            mine += [index[slice(*Shards(4).bounds(len(index))[shard])] for shard in Shards(4).mine]
        read = set((torch.cat(mine) // 7).tolist())
        if rows == 700:
            assert 50 <= len(read) < 75  # of 100, some by both, as blocks and shards have other ends
            assert read - set(order.order[:3].tolist()) <= set(expected)
    assert torch.equal(*orders)
    assert sorted(orders[0].tolist()) == list(range(rows))


def test_where_a_row_comes_is_even() -> None:
    """The mean place of every row over many epochs is the middle: no row comes early by rule."""
    rows, epochs = 90, 400
    places = torch.zeros(rows)
    for epoch in range(epochs):
        places[order_of(rows, 4, 1, epoch)[0:rows]] += torch.arange(rows, dtype=torch.float32)
    deviation = rows / 12**0.5 / epochs**0.5
    assert float((places / epochs - (rows - 1) / 2).abs().max()) < 4.5 * deviation


@pytest.mark.usefixtures("narrow")
def test_no_more_than_a_window_is_held(tmp_path: Path) -> None:
    _, kept = both(tmp_path, TensorSource(scale="unit"))
    rows = kept.train.rows
    assert isinstance(rows, Streamed)
    for start in range(0, len(rows), 20):
        rows[torch.arange(start, min(start + 20, len(rows)))]
        assert rows.blocks._held.nbytes == 3 * 7 * 4 * 64


def test_too_many_rows_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    """FAULTS 45: what does not fit is said before it is read."""
    _, kept = both(tmp_path, TensorSource(scale="unit"))
    monkeypatch.setattr(streamed, "MATERIALISED_BYTES", 2**10)
    with pytest.raises(DataError, match=r"Expected at most .* MiB of streamed rows at once; got 240 rows"):
        _ = kept.train.x


@pytest.mark.parametrize("how", ["cut", "written over", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, how: str) -> None:
    """FAULTS 26: cut short, a mapped file would kill the process (SIGBUS); it is looked at before every read."""
    _, kept = both(tmp_path, TensorSource(scale="unit"))
    path = tmp_path / "x.npy"
    if how == "cut":
        os.truncate(path, 1000)
    elif how == "gone":
        path.unlink()
    else:
        np.save(path, images()[0][::-1])
        os.utime(path, ns=(0, 10**18))
    with pytest.raises(DataError, match="x.npy: expected"):
        _ = kept.train.x
    refused("x.npy: expected", kept.train.draw, kept.train.order(0, 0)[0:8])


def test_sparse_rows_and_joined_arrays_are_their_dense_selves() -> None:
    from scipy.sparse import random_array

    dense = random_array((50, 12), density=0.2, rng=np.random.default_rng(0)).toarray()
    sparse = SparseRows(dense).reshape(50, 3, 4)
    two = Joined([dense[:20], SparseRows(dense[20:])])
    where = np.array([0, 3, 19, 20, 21, 49])
    assert np.array_equal(sparse[where], dense[where].reshape(-1, 3, 4))
    assert np.array_equal(sparse[10:13], dense[10:13].reshape(-1, 3, 4))
    assert np.array_equal(two[where], dense[where])
    assert np.array_equal(two[15:30], dense[15:30])
    assert np.array_equal(two.reshape(50, 3, 4)[15:30], dense[15:30].reshape(-1, 3, 4))
    assert (two.shape, len(two)) == ((50, 12), 50)


def test_rows_that_two_splits_share_are_counted() -> None:
    """FAULTS 25: against Python's own sets; one bit is enough to be another row."""
    state = np.random.RandomState(0)
    x = state.randint(0, 3, (400, 5)).astype(np.uint8)
    parts = tenths(400, ["validation", "test"], 0)
    train = {tuple(row) for row in x[parts["train"]]}
    assert shared_rows(x, parts, "test") == sum(tuple(row) in train for row in x[parts["test"]])
    distinct = np.arange(400.0)[:, None]
    assert shared_rows(distinct, parts, "test") == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_distinct_rows_of_whole_numbers_are_not_taken_for_each_other(dtype: Any) -> None:
    x = np.random.RandomState(0).randint(0, 50, (4000, 20)).astype(dtype)
    assert len({row.tobytes() for row in x}) == 4000
    assert shared_rows(x, tenths(4000, ["validation", "test"], 0), "validation") == 0


def test_what_a_threshold_makes_constant_is_refused_on_the_disk_too(tmp_path: Path) -> None:
    """FAULTS 24."""
    x = np.random.RandomState(0).random_sample((50, 4)) * 0.4
    refused("all 4 are constant", both, tmp_path, TensorSource(binarize="threshold"), x)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match="all 4 are constant"):
        pvae.data.load(pvae.data.Npy(path=str(tmp_path / "x.npy"), binarize="threshold", stream=True))


def test_what_varies_by_rounding_is_not_standardised() -> None:
    """FAULTS 24: the deviation underflows, although no two values are the same."""
    with pytest.raises(DataError, match="columns that vary in train"):
        Dataset.from_tensors(np.random.RandomState(0).rand(40, 2) * 1e-200, declared=TensorSource(scale="standardise"))


# ---------------------------------------------------------------------- fitting


def declared(tmp_path: Path, **train: Any) -> pvae.Experiment:
    x, y = images(200)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    return pvae.Experiment(
        name="streamed",
        data=Npz(path=str(tmp_path / "x.npz"), y="y", scale="unit", binarize="dynamic", stream=True),
        latents={"z": {"dim": 2}},  # type: ignore[dict-item]
        train={"epochs": 3, "batch_size": 16, **train},  # type: ignore[arg-type]
    )


def fit(experiment: pvae.Experiment, where: Path) -> pvae.Run:
    return pvae.fit(experiment, run_dir=where, device="cpu", progress=False)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stop_at", [5, 10, 27])
def test_a_streamed_fit_resumes_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    """FAULTS 10: within an epoch, at its end, and where a batch lies across two windows."""
    done = assert_resumes_exactly(declared(tmp_path), tmp_path, stop_at)
    assert isinstance(done.data.train.rows, Streamed)


@pytest.mark.usefixtures("narrow")
def test_an_epoch_of_a_streamed_fit_sees_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = loop.step

    def noted(trainer: Trainer, index: torch.Tensor) -> bool:
        seen.extend(index.tolist())
        return original(trainer, index)

    monkeypatch.setattr(loop, "step", noted)
    run = fit(declared(tmp_path, epochs=2), tmp_path)
    n = len(run.data.train)
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))
    assert seen[:n] != seen[n:]


@pytest.mark.usefixtures("narrow")
def test_labels_stand_behind_streamed_rows(tmp_path: Path) -> None:
    table = declared(tmp_path, epochs=1).model_dump(exclude_unset=True, exclude_none=True)
    table |= {
        "covariates": {"y": {"codes": 4}},
        "latents": {"z": {"dim": 2, "given": []}},
        "decoder": {"given": ["z", "y"]},
    }
    run = fit(pvae.Experiment.from_dict(table), tmp_path)
    assert run.data.test.rows.shape == (20, 65)
    assert torch.equal(run.data.test.x[:, 64].long(), run.data.test.y)  # type: ignore[arg-type]
    assert run.data.test.data.shape == (20, 1, 8, 8)
    index = torch.arange(10)
    drawn = run.data.train.draw(index)
    assert torch.equal(drawn[:, 64].long(), run.data.train.y[index])  # type: ignore[index]


@pytest.mark.usefixtures("narrow")
def test_analyses_of_a_streamed_run(tmp_path: Path) -> None:
    run = fit(declared(tmp_path), tmp_path)
    found = pvae.analysis.surgery(run.pair, run.data.test.x)
    held = Npz(path=str(tmp_path / "x.npz"), y="y", scale="unit", binarize="dynamic")
    assert np.isfinite(found.elbo.value)
    assert len(pvae.data.load(held).test) == len(run.data.test)
    again = pvae.Run.load(run.path)
    assert again.data.fingerprint == run.data.fingerprint


@pytest.mark.usefixtures("narrow")
def test_what_is_made_of_its_data_streams_as_long_as_they_fit(tmp_path: Path) -> None:
    """The aggregated posterior as the prior holds all training rows: small ones are read, large ones refused."""
    experiment = declared(tmp_path, epochs=1).with_overrides("latents.z.prior.kind=aggregated")
    fit(experiment, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "MATERIALISED_BYTES", 2**10)
        refused("Ask for fewer", fit, experiment, tmp_path)
