"""What must hold of any declaration and any bytes: built, trained and read back, or refused by a typed error."""

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image
from torch import Tensor
from torch.distributions import constraints

import pvae
from pvae.data import Data, Dataset, load
from pvae.data.rows.columns import Column
from pvae.data.sources.tabular import FrameSource
from pvae.errors import DataError, DeclarationError, DeviceError, NonFiniteError, PvaeError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Train
from pvae.runs import checkpoint
from pvae.runs.run import Run
from pvae.runs.rundir import list_runs
from pvae.training.fit import passed_source
from pvae.util.files import sealed
from tests.drawn import Drawn, Raw, damaged
from tests.strange import seeds_of_sources

LOCATED = re.compile(r"(\S+: (?s:.)*e|E)xpected (?s:.)+; got:? (?s:.)+")
"""A dotted path (after the file's name where there is one), what was expected, what was found; without a path, what is
too large as a whole."""


def require_located(error: DeclarationError, origin: str = "") -> None:
    """Every problem begins with its path and says what was expected and what was found."""
    for problem in error.problems:
        if not LOCATED.fullmatch(problem.removeprefix(f"{origin}: ")):
            raise AssertionError(f"no path, expectation or finding: {problem}") from error


def data_for(experiment: Experiment, drawn: Drawn) -> Dataset:
    """Rows that the likelihood can score; or rows that are drawn without a look at it."""
    generator = torch.Generator().manual_seed(drawn.seed)
    if isinstance(experiment.data, FrameSource):
        frame = {name: cells(column, drawn, i) for i, (name, column) in enumerate(experiment.data.columns.items())}
        return Dataset.from_frame(pandas.DataFrame(frame), declared=experiment.data)
    binarize = experiment.data.binarize != "none"
    support = constraints.unit_interval if binarize else elementwise(experiment.decoder.support)
    x = rows_in(support, (drawn.rows, *drawn.shape), generator, drawn.fitting)
    y = None
    for covariate in experiment.covariates.values():
        y = torch.randint(covariate.labels if drawn.fitting else 5, (drawn.rows,), generator=generator)
    return Dataset.from_tensors(x, y, declared=passed_source(experiment))  # type: ignore[arg-type]


def cells(column: Column, drawn: Drawn, number: int) -> list[Any]:
    """What a column of a table may hold; the first cell is empty where it may be."""
    random = np.random.default_rng((drawn.seed, number))
    found: list[Any] = list(random.choice(column.words or ("0", "1"), drawn.rows))
    if not column.words:
        tries = random.normal(size=drawn.rows), random.uniform(0.1, 0.9, drawn.rows), random.poisson(2.0, drawn.rows)
        found = next((list(x) for x in tries if bool(column.inside(x.astype(np.float64)).all())), found)
    return [None, *found[1:]] if column.missing == "mask" else found


def elementwise(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint of one element of an event."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def rows_in(
    support: constraints.Constraint, shape: tuple[int, ...], generator: torch.Generator, fitting: bool
) -> Tensor:
    """Random numbers in a support: normal, uniform, or small whole numbers, whichever it takes."""
    even = torch.rand(shape, generator=generator)
    for x in (torch.randn(shape, generator=generator), even, even.round(), (even * 3).floor()):
        if not fitting or bool(support.check(x).all()):
            return x
    return (even * 20).floor() / 20 + 1


def try_declaration(drawn: Drawn, folder: Path) -> str:
    """Refused with paths; or built, trained and read back as it was. Returns what became of it."""
    try:
        experiment = Experiment.from_dict(drawn.raw, "drawn")
    except DeclarationError as error:
        require_located(error, "drawn")
        return "refused"
    if Experiment.from_toml(experiment.to_toml()) != experiment:
        raise AssertionError("the declaration does not round-trip")
    experiment = shortened(experiment)
    try:
        data = data_for(experiment, drawn)
        run = pvae.fit(experiment, data=data, run_dir=folder, device="cpu", progress=False)
    except DeclarationError as error:
        require_located(error)
        return "refused by its data's shape"
    except DataError as error:
        if "xpected" not in str(error):
            raise
        return "data refused"
    except NonFiniteError:
        return "not finite"
    except DeviceError:
        return "out of memory"
    require_read_back(run, run.data)
    return "trained"


def shortened(experiment: Experiment) -> Experiment:
    """The experiment with few epochs and turns: what is declared to take a year is no hang."""
    short: dict[str, Any] = {"train": _few_epochs(experiment.train)}
    if experiment.refit is not None:
        short["refit"] = experiment.refit.model_copy(update={"train": _few_epochs(experiment.refit.train)})
    turns = getattr(experiment.objective, "critic_steps", 1)
    if turns > FEW:
        short["objective"] = experiment.objective.model_copy(update={"critic_steps": FEW})
    return experiment.model_copy(update=short)


def _few_epochs(train: Train) -> Train:
    return train.model_copy(update={"epochs": min(train.epochs, FEW)})


FEW = 2


