"""Whatever is declared, and whatever bytes are read: built and trained, or refused by a typed error with its place."""

import shutil
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pyro
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import pvae
from pvae.data import Data, load
from pvae.errors import CheckpointError, DataError, DeclarationError, NonFiniteError
from pvae.experiment.experiment import Experiment
from pvae.objectives.elbo import TraceMeanFieldELBO
from pvae.runs.checkpoint import Checkpoint
from pvae.runs.rundir import RunDirectory
from pvae.runs.weights import chosen
from pvae.training.recovery import first_bad_site
from pvae.training.trainer import State
from pvae.util.files import read_lines
from tests.drawn import Drawn, sound, wild
from tests.hostile import mangled, surfaces, try_bytes, try_declaration
from tests.strange import Tampered, files, tampering, try_file

MANY = settings(
    deadline=None, derandomize=True, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
LONGEST = 60.0
"""Seconds that no input may take, on a busy machine."""


@pytest.mark.parametrize("examples", [30, pytest.param(120, marks=pytest.mark.slow)])
def test_sound_declarations_build_train_and_read_back(examples: int, tmp_path: Path) -> None:
    """At least a third of what is drawn to be sound is; FAULTS 34."""
    outcomes: Counter[str] = Counter()

    @settings(MANY, max_examples=examples)
    @given(sound())
    def hold(drawn: Drawn) -> None:
        outcomes[try_declaration(drawn, tmp_path / str(outcomes.total()))] += 1

    hold()
    assert 3 * outcomes["trained"] >= outcomes.total(), outcomes


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_declarations_are_refused_with_paths_or_train(examples: int, tmp_path: Path) -> None:
    """FAULTS 34, 45."""
    outcomes: Counter[str] = Counter()

    @settings(MANY, max_examples=examples)
    @given(wild())
    def hold(drawn: Drawn) -> None:
        outcomes[try_declaration(drawn, tmp_path / str(outcomes.total()))] += 1

    hold()
    assert outcomes["refused"] > 0
    assert outcomes["trained"] > 0, outcomes


@pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_any_bytes_are_read_or_refused_by_a_typed_error(examples: int, tmp_path: Path) -> None:
    """FAULTS 6, 7, 26, 28, 33, 43."""
    for name, surface in surfaces(tmp_path / "home").items():
        outcomes: Counter[str] = Counter()

        @settings(MANY, max_examples=examples)
        @given(mangled(surface.seeds))
        def hold(content: bytes) -> None:
            started, folder = time.monotonic(), tmp_path / "input"
            folder.mkdir()
            try:
                outcomes[try_bytes(surface, content, folder)] += 1  # noqa: B023 - called in this turn of the loop
            finally:
                shutil.rmtree(folder)
            assert time.monotonic() - started < LONGEST

        hold()
        (tmp_path / name).mkdir()
        whole = "refused" if name == "run manifest.json" else "read"  # that seed is edited, which the seal shows
        assert try_bytes(surface, surface.seeds[0], tmp_path / name) == whole, name
        assert outcomes["refused"] > 0 or name.startswith("source images"), name  # a broken image is skipped


def test_files_that_are_right_are_read_right_or_refused(tmp_path: Path) -> None:
    """FAULTS 69, 72."""
    outcomes: Counter[str] = Counter()

    @settings(MANY, max_examples=80)
    @given(files())
    def hold(spec: dict[str, Any]) -> None:
        folder = tmp_path / str(outcomes.total())
        folder.mkdir()
        outcomes[try_file(spec, folder)] += 1

    hold()
    assert 2 * outcomes["read right"] >= outcomes.total(), outcomes


@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_tampered_runs_are_refused_or_end_as_they_would_have(examples: int, tmp_path: Path) -> None:
    """FAULTS 36, 46, 63, 64."""
    runs, outcomes = Tampered(tmp_path / "home"), Counter[str]()

    @settings(MANY, max_examples=examples)
    @given(tampering())
    def hold(spec: dict[str, Any]) -> None:
        outcomes[runs.attempt(spec, tmp_path / str(outcomes.total()))] += 1

    hold()
    assert outcomes["refused"] > 0


# ---------------------------------------------------------------------- what was found, and must not come back

SMALL = {"kind": "mlp", "hidden": [3]}
CODES = {"codes": 3, "posterior": {"kind": "exact"}}
BITS = {"bits": 2, "posterior": {"kind": "bernoulli", "estimator": "sum"}}


def declared(latents: dict[str, Any], **rest: Any) -> dict[str, Any]:
    parts = {
        "encoder": {"network": SMALL},
        "decoder": {"network": SMALL, "likelihood": "normal"},
        "train": {"epochs": 1},
    }
    return {"data": {"source": "tensor"}, "latents": latents, **parts, **rest}


UNSOUND: dict[str, tuple[dict[str, Any], str]] = {
    "convolutions without channels": (
        declared({"z": {"dim": 2}}, encoder={"network": {"kind": "conv", "channels": []}}),
        r"encoder\.network\.channels: expected .*at least 1 item",
    ),
    "a posterior given nothing": (
        declared({"z": {"dim": 2}, "w": {"dim": 2, "posterior": {"given": []}}}),
        r"latents\.w\.posterior\.given: expected 'x'.*; got \[\]",
    ),
    "a flow narrower than its latent": (
        declared({"z": {"dim": 5, "prior": {"kind": "maf", "hidden": [4]}}}),
        r"latents\.z\.prior\.hidden: expected layers at least as wide as the 5 coordinates of the flow; got \[4\]",
    ),
    "a network that the decoder cannot have": (
        declared({"z": {"dim": 2}, "w": {"dim": 2}}, decoder={"network": "table", "likelihood": "normal"}),
        r"decoder: network table: expected one input .*; got z, w",
    ),
    "a network that the encoder cannot have": (
        declared({"z": {"dim": 2}}, encoder={"network": "conv"}),
        r"encoder: network conv: expected an image .*; got x \[3\]",
    ),
    "a mixture of posteriors that are none": (
        declared({"z": {"dim": 2, "prior": "aggregated", "posterior": "delta"}}),
        r"latents\.z\.posterior: expected normal or full_rank_normal, .*; got Determined",
    ),
    "a sum beside an exact sum": (
        declared({"c": CODES, "b": BITS}),
        r"latents\.b\.posterior\.estimator: expected score, because c is summed out given its samples.*; got \"a sum\"",
    ),
    "a score function beside a sum": (
        declared({"a": {"bits": 9}, "b": BITS}),
        r"latents\.a\.posterior\.estimator: expected samples with a gradient beside b.*; got \"a score function\"",
    ),
    "sums of too many joint states": (
        declared({name: {**CODES, "codes": 100, "posterior": "exact"} for name in ("c", "d")}),
        r"latents: expected at most 4096 joint states of c, d.*; got \"1e\+04\"",
    ),
    "a temperature that falls below 0": (
        declared(
            {
                "c": {
                    "codes": 3,
                    "posterior": "relaxed_onehot",
                    "temperature": {"kind": "linear", "start": 1.0, "end": -1.0},
                }
            }
        ),
        r"latents\.c\.temperature: expected a temperature of at least 1e-06 throughout training; got -1\.0",
    ),
    "a learning rate that changes its sign": (
        declared({"z": {"dim": 2}}, train={"epochs": 1, "schedule": {"kind": "cosine", "end": -0.5}}),
        r"train\.schedule: expected a factor on the learning rate of at least 0 throughout training; got -0\.5",
    ),
    "a KL that is rewarded": (
        declared({"z": {"dim": 2}}, objective={"beta": -1.0}),
        r"objective\.beta: expected a weight of the KL of at least 0 throughout training; got -1\.0",
    ),
    "variances that overflow before training": (
        declared(
            {"z": {"dim": 2, "posterior": {"log_variance": [160.0, 170.0]}}},
            decoder={"network": SMALL, "likelihood": "multivariate_normal"},
        ),
        r"xpected distributions that are finite before training; got: Expected parameter",
    ),
    "masks larger than memory": (
        declared({"z": {"dim": 3, "prior": {"kind": "neural_autoregressive", "hidden": [4], "units": 10**12}}}),
        r"xpected a declaration that fits into .* GiB.*; got one that needs",
    ),
    "more layers than anybody waits for": (
        declared({"z": {"dim": 3, "prior": {"kind": "realnvp", "layers": 10**9}}}),
        r"latents\.z\.prior\.layers: expected less than or equal to 1000; got 1000000000",
    ),
    "as many layers one by one": (
        declared({"z": {"dim": 3}}, encoder={"network": {"kind": "mlp", "hidden": [1] * 2000}}),
        r"encoder\.network\.hidden: expected .*at most 1000 items",
    ),
    "more particles than memory holds": (
        declared({"z": {"dim": 2}}, objective={"kind": "iwae", "particles": 10**9}),
        r"xpected a declaration that fits into .* GiB.*; got one that needs at least .* GiB",
    ),
    "an integer that torch cannot count to": (
        declared({"z": {"dim": 2}}, objective={"kind": "iwae", "particles": 2**63}),
        r"objective\.particles: expected an integer of at most 9007199254740992; got 9223372036854775808",
    ),
    "a number that single precision cannot hold": (
        declared({"z": {"dim": 2}}, objective={"free_bits": 1e300}),
        r"objective\.free_bits: expected a number that single precision holds, at most 3\.4e\+38; got 1e\+300",
    ),
    "one of several numbers": (
        declared({"z": {"dim": 2, "posterior": {"log_variance": [-1e39, 0.0]}}}),
        r"latents\.z\.posterior\.log_variance\.0: expected a number that single precision holds",
    ),
    "a latent read by a prior that heeds no parents": (
        declared(
            {
                "c": {"codes": 3, "posterior": "categorical"},
                "d": {"codes": 3, "given": ["c"], "posterior": "categorical"},
            }
        ),
        r"decoder\.given: expected every latent read by the decoder or .* reads its parents; c is not",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_what_cannot_be_fitted_is_refused_with_its_path(case: str, tmp_path: Path) -> None:
    """FAULTS 34, 45."""
    raw, message = UNSOUND[case]
    with pytest.raises(DeclarationError, match=message):
        pvae.fit(Experiment.from_dict(raw), data=torch.randn(30, 3), run_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


SOUND: dict[str, dict[str, Any]] = {
    "mean field beside an exact sum given its parent": declared(
        {"b": {"codes": 2, "posterior": "relaxed_onehot"}, "c": {**CODES, "given": ["b"]}},
        decoder={"network": SMALL, "likelihood": "normal", "given": ["b", "c"]},
        objective={"kind": "trace_mean_field_elbo"},
    ),
    "bits given bits, both summed, mean field": declared(
        {"b": {**BITS, "posterior": {"kind": "bernoulli", "given": ["x", "c"]}}, "c": BITS},
        objective={"kind": "trace_mean_field_elbo"},
    ),
    "a bijection of features on a grid": declared(
        {
            "c": {
                "codes": 5,
                "grid": [3, 2],
                "posterior": {
                    "kind": "categorical",
                    "network": {"kind": "bijection", "flow": {"kind": "realnvp", "hidden": [9]}},
                },
            }
        },
        encoder={"network": {"kind": "mlp", "hidden": [30]}},
    ),
    "more joint states of bits than a float can count": declared({"b": {"bits": 1100}}),
    "more joint states of codes than a float can count": declared(
        {"c": {"codes": 10, "grid": [20, 20], "posterior": "categorical"}}
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_sound_trains_and_is_read_back(case: str, tmp_path: Path) -> None:
    assert try_declaration(Drawn(SOUND[case], (3,), 20, 0, fitting=True), tmp_path) == "trained"


def test_the_closed_kl_of_bits_broadcasts(tmp_path: Path) -> None:
    pair = Experiment.from_dict(SOUND["bits given bits, both summed, mean field"]).build((3,))
    x = torch.randn(500, 3)
    torch.manual_seed(0)
    closed, drawn = (pair.terms(x, closed_form=way, expected=True).kl["b"].detach().mean() for way in (True, False))
    assert float(closed) == pytest.approx(float(drawn), rel=1e-3)
    assert TraceMeanFieldELBO().terms(pair, x).kl["b"].shape == (500,)


def test_what_a_parquet_file_says_to_pandas_is_not_read(tmp_path: Path) -> None:
    """FAULTS 30."""
    table = pyarrow.table({"a": [float(i) for i in range(20)]}).replace_schema_metadata({"pandas": "{"})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    declared_data = {"source": "parquet", "path": "t.parquet", "columns": {"a": {"type": "continuous"}}}
    assert load(Data.parse(declared_data), data_dir=tmp_path).shape == (1,)


def test_metrics_that_are_no_table_are_refused(tmp_path: Path) -> None:
    """FAULTS 43."""
    run = RunDirectory.create(tmp_path, "run")
    (run.path / "metrics.jsonl").write_text('{"epoch": 1, "\\ud800": 2}\n' * 2)
    with pytest.raises(DataError, match=r"metrics\.jsonl: expected names and values that a table can hold; got: "):
        run.metrics()


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_draw_that_cannot_be_made_is_a_loss_that_is_not_finite(policy: str, tmp_path: Path) -> None:
    """FAULTS 18."""
    codes = {"codes": 4, "grid": [3, 2], "posterior": {"kind": "categorical", "estimator": "score"}}
    train = {"epochs": 2, "batch_size": 7, "optimizer": {"kind": "sgd", "lr": 1e30}, "nonfinite": policy}
    experiment = Experiment.from_dict(declared({"c": codes}, train=train))
    with pytest.raises(NonFiniteError, match=r"no draw (at|after) step \d+: probability tensor contains|not finite"):
        pvae.fit(experiment, data=torch.randn(30, 3), run_dir=tmp_path, progress=False)


def test_the_rows_of_a_bad_sum_are_those_of_the_batch() -> None:
    """FAULTS 18."""
    pair = Experiment.from_dict(declared({"c": CODES})).build((3,))
    x = torch.zeros(5, 3)
    x[3] = torch.nan
    with pyro.validation_enabled(False):
        assert first_bad_site(pair, x) == ("model.x", [3])


def test_reading_lines_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n' * 1000)
    tracemalloc.start()
    try:
        assert len(read_lines(tmp_path, "metrics.jsonl")) == 1000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "state", [{"epohc": 1}, {"epoch": "1"}, {"epoch": True}, {"step": -7}, {"seconds": 1e300}, {"stopped": 1}]
)
def test_a_state_of_another_kind_is_none(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"state.json has {next(iter(state))} = "):
        State.of(Checkpoint(Path(), 3, {}, state))
    state = {"step": 3, "epoch": 3, "best": -1, "select": "best"}
    assert State.of(Checkpoint(Path(), 3, {}, state)) == State(step=3, epoch=3, best=-1)


def test_weights_are_asked_for_by_name(tmp_path: Path) -> None:
    run = pvae.fit(
        Experiment.from_dict(declared({"z": {"dim": 2}})), data=torch.randn(30, 3), run_dir=tmp_path, progress=False
    )
    saved = run.checkpoint
    saved.tensors.pop("weights")
    with pytest.raises(CheckpointError, match=r"expected weights\.safetensors; got optimizer, best"):
        chosen(saved)
