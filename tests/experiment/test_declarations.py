"""Declarations: round trips, overrides, findings with their paths; faults 33, 34, 35."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest

from pvae.component import Component, load_plugins
from pvae.data import Data
from pvae.errors import DeclarationError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import arrows, formulas
from pvae.guides.graph import Encoder
from pvae.guides.posteriors.base import Posterior
from pvae.models.likelihoods.base import Likelihood
from pvae.models.priors.base import Prior
from pvae.nn.network import Network
from pvae.nn.schedules import Optimizer, Schedule
from pvae.objectives.base import Objective
from pvae.util import toml
from tests.cli_runner import write_schedule

BASE: dict[str, Any] = {"latents": {"z": {"dim": 2}}}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", zoo.names())
def test_zoo_round_trips_and_builds(name: str) -> None:
    experiment = Experiment.load(name)
    assert experiment.name == name
    assert experiment.description
    assert Experiment.from_toml(experiment.to_toml()) == experiment
    pair = experiment.build((2,) if experiment.data.source == "toy" else (1, 8, 8))  # type: ignore[attr-defined]
    assert {*pair.layout.latents, *pair.layout.enumerated} == set(experiment.latents)


def test_same_seed_builds_the_same_weights() -> None:
    one, two = (Experiment.from_dict(BASE).build((5,)) for _ in range(2))
    other = Experiment.from_dict({**BASE, "seed": 1}).build((5,))
    name, weight = next(iter(one.named_parameters()))
    assert weight.equal(dict(two.named_parameters())[name])
    assert not weight.equal(dict(other.named_parameters())[name])


# ---------------------------------------------------------------------- findings

Z = "latents.z.dim = 2\n"
BAD = {
    "true for a number": ("latents.z.dim = true", r"latents\.z\.dim: expected a valid integer; got true"),
    "text for a number": (Z + 'train.epochs = "3"', r'train\.epochs: expected a valid integer; got "3"'),
    "float for an integer": (Z + "train.epochs = 3.5", r"train\.epochs: expected .*; got 3\.5"),
    "infinity": (Z + "objective.beta = inf", r"objective\.beta\.value: expected a finite number"),
    "misspelt key": (Z + "train.epoch = 3", r"train\.epoch: .*unknown key \(did you mean 'epochs'\?\)"),
    "misspelt section": (Z + "[trian]", r"trian: expected one of .*\(did you mean 'train'"),
    "unknown kind": (
        Z + 'latents.z.prior = "standard_norml"',
        r"latents\.z\.prior\.kind: expected one of .*standard_normal.*; got \"standard_norml\" "
        r"\(did you mean 'standard_normal'\?\)",
    ),
    "unknown source": (Z + 'data.source = "mnits"', r"data\.source: expected one of .*'mnist'"),
    "no latents": ("latents = {}", r"latents: expected .*at least 1 item"),
    "a grid of three axes": (
        "latents.c = { codes = 4, grid = [3, 2, 2] }", r"latents\.c\.grid: expected at most 2 items; got \[3, 2, 2\]"
    ),
    "no dim": ("latents.z = {}", r"latents\.z: expected one of dim .*, codes .* and bits .*; got none"),
    "a list for a table": ("latents.z = []", r"latents\.z: expected .*; got \[\]"),
    "an import": (
        Z + 'decoder.network._target_ = "os.system"',
        r"decoder\.network\.kind: expected one of bijection, conv, gated_mlp, mlp, resnet, table; got none",
    ),
    "a class path": (
        Z + 'decoder.network = { kind = "mlp", class_path = "os.system" }',
        r"decoder\.network\.class_path: expected one of .*; got an unknown key",
    ),
    "an environment variable stays text": (
        Z + 'train.epochs = "${EPOCHS}"', r'train\.epochs: expected a valid integer; got "\$\{EPOCHS\}"',
    ),
    "reserved name": ("latents.x.dim = 2", r"latents: expected names in lower case.*got 'x'"),
    "name with a slash": ('latents."../z".dim = 2', r"latents: expected names in lower case"),
    "name of a method": ("latents.keys.dim = 2", r"latents: expected names .*ModuleDict; got 'keys'"),
    "unknown parent": (Z + 'latents.z.given = ["w"]', r"latents\.z\.given: expected names among .*; got \"w\""),
    "cycle": (
        'latents.a = { dim = 2, given = ["b"] }\nlatents.b = { dim = 2, given = ["a"] }',
        r"latents: .*cycle among a, b",
    ),
    "guide that ignores x": (Z + "latents.z.posterior.given = []", r"latents: expected at least one .* given 'x'"),
    "unread latent": (
        'latents.a.dim = 2\nlatents.b.dim = 2\ndecoder.given = ["a"]',
        r"decoder\.given: expected every latent read .*b is not",
    ),
    "prior that cannot read parents": (
        'latents.a.dim = 2\nlatents.b = { dim = 2, given = ["a"] }', r"latents\.b\.prior: .*conditional_normal",
    ),
    "prior without parents": (Z + 'latents.z.prior = "conditional_normal"', r"latents\.z\.given"),
    "misspelt tag": (Z + 'data.sorce = "npz"', r"data\.source: .*got none \(is 'sorce' meant to be 'source'\?\)"),
    "one table too high": (Z + "epochs = 3", r"epochs: .*did you mean 'train\.epochs'"),
    "one table too high, inside": (Z + "train.lr = 3", r"train\.lr: .*did you mean 'train\.optimizer\.lr'"),
    "floor above ceiling": (
        Z + "latents.z.posterior.log_variance = [2.0, -2.0]",
        r"latents\.z\.posterior\.log_variance: expected a floor below a ceiling.*got \[2\.0, -2\.0\]",
    ),
    "free bits under iwae": (
        Z + 'objective = { kind = "iwae", free_bits = 1.0 }', r"objective: expected free_bits = 0 with iwae",
    ),
    "absurd size": ("latents.z.dim = 10_000_000", r"latents\.z\.dim: expected less than or equal to 100000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_declarations_name_path_expectation_finding(case: str) -> None:
    """FAULTS 34, 35, 45."""
    text, message = BAD[case]
    with pytest.raises(DeclarationError, match=message) as caught:
        Experiment.from_toml(text, "file.toml")
    assert all(line.startswith("file.toml: ") for line in caught.value.problems)
    assert caught.value.exit_code == 2


def test_all_findings_in_one_pass() -> None:
    raw = {"latents": {"z": {"dim": "2", "pior": 1}}, "train": {"epochs": 0, "optimizer": {"kind": "adm"}}}
    with pytest.raises(DeclarationError) as caught:
        Experiment.from_dict(raw)
    found = [problem.split(": ")[1] for problem in caught.value.problems]
    assert sorted(found) == ["latents.z.dim", "latents.z.pior", "train.epochs", "train.optimizer.kind"]


def test_overrides_of_an_experiment_forget_defaults_of_the_old_kind() -> None:
    experiment = Experiment.load("vae").with_overrides("objective.kind=iwae", "train.schedule.kind=linear")
    assert experiment.objective.particles == 8  # type: ignore[attr-defined]
    assert experiment == Experiment.load("vae", ["objective.kind=iwae", "train.schedule.kind=linear"])
    plain = Experiment.from_dict(BASE).with_overrides("train.optimizer.lr=0.1", "decoder.network.hidden=[7]")
    assert plain.train.optimizer.lr == 0.1
    assert plain.decoder.network.hidden == (7,)  # type: ignore[attr-defined]
    linear = Experiment.load("vae", ["objective.beta=0.5", "objective.beta.kind=linear"])
    assert linear.objective.beta.kind == "linear"


# ---------------------------------------------------------------------- hostile files

HOSTILE: dict[str, tuple[bytes, str]] = {
    "deep nesting": (b"a = " + b"[" * 5000 + b"]" * 5000, "nested levels|valid TOML"),
    "5000 digits": (b"seed = " + b"9" * 5000, "valid TOML"),
    "byte order mark": (b"\xef\xbb\xbfname = 'a'", "byte order mark"),
    "latin-1": ("name = 'é'".encode("latin-1"), "UTF-8"),
    "duplicate key": (b"name = 'a'\nname = 'b'", "valid TOML"),
    "too large": (b"#" * (toml.SIZE_CAP + 1), "1 MiB"),
    "YAML tag": (b"name: !!python/object:os.system ls", "valid TOML"),
    "not text": (bytes(range(256)), "UTF-8|valid TOML"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=list(HOSTILE))
def test_hostile_toml(tmp_path: Path, case: str) -> None:
    """FAULTS 33."""
    content, message = HOSTILE[case]
    path = tmp_path / "spec.toml"
    path.write_bytes(content)
    with pytest.raises(DeclarationError, match=message):
        Experiment.load(path)


def test_files_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_bytes(b"[latents.z]\r\ndim = 2\r\n")  # with the line ends of Windows
    found = Experiment.load(path)
    assert (found.name, found.latents["z"].dim) == ("w", 2)
    with pytest.raises(DeclarationError, match="did you mean 'vae_normal'"):
        Experiment.load("vae_norml")


# ---------------------------------------------------------------------- overrides

OVERRIDES: dict[str, tuple[str, str, object]] = {
    "number": ("train.epochs=7", "train.epochs", 7),
    "bare text": ("data.source=fashion_mnist", "data.source", "fashion_mnist"),
    "quoted text": ('name="a b"', "name", "a b"),
    "table": ('decoder.likelihood={kind="poisson"}', "decoder.likelihood.kind", "poisson"),
    "list": ("encoder.network.hidden=[5, 6]", "encoder.network.hidden", (5, 6)),
    "a new kind forgets foreign keys": ("encoder.network.kind=conv", "encoder.network.kind", "conv"),
    "shorthand": ("objective.beta=0.5", "objective.beta.value", 0.5),
    "a new table": ("train.clip_norm=3", "train.clip_norm", 3.0),
    "a new source keeps what it shares": ("data.source=fashion_mnist", "data.binarize", "dynamic"),
}


@pytest.mark.parametrize("case", OVERRIDES, ids=list(OVERRIDES))
def test_overrides(case: str) -> None:
    text, path, value = OVERRIDES[case]
    found: Any = Experiment.load("vae", [text])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_broken_overrides_are_all_named() -> None:
    with pytest.raises(DeclarationError) as caught:
        Experiment.load("vae", ["epochs", "=3", "train..x=1"])
    assert len(caught.value.problems) == 3
    with pytest.raises(DeclarationError, match=r"train\.epohcs: .*'epochs'"):
        Experiment.load("vae", ["train.epohcs=3"])


# ---------------------------------------------------------------------- schema, read-back, plugins


def test_schema_accepts_the_zoo_and_refuses_what_pvae_refuses() -> None:
    schema = json.loads(Experiment.schema_json())
    validator = jsonschema.Draft202012Validator(schema)
    for name in zoo.names():
        validator.validate(json.loads(json.dumps(toml.read(zoo.find(name)))))
    assert not validator.is_valid({"latents": {"z": {"dim": 2, "prior": {"kind": "nonsense"}}}})
    assert not validator.is_valid({"latents": {"z": {"dim": 2}}, "trian": {}})
    prior = schema["$defs"]["Latent"]["properties"]["prior"]
    kinds = {member["properties"]["kind"]["const"] for member in prior["oneOf"] if "properties" in member}
    assert {"standard_normal"} <= kinds


def test_read_back() -> None:
    text = formulas(Experiment.load("hvae"))
    assert text["model"] == "p(x, z2, z1) = p(z2) p(z1 | z2) p(x | z1, z2)"
    assert text["guide"] == "q(z2, z1 | x) = q(z2 | x) q(z1 | x, z2)"
    assert text["model_latex"] == (r"p(x, z_{2}, z_{1}) = p(z_{2})\, p(z_{1} \mid z_{2})\, p(x \mid z_{1}, z_{2})")
    assert arrows(Experiment.load("hvae").sites(), ["z1", "z2"]) == ["z2", "z2 -> z1", "z1, z2 -> x"]
    holes = {"data": {"source": "npz", "path": "x.npz", "missing": "mask"}, "decoder": {"missingness": "z"}}
    assert formulas(Experiment.from_dict({**BASE, **holes}))["model"] == "p(x, m, z) = p(z) p(x | z) p(m | z)"


def test_notebook_view_is_escaped() -> None:
    """FAULTS 38."""
    view = Experiment.from_dict({**BASE, "name": "<script>", "description": "<b>"})._repr_html_()
    assert "<script>" not in view
    assert "&lt;script&gt;" in view


def test_plugins_come_from_the_command_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_schedule(tmp_path / "my_kinds.py", "test_step")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Schedule, "members", {**Schedule.members})
    declared = {**BASE, "objective": {"beta": {"kind": "test_step"}}}
    with pytest.raises(DeclarationError, match="expected one of"):
        Experiment.from_dict(declared)
    load_plugins(("my_kinds",))
    assert Experiment.from_dict(declared).objective.beta.at(4, 10) == 0.5
    assert "test_step" in Experiment.schema_json()
    with pytest.raises(DeclarationError, match="--import no_such_module"):
        load_plugins(("no_such_module",))


def test_a_kind_belongs_to_one_class() -> None:
    class Family(Component):
        """A family."""

    class One(Family):
        """A member."""

        kind: Literal["one"] = "one"

    with pytest.raises(DeclarationError, match="belongs to"):

        class Other(Family):
            """A second member of the same name."""

            kind: Literal["one"] = "one"

    assert Family.members == {"one": One}


def test_registered_kinds_are_documented_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    families = (Data, Encoder, Likelihood, Network, Objective, Optimizer, Posterior, Prior, Schedule)
    missing = [kind for family in families for kind in family.members if f"`{kind}`" not in readme]
    assert not missing
    assert len(readme.splitlines()) <= 100


SCHEDULES: dict[str, Any] = {
    "constant": 0.3,
    "linear": {"kind": "linear", "start": 2.0, "end": -1.0, "epochs": 3.0},
    "exponential": {"kind": "exponential"},
    "cosine": {"kind": "cosine", "epochs": 30.0},
    "cyclical": {"kind": "cyclical", "start": 1.0, "end": -0.5, "epochs": 4.0},
    "cyclical without a rest": {"kind": "cyclical", "start": 1.0, "end": -0.5, "epochs": 4.0, "ramp": 1.0},
    "cyclical, cut short": {"kind": "cyclical", "start": 1.0, "end": -0.5, "epochs": 40.0},
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_knows_where_it_is_lowest_and_highest(case: str) -> None:
    schedule = Schedule.parse(SCHEDULES[case])
    values = [schedule.at(step / 1000, 10.0) for step in range(10_001)]
    extremes = [schedule.at(moment, 10.0) for moment in schedule.extremes(10.0)]
    assert {SCHEDULES[c]["kind"] for c in SCHEDULES if c != "constant"} | {"constant"} == {*Schedule.members}
    assert min(extremes) == pytest.approx(min(values), abs=1e-3)
    assert max(extremes) == pytest.approx(max(values), abs=1e-3)


def test_zoo_needs_no_torch() -> None:
    code = (
        "import sys; from pvae.experiment import zoo; zoo.entries();"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