def require_read_back(run: Run, data: Dataset) -> None:
    """From disk come the same declaration and the same weights, and from one seed the same figures, bit for bit."""
    again = Run.load(run.path, data=data)
    if again.plan != run.plan:
        raise AssertionError("the run's declaration is another one")
    weights = run.pair.state_dict()
    if set(weights) != set(again.pair.state_dict()):
        raise AssertionError("the run's weights have other names")
    for name, value in again.pair.state_dict().items():
        if not same_bits(value, weights[name]):
            raise AssertionError(f"{name} is not what was saved")
    x, measure = data.test.x[:8], run.plan.objective.measure
    if repr(measure(run.pair, x, 1)) != repr(measure(again.pair, x, 1)):
        raise AssertionError("the same seed gives other figures")
    if problems := [] if run.pair.implicit else run.fresh_pair().check(x[:3]):
        raise AssertionError(f"the pair is not sound: {'; '.join(map(str, problems))}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN and all."""
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


# ---------------------------------------------------------------------- bytes

TOKENS = (
    b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xff", b"\x80\x04\x95", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000,
    b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x00\x00\x00\x00", b"NaN", b"Infinity", b"1e999", b"-1",
    b"null", b"true", b'"', b"\r\n", b"../../etc/passwd", b"\\ud800", b"<html>", b"=1+1", b",,,,", b"a" * 1000,
)  # fmt: skip
"""What turns up in files that are not what their name says: other encodings, depths, lengths and numbers."""


@st.composite
def mangled(draw: DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A real file with one to four things done to it, or bytes of no kind at all."""
    if draw(st.integers(0, 9)) == 9:
        return draw(st.binary(max_size=300))
    content = draw(st.sampled_from(seeds))
    if draw(st.booleans()) and (table := _table(content)) is not None:
        return json.dumps(damaged(draw, table)).encode()
    for _ in range(draw(st.integers(1, 4))):
        content = _mangle(draw, content, draw(st.sampled_from(seeds)))
    return content


def _table(content: bytes) -> dict[str, Any] | None:
    """The JSON object that a file holds, if it does."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _mangle(draw: DrawFn, content: bytes, other: bytes) -> bytes:
    """One thing done to bytes, in places that hypothesis can move towards the start."""
    start = draw(st.integers(0, len(content)))
    stop = min(len(content), start + draw(st.integers(1, 64)))
    way = draw(st.sampled_from(("flip", "flip", "truncate", "repeat", "splice", "cut", "token", "overwrite")))
    if way == "flip" and stop > start:
        return content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]
    if way == "truncate":
        return content[:start]
    if way == "repeat":
        return content[:stop] + content[start:]
    if way == "splice":
        return content[:start] + other[draw(st.integers(0, len(other))) :]
    if way == "cut":
        return content[:start] + content[stop:]
    token = draw(st.sampled_from(TOKENS))
    return content[:start] + token + content[start + (len(token) if way == "overwrite" else 0) :]


Reader = Callable[[Path, bytes], object]
"""Puts bytes where they are read from, below a folder of its own, and reads them."""


@dataclass(frozen=True)
class Surface:
    """A place where pvae reads bytes that others wrote.

    Arguments:
        seeds: real files.
        read: reads others in their place.
    """

    seeds: tuple[bytes, ...]
    read: Reader


def try_bytes(surface: Surface, content: bytes, folder: Path) -> str:
    """Read, or refused by a typed error with a message."""
    try:
        surface.read(folder, content)
    except PvaeError as error:
        if not str(error).strip():
            raise AssertionError("a typed error without a message") from error
        return "refused"
    return "read"


def surfaces(home: Path) -> dict[str, Surface]:
    """Every place where bytes are read, with real files of each kind made in an empty folder."""
    run = _small_run(home)
    found = {f"source {name}": surface for name, surface in _sources(home).items()}
    found["declaration"] = Surface(tuple(zoo.find(name).read_bytes() for name in zoo.names()), _read_declaration)
    for name in ("spec.toml", "manifest.json", "status.json", "metrics.jsonl", "events.jsonl"):
        found[f"run {name}"] = Surface((_steady((run / name).read_bytes()),), partial(_read_run, run, name))
    saved = max((run / "checkpoints").glob("step-*"))
    for path in saved.iterdir():
        found[f"checkpoint {path.name}"] = Surface((path.read_bytes(),), partial(_read_checkpoint, saved, path.name))
        if path.name != "manifest.json":
            found[f"sealed {path.name}"] = Surface((path.read_bytes(),), partial(_resume, run, saved.name, path.name))
    return found


CHANGING = re.compile(
    rb'("(?:seconds|time|started|heartbeat|host|platform|birth|id|pid|commit|best|elbo|kl|kl/z|reconstruction|loss)": )'
    rb'("[^"]*"|-?[0-9.e-]+)'
    rb'|("argv": )(\[[^]]*\])'
)
"""What differs from run to run and from machine to machine."""


def _steady(content: bytes) -> bytes:
    """A file of JSON with nothing in it that differs, so that the same bytes are drawn everywhere."""
    return CHANGING.sub(_in_place, content)


def _in_place(found: re.Match[bytes]) -> bytes:
    if found[3]:
        return found[3] + b"[]"
    return found[1] + (b'"0"' if found[2].startswith(b'"') else b"0.5")


def _small_run(home: Path) -> Path:
    raw = {
        "data": {"source": "toy", "rows": 30}, "latents": {"z": {"dim": 2}}, "train": {"epochs": 1},
        "encoder": {"network": {"kind": "mlp", "hidden": [3]}}, "decoder": {"network": {"kind": "mlp", "hidden": [3]},
        "likelihood": "normal"},
    }  # fmt: skip
    run = pvae.fit(Experiment.from_dict(raw), run_dir=home / "runs", device="cpu", progress=False)
    run.files.log_event("note", "as it should be")
    run.files.update_status(state="interrupted")
    return run.path


def _read_declaration(folder: Path, content: bytes) -> None:
    path = folder / "declared.toml"
    path.write_bytes(content)
    Experiment.load(path)


def _copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "runs" / run.parent.name / run.name))


