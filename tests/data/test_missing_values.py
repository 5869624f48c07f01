"""Missing values (NaN, or a mask) of arrays, images and counts: read by every source, kept, and fitted beside."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import pvae
from pvae.analysis import encode, impute, score
from pvae.data import Dataset, load
from pvae.data.new import rows_of_new
from pvae.data.sources.base import Data
from pvae.data.sources.python import TensorSource
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from tests.data.writers import FLOATS, ROWS, Y, h5ad, hdf5, idx, npy, npz, refused

HOLED = np.where(np.random.RandomState(1).random_sample(FLOATS.shape) < 0.3, np.float32(np.nan), FLOATS)
MASK = TensorSource(missing="mask")
FEW = 'nan in row [0-9]+, column [0-9]+ .*set data.missing = "mask"'


def sources(folder: Path, x: Any) -> dict[str, dict[str, Any]]:
    """Return a declaration of every kind of file that holds arrays."""
    table = pandas.DataFrame(index=[str(i) for i in range(ROWS)])
    return {
        "npy": {"source": "npy", "path": npy(folder / "x.npy", x)},
        "npz": {"source": "npz", "path": npz(folder, x=x)},
        "hdf5": {"source": "hdf5", "path": hdf5(folder / "x.h5", x=x)},
        "h5ad": {"source": "h5ad", "path": h5ad(folder / "x.h5ad", x, table)},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["npy", "npz", "hdf5", "h5ad"])
def test_files_may_have_missing_values_where_that_is_declared(tmp_path: Path, kind: str, stream: bool) -> None:
    table = {**sources(tmp_path, HOLED)[kind], "stream": stream}
    refused(FEW, load, Data.parse(table))
    data = load(Data.parse({**table, "missing": "mask", "scale": "standardise"}))
    assert data.masked
    found = data.whole().x[:]
    train = HOLED[data.train.numbers]
    expected = (HOLED - np.nanmean(train, 0, dtype=float)) / np.nanstd(train, 0, dtype=float)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_objects_may_have_missing_values_where_that_is_declared() -> None:
    items = [(torch.tensor(x), int(y)) for x, y in zip(HOLED, Y, strict=True)]
    plain = [HOLED, torch.tensor(HOLED), anndata.AnnData(HOLED), np.ma.MaskedArray(FLOATS, np.isnan(HOLED))]
    for same in (plain, [(HOLED, Y), Items(items)]):
        for data in same:
            refused(FEW, Dataset.of, data)
        assert len({Dataset.of(data, MASK).fingerprint for data in same}) == 1
    refused("expected finite numbers; got inf", Dataset.of, np.where(np.isnan(HOLED), np.inf, 0.0), MASK)


class Items(torch.utils.data.Dataset[Any]):
    """Dataset of given items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_have_a_mask_beside_them(tmp_path: Path, stream: bool) -> None:
    x = np.random.RandomState(0).randint(0, 256, (ROWS, 1, 3, 4)).astype(np.uint8)
    gone = np.random.RandomState(1).random_sample(x.shape) < 0.4
    table = {"source": "npz", "path": npz(tmp_path, x=x, gone=gone, y=Y), "y": "y", "mask": "gone", "stream": stream}
    table |= {"scale": "unit", "largest": 255, "missing": "mask"}
    whole = load(Data.parse(table)).whole()
    np.testing.assert_allclose(whole.x[:], np.where(gone, np.nan, x / 255), rtol=1e-6)
    refused("set data.missing", load, Data.parse({**table, "missing": "error"}))
    table["path"] = npz(tmp_path, x=x, gone=2 * gone)
    refused(r"'gone': expected booleans \(or 0 and 1\).*; got \[2\]", load, Data.parse({**table, "y": None}))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["npy", "idx", "images"])
