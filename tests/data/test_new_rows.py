"""New rows: every source read again by what a fit keeps, names and numbers of rows, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import torch
from scipy import sparse
from torch.utils.data import TensorDataset

import pvae
from pvae.data import CSV, Data, Dataset, FrameSource, H5ad, Idx, Images, Npy, Npz, Split, TensorSource, load
from pvae.data.new import FittedTransforms, rows_of_new
from pvae.data.sources.base import FileData
from pvae.graph.frame import Entry
from tests.cli_runner import run_cli, run_cli_json
from tests.data.test_data import COLUMNS, FRAME, LABELS, PIXELS, TABLE, X, Y, loaded
from tests.data.writers import SMALL, h5ad, hdf5, npy, npz, pictures, refused


def again(data: Dataset, declared: Data | None, new: Any, closed: bool = False) -> Split:
    """Return new rows by the transforms of a data set, after they were written and read."""
    assert data.transforms is not None
    kept = FittedTransforms.parse(data.transforms.model_dump_json(exclude_defaults=True).encode(), "transforms.json")
    assert kept == data.transforms
    return kept.split(rows_of_new(new, declared, kept, labelled=closed), closed=closed)


def stored(name: str, declared: Data, folder: Path) -> Any:
    """Return what a user has of the data of a source: its file, its object, or its rows as an array with labels."""
    if isinstance(declared, FileData):
        beside = declared.labels if isinstance(declared, Npy | Idx) else None
        return (declared.path, beside) if beside else declared.path
    if isinstance(declared, TensorSource | FrameSource):
        return FRAME if isinstance(declared, FrameSource) else (X, Y)
    rows = declared.read(folder, 0)
    return rows.x[:], rows.y


CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TABLE if name != "codes"),  # whose new rows are those of the earlier run
    *((name, {"scale": "standardise"}) for name in ("tensor", "npz", "npy", "h5ad", "toy")),
    *((name, {"binarize": "threshold"}) for name in ("tensor", "digits", "images", "hdf5", "npz")),
    *((name, {"stream": True}) for name in TABLE if "stream" in Data.members[name].model_fields),
    ("npy", {"stream": True, "binarize": "threshold"}),
    ("digits", {"shape": (64,)}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=str)
@pytest.mark.usefixtures("small_mnist")
def test_a_source_read_again_is_the_data_of_the_fit(name: str, change: dict[str, Any], tmp_path: Path):
    declared = TABLE[name].make(tmp_path).model_copy(update=change)
    data = loaded(name, tmp_path, **change)
    whole, new = data.whole(), again(data, declared, stored(name, declared, tmp_path))
    assert torch.equal(new.x, whole.x)
    assert new.name == "new"
    assert np.array_equal(new.numbers, whole.numbers)
    assert np.array_equal(new.numbers, np.arange(len(whole)))
    assert new.y is not None
    assert whole.y is not None
    assert torch.equal(new.y, whole.y)
    assert new.label_names == whole.label_names == data.label_names
    assert new.ids is whole.ids is None or np.array_equal(new.ids, whole.ids)  # type: ignore[arg-type]
    for split in data.splits:
        assert torch.equal(new.x[torch.from_numpy(split.numbers)], split.x)
        assert (whole.splits[split.numbers] == split.name).all()


@pytest.mark.parametrize("name", ["npy", "idx"])
def test_labels_in_a_file_of_the_fit_are_passed_beside_new_arrays(name: str, tmp_path: Path):
    declared, data = TABLE[name].make(tmp_path), loaded(name, tmp_path)
    rows, whole = declared.read(tmp_path, 0), data.whole()
    new = again(data, declared, (rows.x[:], whole.y), closed=True)
    assert torch.equal(new.x, whole.x)
    assert new.y is not None
    assert whole.y is not None
    assert torch.equal(new.y, whole.y)


def test_archives_with_splits_are_numbered_in_their_order(tmp_path: Path):
    declared = Npz(path=npz(tmp_path, x_val=X[:5], x_train=X[5:], y_train=Y[5:], y_val=Y[:5]), y="y")
    data = load(declared)
    assert np.array_equal(data.validation.numbers, np.sort(data.validation.numbers))
    assert torch.equal(again(data, declared, declared.path).x, data.whole().x)


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
@pytest.mark.parametrize("stream", [False, True])
def test_draws_of_new_rows_are_the_same_each_time(binarize: Any, stream: bool, tmp_path: Path):
    declared = Npy(path=npy(tmp_path / "x.npy", X), binarize=binarize, stream=stream)
    data = load(declared)
    one, other = (again(data, declared, declared.path).x for _ in range(2))
    assert torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 1.0}
    whole = data.whole()
    assert set(whole.x.unique().tolist()) == {0.0, 1.0}
    for split in data.splits if not stream else ():  # those of the fit stay as they were drawn
        assert torch.equal(whole.x[torch.from_numpy(split.numbers)], split.x)
    if not stream:
        assert np.array_equal(one.numpy(), np.random.RandomState(777).binomial(1, X.astype(np.float64)))


def test_rows_of_conditional_data_keep_their_labels_in_the_whole(tmp_path: Path):
    for stream in (False, True):
        data = load(Npz(path=npz(tmp_path, x=X, y=Y), y="y", stream=stream))
        whole = data.conditioned({"y": Entry(codes=3)}).whole()
        assert whole.event == (4,)
        assert torch.equal(whole.x, torch.cat([data.whole().x, torch.from_numpy(Y)[:, None]], 1))


# Names


NAMES = [f"{n:03}" for n in range(40)]
MANY_KINDS = pandas.DataFrame(X, columns=list("abcd")).assign(y=LABELS, who=NAMES)
TABULAR = {**COLUMNS, "id": "who"}


def table(kind: str, path: Path, frame: pandas.DataFrame = MANY_KINDS) -> Any:
    if kind == "frame":
        return frame
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    return path


def named(kind: str, path: Path) -> tuple[Dataset, Data | None, Any]:
    """Return a data set whose rows have names, its declaration, and what was read."""
    if kind == "anndata":
        adata = anndata.AnnData(X, pandas.DataFrame(index=NAMES), pandas.DataFrame(index=list("abcd")))
        return Dataset.from_anndata(adata), TensorSource(), adata
    if kind in ("csv", "parquet"):
        declared: Data = Data.parse({"source": kind, "path": str(table(kind, path)), **TABULAR})
    elif kind == "frame":
        return *of_frame(), MANY_KINDS
    elif kind == "h5ad":
        declared = H5ad(path=h5ad(path, X, pandas.DataFrame(index=NAMES)))
    elif kind == "images":
        folder = pictures(path.parent, PIXELS, ["."] * 40)
        return load(Images(path=folder, mode="L")), Images(path=folder, mode="L"), folder
    else:
        write = {"npz": lambda **a: np.savez(path, **a), "hdf5": lambda **a: hdf5(path, **a)}[kind]
        write(x=X, who=np.array(NAMES, "S" if kind == "hdf5" else "U"))
        declared = Data.parse({"source": kind, "path": str(path), "id": "who"})
    return load(declared), declared, path


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame", "npz", "hdf5", "h5ad", "anndata", "images"])
def test_names_of_rows_stay_with_them(kind: str, tmp_path: Path):
    data, declared, read = named(kind, tmp_path / f"data.{kind}")
    wanted = np.array([f"{n:02}.png" for n in range(40)] if kind == "images" else NAMES)
    for split in (*data.splits, data.whole(), again(data, declared, read)):
        assert split.ids is not None
        assert split.ids.dtype.kind == "U"
        assert np.array_equal(split.ids, wanted[split.numbers])


def test_names_are_kept_as_they_are_written_and_may_repeat():
    frame = MANY_KINDS.assign(who=pandas.Series([None, "", "é\U0001f600", "7", "7"] + ["007"] * 35))
    data = Dataset.of(frame, FrameSource.model_validate(TABULAR))
    assert data.whole().ids.tolist()[:6] == ["", "", "é\U0001f600", "7", "7", "007"]  # type: ignore[union-attr]
    assert "36 of 40 ids repeat that of another row" in data.notes
    for whole in (pandas.Series([7.0, None, *range(38)]), pandas.Series([7, *range(39)], dtype="int8")):
        ids = Dataset.of(frame.assign(who=whole), FrameSource.model_validate(TABULAR)).whole().ids
        assert ids is not None
        assert ids[0] == "7"
    indexed = Dataset.of(MANY_KINDS.set_index("who"), FrameSource.model_validate(TABULAR)).whole()
    assert indexed.ids.tolist() == NAMES  # type: ignore[union-attr]


def test_names_in_a_file_have_a_largest_length(tmp_path: Path):
    frame = MANY_KINDS.assign(who=["a" * 201, *NAMES[1:]])
    path = table("csv", tmp_path / "t.csv", frame)
    refused("at most 200 bytes; got one of 201", load, CSV.model_validate({**TABULAR, "path": str(path)}))


# Other data


def of_frame(**more: Any) -> tuple[Dataset, FrameSource]:
    declared = FrameSource.model_validate({**TABULAR, **more})
    return Dataset.of(MANY_KINDS, declared), declared


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_columns_are_found_by_name_and_labels_may_be_absent(kind: str, tmp_path: Path):
    data, declared = of_frame()
    frame = MANY_KINDS[["d", "who", "b", "a", "c"]].assign(more=1)
    new = again(data, declared, table(kind, tmp_path / f"t.{kind}", frame))
    assert torch.equal(new.x, data.whole().x)
    assert new.y is None
    assert new.ids is not None
    assert any("'y' is not read" in note and "expected a column 'y'" in note for note in new.notes)
    nameless = again(data, declared, table(kind, tmp_path / f"n.{kind}", MANY_KINDS.drop(columns="who")))
    assert nameless.ids is None
    assert nameless.words is not None
    assert nameless.words.tolist() == LABELS
    refused("expected a column 'y'; got", again, data, declared, frame, closed=True)
    refused("expected a column 'c'; got 'a', 'b', 'd'", again, data, declared, MANY_KINDS[["a", "b", "d"]])


def test_words_keep_their_codes_and_new_ones_get_their_own():
    data, declared = of_frame()
    assert data.label_names == ("a", "b", "c")
    frame = MANY_KINDS.assign(y=["c", "aa", *["b"] * 38])
    new = again(data, declared, frame)
    assert new.label_names == ("a", "b", "c", "aa")
    assert new.y is not None
    assert new.y[:3].tolist() == [2, 3, 1]
    assert new.words is not None
    assert new.words[:3].tolist() == ["c", "aa", "b"]
    refused("row 1: expected a label of the fit, a, b, c; got 'aa'", again, data, declared, frame, closed=True)


@pytest.mark.parametrize(
    ("known", "found", "codes", "words"),
    [
        (("a", "b"), [1, 0], [1, 0], ["b", "a"]),  # codes
        (("a", "b"), [0, 7], [0, 7], ["0", "7"]),
        (None, [4, 2], [4, 2], ["4", "2"]),
        (("b", "a"), ["a", "c"], [1, 2], ["a", "c"]),
        (None, ["x", "4"], [1, 0], ["x", "4"]),
    ],
)
def test_labels_in_other_forms(known: Any, found: list[Any], codes: list[int], words: list[str]):
    data = Dataset.from_tensors(X, Y % 2, label_names=known)
    new = again(data, TensorSource(), (X[:2], np.array(found)))
    assert new.y is not None
    assert new.y.tolist() == codes
    assert new.words is not None
    assert new.words.tolist() == words


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_a_level_never_seen_is_an_error_or_missing_as_declared(kind: str, tmp_path: Path):
    column = {"type": "categorical", "levels": ["a", "b", "c"], "missing": "mask"}
    frame = MANY_KINDS.assign(k=LABELS)
    other = frame.assign(k=["zebra", *LABELS[1:]])

    def read(**rule: str) -> Split:
        declared = FrameSource.model_validate({"columns": {"k": {**column, **rule}, "a": "continuous"}})
        return again(Dataset.of(frame, declared), declared, table(kind, tmp_path / f"t.{kind}", other))

    refused("(line 2|row 0), column 'k': expected one of 'a', 'b', 'c'; got 'zebra'", read)
    found = read(unknown="missing")
    assert found.x[:, 0].isnan().nonzero().tolist() == [[0]]
    assert found.notes == ("column 'k': levels that are not declared count as missing",) or "left out" in found.notes[0]
    with pytest.raises(ValueError, match='missing = "mask" with unknown'):
        FrameSource.model_validate({"columns": {"k": {**column, "missing": "error", "unknown": "missing"}}})


def adata(x: Any, genes: str, **layers: Any) -> anndata.AnnData:
    return anndata.AnnData(x, var=pandas.DataFrame(index=list(genes)), layers=layers)


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["object", "file", "stream"])
def test_features_with_names_are_put_in_the_order_of_the_fit(make: Any, kind: str, tmp_path: Path):
    data = Dataset.from_anndata(adata(X, "abcd", raw=X * 2), layer="raw", declared=TensorSource(scale="standardise"))
    new: Any = adata(make(X[:, ::-1]), "dcba", raw=make(X[:, ::-1] * 2))
    declared: Data = TensorSource()
    if kind != "object":
        h5ad(tmp_path / "x.h5ad", new.X, new.obs, new.var, **new.layers)
        new, declared = tmp_path / "x.h5ad", H5ad(path="", stream=kind == "stream")
    assert torch.equal(again(data, declared, new).x, data.whole().x)
    more = adata(np.c_[X, X[:, :1]], "abcde", raw=np.c_[X, X[:, :1]] * 2)
    assert torch.equal(again(data, None, more).x, data.whole().x)
    refused("expected 'c', a feature of the data of the fit .2 lack.", again, data, None, adata(X, "abef", raw=X))
    refused("Expected a layer", again, data, None, adata(X, "abcd"))


def test_frames_and_arrays_of_a_model_without_a_table():
    data = Dataset.of(MANY_KINDS[list("abcd")])
    for new in (MANY_KINDS[list("dcba")], X, torch.from_numpy(X), sparse.csr_matrix(X), TensorDataset(torch.tensor(X))):
        assert torch.equal(again(data, TensorSource(), new).x, data.whole().x)
    one = again(data, TensorSource(), X[:1])
    assert one.x.shape == (1, 4)


GREY = Dataset.from_tensors(PIXELS, declared=TensorSource(scale="unit"))
WRONG: list[tuple[Dataset, Any, str]] = [
    (GREY, PIXELS[:, :1], r"new: expected rows of shape \[2, 3\], as the data of the fit .6 values.; got \[1, 3\]"),
    (GREY, PIXELS[0], "as the data of the fit"),
    (
        GREY,
        PIXELS / 255,
        r"row 0, element \(0, 0\): expected a .*, as the data of the fit have .uint8, divided by 255.0",
    ),
    (GREY, np.full((2, 2, 3), np.nan), "expected finite numbers; got nan in row 0"),
    (GREY, PIXELS[:0], "at least one row"),
    (GREY, PIXELS.transpose(0, 2, 1), "axes in another order"),
    (GREY, [["a"] * 6], "expected real numbers"),
    (GREY, (PIXELS, Y[:3]), "expected one for each of 40 rows"),
    (GREY, "no_such.npy", "expected a file of data|no such file"),
    (GREY, "no_such.thing", "expected a file of rows .csv, h5ad, hdf5"),
    (of_frame()[0], X, "expected a pandas DataFrame; got ndarray"),
    (of_frame()[0], MANY_KINDS.assign(a="x"), "row 0, column 'a': expected a finite number; got 'x'"),
]


@pytest.mark.parametrize(("data", "new", "match"), WRONG)
def test_other_data_are_refused_by_what_is_wrong(data: Dataset, new: Any, match: str):
    refused(match, again, data, None, new)


def test_whole_numbers_of_another_type_are_the_same_rows():
    for kind in (np.int64, np.float32, np.float64):
        assert torch.equal(again(GREY, TensorSource(), PIXELS.astype(kind)).x, GREY.whole().x)
    assert torch.equal(again(GREY, None, PIXELS.reshape(40, 6)).x, GREY.whole().x)


def test_a_file_of_another_format_is_read_as_far_as_the_declaration_says_how(tmp_path: Path):
    declared = Npz(path=npz(tmp_path, images=X, kinds=Y), x="images", y="kinds", scale="standardise")
    data = load(declared)
    other = hdf5(tmp_path / "x.h5", images=X, kinds=Y)
    assert torch.equal(again(data, declared, other).x, data.whole().x)
    (tmp_path / "nameless").write_bytes(Path(npy(tmp_path / "x.npy", X)).read_bytes())
    assert torch.equal(again(data, declared, tmp_path / "nameless").x, data.whole().x)
    refused("expected arrays, or columns declared for this table", again, data, declared, tmp_path / "x.csv")


def test_files_above_a_size_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pvae.data.new.STREAMED_BYTES", 100)
    declared = Npy(path=npy(tmp_path / "x.npy", X), scale="standardise")
    data = load(declared)
    new = again(data, declared, declared.path)
    assert not isinstance(new.rows, torch.Tensor)
    assert torch.equal(new.x, data.whole().x)


F4 = b'{"shape":[2],"dtype":"f4",'


@pytest.mark.parametrize(
    "text", [b"", b"{}", F4 + b'"shift":[1.0]}', b'{"shape":[1],"dtype":3}', F4 + b'"divisor":0.0}', F4 + b'"x":1}']
)
def test_transforms_that_are_none_are_refused(text: bytes):
    refused("transforms.json: expected the transforms of a fit; got", FittedTransforms.parse, text, "transforms.json")


# Runs


TABLE_OF_RUN = {
    "columns": {**COLUMNS["columns"], "k": {"type": "categorical", "levels": ["a", "b", "c"]}},  # type: ignore[dict-item]
    "id": "who",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pandas.DataFrame, Split]:
    """Return a run that was copied to another folder without its data, a frame like its data, and its whole data."""
    folder = tmp_path_factory.mktemp("alone")
    frame = MANY_KINDS.assign(k=LABELS)
    table("csv", folder / "t.csv", frame)
    declared = {"source": "csv", "path": str(folder / "t.csv"), **TABLE_OF_RUN}
    plan = pvae.Experiment.from_dict(
        {"data": declared, "latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "columns"}}
    )
    run = pvae.fit(plan, *SMALL, run_dir=folder / "runs", device="cpu", progress=False)
    whole = run.data.whole()
    shutil.copytree(run.path, folder / "elsewhere")
    shutil.rmtree(folder / "runs")
    (folder / "t.csv").unlink()
    return folder / "elsewhere", frame, whole


def test_a_run_without_its_data_reads_new_rows(alone: tuple[Path, pandas.DataFrame, Split], tmp_path: Path):
    path, frame, whole = alone
    run = pvae.Run.load(path)
    for kind in ("csv", "parquet", "frame"):
        new = run.rows(table(kind, tmp_path / f"t.{kind}", frame))
        assert torch.equal(new.x, whole.x)
        assert np.array_equal(new.ids, whole.ids)  # type: ignore[arg-type]
    assert run.transforms.to_frame(whole.x)["k"].tolist() == LABELS
    table("csv", tmp_path / "r.csv", frame)
    assert torch.equal(run.rows("r.csv", data_dir=tmp_path).x, whole.x)
    with pytest.raises(pvae.errors.DataError, match=r"row 0, column 'k': expected one of .*; got 'q'"):
        run.rows(frame.assign(k="q"))


def test_edited_transforms_are_seen(alone: tuple[Path, pandas.DataFrame, Split], tmp_path: Path):
    path = Path(shutil.copytree(alone[0], tmp_path / "run"))
    file = path / "transforms.json"
    assert pvae.verify(path).ok
    file.write_text(file.read_text().replace('"b"', '"bb"'))
    refused("transforms.json: expected the file of the fit; got an edited one", pvae.Run.load(path).rows, alone[1])
    assert not pvae.verify(path).ok
    file.unlink()
    refused("transforms.json: expected a plain readable file", pvae.Run.load(path).rows, alone[1])


def test_a_run_of_an_earlier_version_reads_its_data_for_the_transforms(tmp_path: Path):
    run = pvae.fit("vae", "data.splits.train=[0,100]", *SMALL, run_dir=tmp_path, device="cpu", progress=False)
    kept = run.transforms
    (run.path / "transforms.json").unlink()
    found = run.files.manifest
    run.files.write_manifest({key: value for key, value in found.items() if key != "transforms"})
    assert pvae.Run.load(run.path).transforms == kept


def test_covariates_of_new_rows(tmp_path: Path):
    plan = pvae.Experiment.from_dict({
        "data": {"source": "tensor"}, "latents": {"z": {"dim": 2}}, "covariates": {"y": {"codes": 3}},
        "decoder": {"likelihood": "normal", "given": ["z", "y"]},
    })  # fmt: skip
    run = pvae.fit(plan, *SMALL, data=Dataset.from_tensors(X, Y), run_dir=tmp_path, device="cpu", progress=False)
    again = pvae.Run.load(run.path)
    new = again.rows((X, Y))
    assert torch.equal(new.x, run.data.whole().x)
    assert new.event == (4,)
    refused("new: expected labels, on which the model is conditioned; got none", again.rows, X)
    refused(r"new: expected labels 0 \.\. 2; got 0 \.\. 3\.$", again.rows, (X, np.arange(40) % 4))


def test_values_outside_the_support_are_refused(tmp_path: Path):
    run = pvae.fit("vae", "data.splits.train=[0,100]", *SMALL, run_dir=tmp_path, device="cpu", progress=False)
    assert run.rows(np.full((2, 64), 16)).x.mean() == 1
    refused(r"values in \[0, 1\]; got 1.0625 in new", run.rows, np.full((2, 64), 17))


def test_the_command_line_takes_the_data_of_a_fit_as_a_file(tmp_path: Path):
    declared = pvae.Experiment.from_dict(
        {
            "data": {"source": "tensor"},
            "latents": {"z": {"dim": 2}},
            "decoder": {"likelihood": "normal"},
        }
    )
    (tmp_path / "t.toml").write_text(declared.with_overrides(*SMALL).to_toml())
    path = npy(tmp_path / "x.npy", X)
    found = run_cli_json("fit", str(tmp_path / "t.toml"), "--data", path, "--run-dir", str(tmp_path / "runs"))
    run = pvae.Run.load(found["run"], data=path)
    assert torch.equal(run.data.whole().x, torch.from_numpy(X))
    assert run_cli_json("surgery", found["run"], "--data", path)["run"] == found["run"]
    _, told = run_cli("surgery", found["run"], code=65)
    assert "--data FILE on the command line" in told
    _, told = run_cli("surgery", found["run"], "--data", npy(tmp_path / "other.npy", X + 1), code=65)
    assert "expected data of fingerprint" in told


def test_a_fit_takes_a_file_for_its_table(tmp_path: Path):
    declared = {"source": "frame", **TABULAR}
    plan = pvae.Experiment.from_dict(
        {
            "data": declared,
            "latents": {"z": {"dim": 2}},
            "decoder": {"likelihood": "columns"},
        }
    )
    path = table("csv", tmp_path / "t.csv")
    run = pvae.fit(plan, *SMALL, data=path, run_dir=tmp_path / "runs", device="cpu", progress=False)
    assert run.data.source == "frame"
    assert run.data.fingerprint == of_frame()[0].fingerprint
    assert pvae.Run.load(run.path, data=MANY_KINDS).data.fingerprint == run.data.fingerprint