def _read_run(run: Path, name: str, folder: Path, content: bytes) -> None:
    """All that a listing, a report and a reader ask of a run."""
    path = _copied(run, folder)
    (path / name).write_bytes(content)
    list_runs(folder / "runs")
    found = Run.load(path)
    for ask in (lambda: found.plan, lambda: found.metrics, found.files.events, lambda: found.pair, lambda: repr(found)):
        ask()
    if name == "manifest.json" and found.files.manifest.get("engine") in ("eager", None):
        pvae.resume(path, device="cpu", progress=False)
    found.files.log_event("note", "written after it")
    found.files.update_status(state="interrupted")


def _read_checkpoint(saved: Path, name: str, folder: Path, content: bytes) -> None:
    path = Path(shutil.copytree(saved, folder / saved.name))
    (path / name).write_bytes(content)
    checkpoint.read(path)


def _resume(run: Path, saved: str, name: str, folder: Path, content: bytes) -> None:
    """A checkpoint whose sums are right, and whose content is not: what a hostile or foreign writer could hand on."""
    path = _copied(run, folder)
    for other in (path / "checkpoints").iterdir():
        if other.name != saved:
            shutil.rmtree(other)
    (path / "checkpoints" / saved / name).write_bytes(content)
    manifest = path / "checkpoints" / saved / "manifest.json"
    table = json.loads(manifest.read_text())
    table["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest.write_text(json.dumps(sealed(table)))
    found = Run.load(path)
    if found.checkpoint.state.get("epoch", 0) in (0, 1):  # else it would rightly train for as long as it says
        pvae.resume(path, device="cpu", progress=False)


# ---------------------------------------------------------------------- data


def _sources(home: Path) -> dict[str, Surface]:
    """A row for every source that reads a file: a table that names it, and real files of its kind."""
    x = np.arange(120, dtype=np.float32).reshape(40, 3) % 7
    table = pandas.DataFrame({"a": x[:, 0], "b": ["u", "v"] * 20})
    columns = {"a": {"type": "continuous"}, "b": {"type": "categorical", "levels": ["u", "v"]}}
    idx = bytes([0, 0, 8, 2, 0, 0, 0, 40, 0, 0, 0, 3]) + x.astype(np.uint8).tobytes()
    rows: dict[str, tuple[Raw, tuple[bytes, ...]]] = {
        "npz": ({}, (_written(np.savez, x=x, y=x[:, 0]), _written(np.savez_compressed, x=x))),
        "npy": ({}, (_written(np.save, x), _written(np.save, x.astype(">i8")))),
        "idx": ({}, (idx, gzip.compress(idx, mtime=0))),
        "csv": ({"columns": columns}, (table.to_csv(index=False).encode(),)),
        "parquet": ({"columns": columns}, (table.to_parquet(),)),
    }
    found = {
        name: Surface(seeds, partial(_load, {"source": name, "path": f"file.{name}", **extra}, f"file.{name}"))
        for name, (extra, seeds) in rows.items()
    }
    pictures = tuple(
        _written(lambda to, i=i: Image.fromarray(x[i : i + 9].astype(np.uint8)).save(to, "PNG")) for i in range(9)
    )
    found["images"] = Surface(pictures[:1], partial(_load_images, pictures))
    for name, (file, declared, seeds) in seeds_of_sources().items():
        whole = {**declared, "path": file.partition("/")[0]}
        beside = {f"{Path(file).parent}/{i}.png": picture for i, picture in enumerate(pictures)} if "/" in file else {}
        found[name] = Surface(seeds, partial(_load, whole, file, beside=beside))
    return found


def _written(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    stream = BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _load_images(pictures: tuple[bytes, ...], folder: Path, content: bytes) -> None:
    """A folder of sound images, and one that is not."""
    for i, picture in enumerate((*pictures[1:], content)):
        _put(folder, f"images/{i}.png", picture)
    load(Data.parse({"source": "images", "path": "images", "mode": "L"}), data_dir=folder)


def _load(table: Raw, name: str, folder: Path, content: bytes, beside: Mapping[str, bytes] | None = None) -> None:
    """A file, with sound ones beside it."""
    for other, sound in {**(beside or {}), name: content}.items():
        _put(folder, other, sound)
    load(Data.parse(table), data_dir=folder)