def test_files_and_folders_have_masks_beside_them(tmp_path: Path, kind: str, stream: bool) -> None:
    random = np.random.RandomState(0)
    x = random.randint(0, 256, (ROWS, 3, 4, 5)).astype(np.uint8)
    gone = random.random_sample((ROWS, 1, 4, 5)) < 0.4 if kind == "images" else random.random_sample(x.shape) < 0.4

    def written(name: str, values: np.ndarray) -> str:
        if kind != "images":
            write, values = (npy, values) if kind == "npy" else (idx, values.astype(np.uint8))
            return write(tmp_path / f"{name}.{kind}", values)
        (tmp_path / name).mkdir()
        pixels = values if name == "x" else (values * 255).repeat(3, 1)
        for i, image in enumerate(pixels.astype(np.uint8).transpose(0, 2, 3, 1)):
            Image.fromarray(image).save(tmp_path / name / f"{i:02}.png")
        return str(tmp_path / name)

    table = {"source": kind, "path": written("x", x), "stream": stream, "scale": "unit", "missing": "mask"}
    masked = {**table, "mask": written("gone", gone)}
    data = load(Data.parse(masked))
    np.testing.assert_allclose(data.whole().x[:], np.where(gone, np.nan, x / 255), rtol=1e-6)
    refused("set data.missing", load, Data.parse({**masked, "missing": "error"}))
    refused("expected booleans .*; got shape", load, Data.parse({**table, "mask": written("few", gone[:, :, :3])}))
    odd = Data.parse({**table, "mask": written("odd", gone * (0.5 if kind == "images" else 3))})
    refused(r"expected booleans \(or 0 .*; got \[", load, odd)
    if kind == "images":
        (tmp_path / "gone" / "03.png").rename(tmp_path / "gone" / "three.png")
        refused("gone: expected a mask for each image; got 03.png", load, Data.parse(masked))
    fitted = data.transforms
    assert fitted is not None
    new = rows_of_new(str(tmp_path / ("x" if kind == "images" else f"x.{kind}")), Data.parse(masked), fitted)
    assert not np.isnan(new.x[:]).any()
    arrays = rows_of_new(np.where(gone, np.nan, x).astype(np.float32), Data.parse(masked), fitted)
    assert np.array_equal(np.isnan(arrays.x[:]), np.broadcast_to(gone, x.shape))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rule", ["threshold", "static", "dynamic"])
def test_binary_pixels_stay_missing(tmp_path: Path, rule: str, stream: bool) -> None:
    x = np.where(np.isnan(HOLED), HOLED, np.abs(HOLED) % 1)
    table = {"source": "npy", "path": npy(tmp_path / "x.npy", x), "binarize": rule, "stream": stream}
    train = load(Data.parse({**table, "missing": "mask"})).train
    index = torch.arange(len(train))
    gone = torch.tensor(np.isnan(x[train.numbers]))
    for rows in (train.x[:], train.draw(index)):
        assert torch.equal(rows.isnan(), gone)
        assert set(rows[~gone].unique().tolist()) == {0.0, 1.0}


def test_a_feature_without_any_value_has_no_scale() -> None:
    x = HOLED.copy()
    x[:, 2] = np.nan
    refused(
        "column 2 is constant .*without any value", Dataset.of, x, TensorSource(missing="mask", scale="standardise")
    )


# ---------------------------------------------------------------------- fits


def plan(likelihood: dict[str, Any], **more: Any) -> Experiment:
    networks = {"network": {"kind": "mlp", "hidden": [8]}}
    return Experiment.from_dict({
        "data": {"source": "tensor", "missing": "mask"}, "latents": {"z": {"dim": 2}}, "encoder": networks,
        "decoder": {**networks, "likelihood": likelihood},
        "train": {"epochs": 4, "batch_size": 16, "engine": "eager"}, **more,
    })  # fmt: skip


IMAGES = {
    "bits": ({"kind": "bernoulli"}, (torch.rand(ROWS, 1, 4, 4) < 0.4).float(), {}),
    "counts": ({"kind": "poisson"}, torch.poisson(torch.full((ROWS, 6), 3.0)), {"kind": "iwae", "particles": 3}),
    "correlated": ({"kind": "multivariate_normal", "covariance": "tied"}, torch.randn(ROWS, 3), {}),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_fits_beside_missing_values_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    likelihood, x, objective = IMAGES[name]
    x = x.masked_fill(torch.rand(x.shape) < 0.5, torch.nan)
    declared = plan(likelihood, **({"objective": objective} if objective else {}))
    whole = pvae.fit(declared, data=x, run_dir=tmp_path / "a", device="cpu", progress=False)
    half = pvae.fit(declared, "train.epochs=2", data=x, run_dir=tmp_path / "b", device="cpu", progress=False)
    done = pvae.resume(half.path, "train.epochs=4", allow_changes=True, data=Dataset.of(x, MASK), progress=False)
    for key, value in whole.checkpoint.tensors["weights"].items():
        assert torch.equal(value, done.checkpoint.tensors["weights"][key]), key
    rows = whole.rows(x[:5]).x
    assert score(whole, rows, samples=5).log_p.isfinite().all()  # type: ignore[union-attr]
    assert encode(whole, rows).latents["z"].value.isfinite().all()
    assert whole.reconstruct(rows).x.isfinite().all()
    if name != "correlated":
        made = impute(whole, rows, samples=10, draws=2)
        assert made.x.isfinite().all()
        assert torch.equal(made.missing, rows.isnan())


def test_data_that_a_declaration_does_not_take_are_refused(tmp_path: Path) -> None:
    data = Dataset.of(HOLED, MASK)
    unaware = plan({"kind": "normal"}, data={"source": "tensor"})
    with pytest.raises(DataError, match='the likelihood normal does not take .* Set data.missing = "mask"'):
        pvae.fit(unaware, data=data, run_dir=tmp_path, progress=False)
    with pytest.raises(DataError, match="set data.missing"):
        pvae.fit(unaware, data=HOLED, run_dir=tmp_path, progress=False)
