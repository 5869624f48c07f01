"""Captions: a text for each row as a covariate, with a vocabulary of the training rows."""

import shutil
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import torch

import pvae
from pvae import Experiment, Run
from pvae.analysis import encode
from pvae.data import Dataset, load
from pvae.errors import DataError, DeclarationError
from pvae.graph.frame import PADDING, UNKNOWN, Frame
from tests.cli_runner import run_cli
from tests.data.writers import h5ad, npz

CAPTION = {"text": True, "of": "said", "length": 3, "vocabulary": 6}
SAID = ["A red circle", "red square", "Red, circle!", "", "a circle", "blue circle seen from above"]
SPLIT = [["a", "red", "circle"], ["red", "square"], ["red", "circle"], [], ["a", "circle"], ["blue", "circle", "seen"]]
# frequencies: circle 4, red 3, a 2, above, blue, from, ... once; places 0 .. 2 of a text are read
WORDS = (PADDING, UNKNOWN, "circle", "red", "a", "blue")
TOKENS = [[4, 3, 2], [3, 1, 0], [3, 2, 0], [0, 0, 0], [4, 2, 0], [5, 2, 1]]
N = 60
x = torch.rand(N, 2, 2, generator=torch.Generator().manual_seed(0))


def experiment(data: dict[str, Any], **changes: Any) -> Any:
    network = {"kind": "mlp", "hidden": [8]}
    prior = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}
    code = {"codes": 4, "grid": [2], "embedding": 3, "given": ["caption"], "prior": prior}
    raw = {
        "data": data,
        "covariates": {"caption": CAPTION},
        "latents": {"c": {**code, "posterior": {"kind": "nearest_code"}}},
        "encoder": {"network": network},
        "decoder": {"network": network, "likelihood": {"kind": "normal"}},
        "train": {"epochs": 1, "batch_size": 20},
    }
    return Experiment.from_dict(raw | changes)


def said(n: int = N) -> list[str]:
    return [SAID[i % 6] for i in range(n)]


def passed() -> Dataset:
    return Dataset.of(x, experiment({"source": "tensor"}).source, covariates={"caption": said(), "said": said()})


def words_of(data: Any) -> Any:
    """The word of each token, by name of the caption, of a data set or of a run."""
    return data.transforms.side.words


def test_captions_are_encoded_by_the_words_of_the_training_rows():
    declared = experiment({"source": "tensor", "splits": {"train": [0, 6], "validation": [6, 8], "test": [8, 9]}})
    unseen = ["green Circle", "red", "red"]
    data = Dataset.of({"x": x[:9], "said": [*SAID, *unseen]}, declared.source)
    assert words_of(data) == {"caption": WORDS}
    frame = Frame((2, 2), declared.entries())
    found = frame.columns(declared.conditioned(data).train.rows)["caption"]
    assert found.tolist() == TOKENS
    assert declared.conditioned(data).validation.rows[:, 4:].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert frame.shapes == {"caption": (6, 3)}
    groups = frame.groups(torch.cat([torch.zeros(6, 4), found], 1))
    assert groups is not None
    assert len(groups.unique()) == 6
    assert [note for note in data.notes if "cut" in note] == ["column 'caption': texts are cut to 3 words"]


def test_long_words_that_start_alike_are_told_apart(tmp_path):
    long = ["photosynthesis", "photosynthetic", "photosynthates", "photosynth"]
    pandas.DataFrame({"a": range(8), "said": long * 2}).to_csv(tmp_path / "x.csv", index=False)
    table = {"source": "csv", "path": str(tmp_path / "x.csv"), "columns": {"a": "continuous"}}
    splits = {"splits": {"train": [0, 4], "validation": [4, 6], "test": [6, 8]}}
    likelihood = {"decoder": {"network": {"kind": "mlp", "hidden": [8]}, "likelihood": {"kind": "columns"}}}
    from_csv = load(experiment(table | splits, **likelihood).source)
    passed = Dataset.of({"x": x[:8], "said": long * 2}, experiment({"source": "tensor", **splits}).source)
    for data in (from_csv, load(experiment(table | splits, **likelihood).source), passed):
        assert words_of(data) == {"caption": (PADDING, UNKNOWN, *sorted(long))}
        found = torch.cat([data.train.side["caption[0]"], data.validation.side["caption[0]"]])
        assert found.tolist() == [4, 5, 3, 2, 4, 5]
    assert passed.transforms.given("caption", "photosynthetic chlorophyll").tolist() == [5, 1, 0]  # type: ignore[union-attr]


def test_captions_come_from_every_kind_of_source(tmp_path):
    frame = pandas.DataFrame({"a": x[:, 0, 0], "b": x[:, 1, 1], "said": said()})
    array = np.ascontiguousarray(frame[["a", "b"]], np.float32)
    obs = frame[["said"]].astype({"said": "category"})
    h5ad(tmp_path / "x.h5ad", array, obs)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_csv(tmp_path / "x.csv", index=False)
    columns = {"a": "continuous", "b": "continuous"}
    table = {"columns": columns, "na": []}
    likelihood = {"decoder": {"network": {"kind": "mlp", "hidden": [8]}, "likelihood": {"kind": "columns"}}}
    files = [
        experiment({"source": "npz", "path": npz(tmp_path, np.savez, x=array, said=np.array(said()))}),
        experiment({"source": "h5ad", "path": str(tmp_path / "x.h5ad")}),
        experiment({"source": "parquet", "path": str(tmp_path / "x.parquet"), **table}, **likelihood),
        experiment({"source": "csv", "path": str(tmp_path / "x.csv"), **table}, **likelihood),
    ]
    datasets = [load(declared.source) for declared in files]
    plain = experiment({"source": "tensor"}).source
    adata = anndata.AnnData(array, obs=obs.set_axis([f"c{i}" for i in range(N)]))
    datasets += [
        Dataset.of(adata, plain),
        Dataset.of(frame, experiment({"source": "frame", **table}, **likelihood).source),
    ]
    first = passed().whole().side
    assert first.keys() == {f"caption[{i}]" for i in range(3)}
    for data in datasets:
        assert any("cut" in note for note in data.notes)
        for name, values in data.whole().side.items():
            torch.testing.assert_close(values, first[name], msg=f"{data.source}: {name}")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two epochs, resumed, in two shards, elsewhere and without its data."""
    folder = tmp_path_factory.mktemp("captions")
    np.savez(folder / "x.npz", x=x.numpy(), said=np.array(said()))
    declared = experiment({"source": "npz", "path": str(folder / "x.npz")})
    run = pvae.fit(declared, "train.shards=2", run_dir=folder / "runs", progress=False)
    pvae.resume(Run.load(run.path), "train.epochs=2", allow_changes=True, progress=False)
    assert run.pair.frame.columns(run.data.whole().x)["caption"].tolist() == [tokens_of(run)[i % 6] for i in range(N)]
    assert "caption" in run_cli("show", str(run.path / "spec.toml"))[0]
    shutil.copytree(run.path, folder / "copy" / run.path.name)
    shutil.rmtree(run.path)
    (folder / "x.npz").unlink()
    return Run.load(folder / "copy" / run.path.name)


def tokens_of(run: Run) -> list[list[int]]:
    """The tokens of `SAID`, a second time."""
    known = words_of(run)["caption"]
    found = [[known.index(word) if word in known else 1 for word in text] for text in SPLIT]
    return [[*text, 0, 0, 0][:3] for text in found]


def test_a_run_without_its_data_reads_captions_as_its_fit_did(copied: Run):
    new = {"x": x[:6], "said": SAID}
    assert copied.pair.frame.columns(copied.rows(new).x)["caption"].tolist() == tokens_of(copied)
    assert copied.encode(new).latents["c"].value.shape == (6, 2)
    assert copied.reconstruct(new, given={"caption": "a circle"}).x.shape == (6, 2, 2)
    for value, match in [(None, "row 1, column 'caption': expected a text; got none"), (3.5, "a text; got '3.5'")]:
        with pytest.raises(DataError, match=match):
            copied.rows({"x": x[:2], "said": ["red", value]})
    with pytest.raises(DataError, match=r"expected values of 'said' beside x"):
        copied.rows({"x": x[:2]})


def test_samples_are_given_captions(copied: Run, tmp_path):
    place = [words_of(copied)["caption"].index(word) for word in ("red", "circle")]
    found = copied.sample(4, given={"caption": "RED circle"})
    assert found.covariates["caption"].tolist() == [[*place, 0]] * 4
    several = copied.sample(2, given={"caption": ["red square", "purple"]}).covariates["caption"]
    assert several[:, 0].tolist() == [place[0], 1]
    for value, match in [("a b c d", r"texts of at most 3 words; got 'a b c d'"), (3, r"expected a text; got '3'")]:
        with pytest.raises(DeclarationError, match=match):
            copied.sample(2, given={"caption": value})
    out = str(tmp_path / "s.png")
    run_cli("sample", str(copied.path), "-n", "3", "--given", "caption=red circle", "--out", out)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["covariates/caption"].tolist() == [[*place, 0]] * 3


def test_captions_shuffled_change_nothing_where_nothing_is_given_them(tmp_path):
    read = {"said": {"type": "continuous", "transform": "none", "text": [3, 6]}}
    declared = experiment({"source": "tensor", "side": read}, latents={"z": {"dim": 2}}, covariates={})
    orders = [said(), said()[::-1]]
    found = [pvae.fit(declared, data={"x": x, "said": each}, run_dir=tmp_path, progress=False) for each in orders]
    one, other = (run.pair.state_dict() for run in found)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("covariate", "match"),
    [
        ({"text": True}, r"of, the column or array that has the text; got none"),
        ({"codes": 3, "length": 4}, r"length with text = true alone; got it with codes"),
        ({"text": True, "dim": 2, "of": "said"}, r"one of codes .*text \(a text for each row\); got dim and text"),
    ],
)
def test_a_wrong_declaration_is_refused(covariate, match):
    with pytest.raises(DeclarationError, match=match):
        experiment({"source": "tensor"}, covariates={"caption": covariate})


def test_a_text_is_no_column_of_x():
    with pytest.raises(DeclarationError, match=r"texts among values beside x alone \(covariates\); got the column 'a'"):
        experiment({"source": "frame", "columns": {"a": {"type": "continuous", "text": [3, 6]}}})


def test_a_token_prior_learns_how_codes_depend_on_captions(tmp_path):
    which = torch.arange(240) % 2
    captions = [("the dark one", "one bright square")[i] for i in which]
    shown = which[:, None, None] - 0.5 + 0.05 * torch.randn(240, 2, 2, generator=torch.Generator().manual_seed(1))
    declared = experiment({"source": "tensor"}, train={"epochs": 20, "optimizer": {"kind": "adam", "lr": 0.01}})
    run = pvae.fit(declared, data=shown, covariates={"said": captions}, run_dir=tmp_path, progress=False)
    rows, frame = run.data.test.x, run.pair.frame
    value = encode(run, rows, mean=True).latents["c"].value
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    other = frame.assemble(frame.split(rows)[0], {"caption": frame.columns(rows)["caption"][shuffled]})

    def score(rows: torch.Tensor) -> float:
        node: Any = run.pair.model_trace(rows, {"c": value}).nodes["c"]
        return float(node["fn"].log_prob(value).mean().detach())

    assert score(rows) > score(other) + 1.0
