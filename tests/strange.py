"""Files that are right but strange, and run directories that were tampered with: what must become of them."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import tomllib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import scipy.io
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image
from safetensors.numpy import load as unpack, save as pack

import pvae
from pvae.component import from_table
from pvae.data import Data, load
from pvae.errors import PvaeError
from pvae.runs.run import Run
from tests.data.writers import h5ad, hdf5, idx_bytes, matlab

Spec = dict[str, Any]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
SUFFIX = {"1": "png", "L": "png", "LA": "png", "P": "gif", "RGB": "bmp", "RGBA": "png", "CMYK": "tif", "YCbCr": "jpg",
          "LAB": "tif", "I;16": "png", "I": "tif", "F": "tif"}  # fmt: skip
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


# ---------------------------------------------------------------------- files that are right


@st.composite
def files(draw: DrawFn) -> Spec:
    """A file of any source with numbers in it, and how it is written."""
    kind = draw(st.sampled_from(("npz", "npy", "idx", "hdf5", "mat", "h5ad", "csv", "csv", "parquet", "images")))
    whole, flag = st.integers(0, 2**16), st.booleans()
    return {
        "kind": kind, "seed": draw(whole), "rows": 3 + draw(whole) % 22, "width": 1 + draw(whole) % 5,
        "dtype": draw(st.sampled_from(("f4", "f8", "u1", "i8", ">f4", ">i2", "?", "f2"))),
        "stream": draw(flag), "last": draw(flag), "version": draw(st.sampled_from(("4", "5", "7.3"))),
        "decimal": draw(st.sampled_from(".,")), "thousands": draw(st.sampled_from(("", ",", ".", " ", "'"))),
        "separator": draw(st.sampled_from((",", ";", "\t", "|"))), "header": draw(flag),
        "encoding": draw(st.sampled_from(("utf-8", "cp1252", "utf-16"))), "packer": draw(st.sampled_from([*PACKERS])),
        "mode": draw(st.sampled_from(MODES)), "holes": draw(whole) % 4, "fortran": draw(flag), "zipped": draw(flag),
    }  # fmt: skip


def try_file(spec: Spec, folder: Path) -> str:
    """Write the file, read it; every number that is read must be one that was written, in its row."""
    random = np.random.RandomState(spec["seed"])
    x = (random.standard_normal((spec["rows"], spec["width"])) * 3000).round(2)
    write = {"csv": _table, "parquet": _table, "images": _images}.get(spec["kind"], _array)
    declared, want = write(spec, x, folder)
    try:
        data = load(from_table(Data, declared, "drawn"), data_dir=folder)  # type: ignore[type-abstract]
        found = np.concatenate([split.x.numpy().reshape(len(split), -1) for split in data.splits])
    except PvaeError as error:
        if "xpected" not in str(error):
            raise AssertionError(f"an error without an expectation: {error}") from error
        return "refused"
    if want is None:
        return "read, with a remark" if data.notes else "read"
    wanted = np.asarray(want, np.float32).reshape(len(want), -1)
    if found.shape != wanted.shape or not np.array_equal(_sorted(found), _sorted(wanted), equal_nan=True):
        raise AssertionError(f"read {found[:3]} for {wanted[:3]}")
    return "read right"


def _sorted(x: np.ndarray) -> np.ndarray:
    return x[np.lexsort(np.nan_to_num(x, nan=1e30).T)]


def _array(spec: Spec, x: np.ndarray, folder: Path) -> tuple[Spec, np.ndarray]:
    """Write an array in a binary format."""
    kind, name = spec["kind"], f"x.{spec['kind']}"
    kept = (x > 0 if spec["dtype"] == "?" else np.abs(x) % 200 if spec["dtype"] == "u1" else x).astype(spec["dtype"])
    declared = {"source": kind, "path": name, "stream": spec["stream"]}
    path = folder / name
    if kind == "npz":
        (np.savez_compressed if spec["zipped"] else np.savez)(path, x=kept)
    elif kind == "npy":
        np.save(path, np.asfortranarray(kept) if spec["fortran"] else kept)
    elif kind == "idx":
        kept = (np.abs(x) % 200).astype(np.uint8)
        path.write_bytes((gzip.compress if spec["zipped"] else bytes)(idx_bytes(kept)))
    elif kind == "h5ad":
        kept = kept.astype(np.float32)
        h5ad(path, scipy.sparse.csr_array(kept) if spec["zipped"] else kept, pandas.DataFrame({"a": range(len(x))}))
    else:
        declared["rows"] = "last" if spec["last"] else "first"
        stored = kept.T if spec["last"] else kept
        if kind == "hdf5":
            hdf5(path, x=stored)
        elif spec["version"] == "7.3":
            matlab(path, x=stored)
        else:
            scipy.io.savemat(path, {"x": stored}, format=spec["version"])
    return declared, kept


def _table(spec: Spec, x: np.ndarray, folder: Path) -> tuple[Spec, np.ndarray | None]:
    """Write a table of numbers, with some words for missing ones."""
    names = [f"c{i + 1}" for i in range(x.shape[1])]
    columns = {name: {"type": "continuous", "transform": "none", "missing": "mask"} for name in names}
    for i in range(min(spec["holes"], len(x))):
        x[i, i % x.shape[1]] = np.nan
    if spec["kind"] == "parquet":
        frame = pandas.DataFrame(x, columns=names)
        (frame.astype(str) if spec["zipped"] else frame).to_parquet(folder / "x.parquet")
        return {"source": "parquet", "path": "x.parquet", "columns": columns, "stream": spec["stream"]}, x
    marks = {ord(","): spec["thousands"] or None, ord("."): spec["decimal"]}
    lines = [["" if np.isnan(v) else f"{v:,.2f}".translate(marks) for v in row] for row in x]
    quoted = [[f'"{word}"' if spec["separator"] in word or not word else word for word in row] for row in lines]
    text = "\n".join(spec["separator"].join(row) for row in ([names] if spec["header"] else []) + quoted) + "\n"
    name = f"x.csv{spec['packer']}"
    (folder / name).write_bytes(PACKERS[spec["packer"]](text.encode(spec["encoding"])))
    keys = ("decimal", "thousands", "separator", "encoding", "header", "stream")
    return {"source": "csv", "path": name, "columns": columns, **{key: spec[key] for key in keys}}, x


def _images(spec: Spec, x: np.ndarray, folder: Path) -> tuple[Spec, None]:
    """Write pictures of one mode into a folder."""
    random = np.random.RandomState(spec["seed"])
    for i in range(len(x)):
        pixels = random.randint(0, 256, (5, 4, 4)).astype(np.uint8)
        picture = Image.fromarray(pixels, "RGBA")
        deep = spec["mode"] in ("I;16", "I", "F")
        if deep:
            picture = Image.fromarray(pixels[..., 0].astype({"I;16": "u2", "I": "i4", "F": "f4"}[spec["mode"]]))
        elif spec["mode"] in ("LAB", "YCbCr"):
            picture = picture.convert("RGB")
        place = folder / "x" / f"{i}.{SUFFIX[spec['mode']]}"
        place.parent.mkdir(exist_ok=True)
        if spec["mode"] == "LAB":
            picture = Image.frombytes("LAB", (4, 5), pixels[..., :3].tobytes())
        (picture if deep or spec["mode"] == "LAB" else picture.convert(spec["mode"])).save(place)
    return {"source": "images", "path": "x", "mode": "L" if spec["fortran"] else "RGB", "stream": spec["stream"]}, None


# ---------------------------------------------------------------------- runs that were tampered with

TEXTS = ("spec.toml", "manifest.json", "status.json", "metrics.jsonl", "state.json", "checkpoint manifest.json")
VALUES: tuple[Any, ...] = (
    0,
    1,
    -1,
    True,
    None,
    "x",
    "../../etc/passwd",
    1e300,
    [],
    {},
    [1],
    "float64",
    "0" * 64,
    "cuda",
    float("inf"),
)


@st.composite
def tampering(draw: DrawFn) -> Spec:
    """One thing done to a run directory."""
    ways = ("dtype", "link", "cut", "swap", "rename", "grow", "weights", "other", "gone", "stranger")
    return {
        "way": draw(st.sampled_from((*("text", "value") * 3, "drop", *ways))), "file": draw(st.sampled_from(TEXTS)),
        "seed": draw(st.integers(0, 2**16)), "digest": draw(st.booleans()), "value": draw(st.sampled_from(VALUES)),
        "place": draw(st.floats(0, 1)), "dtype": draw(st.sampled_from(("f8", "f2", "i8", "?", "c8"))),
    }  # fmt: skip


class Tampered:
    """Copies of one interrupted run, each with one thing done to it.

    Arguments:
        home: a folder for the run, for a second run of another seed, and for the first one's end.
    """

    def __init__(self, home: Path) -> None:
        raw: Spec = {
            "name": "tiny", "data": {"source": "toy", "rows": 60}, "latents": {"z": {"dim": 2}},
            "train": {"epochs": 4, "batch_size": 16, "engine": "eager", "checkpoint_seconds": 0.0},
            "encoder": {"network": {"kind": "mlp", "hidden": [3]}},
            "decoder": {"network": {"kind": "mlp", "hidden": [3]}, "likelihood": "normal"},
        }  # fmt: skip
        experiment = pvae.Experiment.from_dict(raw)
        whole = pvae.fit(experiment, run_dir=home / "whole", device="cpu", progress=False)
        self.weights = {name: value.clone() for name, value in whole.pair.state_dict().items()}
        self.run, self.other = (self._interrupted(experiment, home / name, i) for i, name in enumerate(("one", "two")))
        self.untouched = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}

    def _interrupted(self, experiment: pvae.Experiment, home: Path, seed: int) -> Path:
        """Return a run that is stopped by a signal in its third epoch."""
        from pvae.training import loop

        step, seen = loop.step, [0]

        def stopping(trainer: Any, index: torch.Tensor) -> bool:
            seen[0] += 1
            if seen[0] == 7:
                loop.interrupt(trainer, 15)
            return step(trainer, index)

        loop.step = stopping
        try:
            pvae.fit(experiment, seed=seed, run_dir=home, device="cpu", progress=False)
        except PvaeError:
            pass
        finally:
            loop.step = step
        return next(home.glob("*/2*"))

    def attempt(self, spec: Spec, folder: Path) -> str:
        """Tamper with a copy, verify it, sample from it, resume it; what is accepted must be what it was."""
        run = folder / "runs" / "tiny" / self.run.name
        shutil.copytree(self.run, run)
        same = not self._tamper(run, spec)
        run = next(iter(sorted((folder / "runs").glob("*/2*")) + sorted((folder / "runs").glob("*/*"))))
        try:
            found = pvae.verify(run, root=folder / "runs")
            seen = not found.ok or bool(found.of("warning"))
        except PvaeError:
            seen = True
        try:
            opened = Run.load(run)
            pvae.analysis.sample(opened, 2)
            resumed = pvae.resume(run, device="cpu", progress=False)
        except PvaeError as error:
            if not str(error).strip():
                raise AssertionError("a typed error without a message") from error
            if same:
                raise AssertionError(f"refused, and nothing was changed: {error}") from error
            return "refused" if seen else "refused, and not by verify"
        weights = resumed.pair.state_dict()
        if weights.keys() != self.weights.keys() or any(
            not torch.equal(weights[k], v) for k, v in self.weights.items()
        ):
            if spec["way"] in ("weights", "other", "swap") and spec["digest"]:
                return "forged"  # with digests of its own: nobody can tell
            raise AssertionError(f"accepted silently, with other weights; verify {'saw it' if seen else 'saw nothing'}")
        if same:
            return "as it was"
        return f"{'seen' if seen else 'not seen'} in {spec['file']}, and as it was"

    def _tamper(self, run: Path, spec: Spec) -> bool:
        """Do one thing to a run; False if it changes nothing that counts."""
        random = np.random.RandomState(spec["seed"])
        saved = sorted((run / "checkpoints").glob("step-*"))[-1]
        inside = spec["file"] in ("state.json", TEXTS[-1])
        path = saved / spec["file"].removeprefix("checkpoint ") if inside else run / spec["file"]
        tensors = saved / "weights.safetensors"
        way = spec["way"]
        if way == "text":
            content = path.read_bytes()
            places = [i for i, byte in enumerate(content) if chr(byte) in "0123456789"]
            at = places[int(spec["place"] * (len(places) - 1))]
            path.write_bytes(content[:at] + str((content[at] - 47) % 10).encode() + content[at + 1 :])
        elif way in ("value", "drop"):
            _edit(path, spec, random)
        elif way == "dtype":
            _repack(tensors, lambda x: x.astype(spec["dtype"]), random)
        elif way == "weights":
            _repack(tensors, lambda x: x + 1, random)
        elif way == "link":
            content = path.read_bytes()
            path.unlink()
            (run.parent / "elsewhere").write_bytes(content)
            path.symlink_to(run.parent / "elsewhere")
        elif way == "cut":
            os.truncate(path, int(spec["place"] * path.stat().st_size))
        elif way == "grow":
            path.write_bytes(path.read_bytes() + b" " * int(9 * spec["place"]) + b"{}")
        elif way == "swap":
            older = sorted((run / "checkpoints").glob("step-*"))[0]
            shutil.copy(older / "weights.safetensors", tensors)
        elif way == "other":
            there = sorted((self.other / "checkpoints").glob("step-*"))[-1]
            name = path.relative_to(run).name
            shutil.copy(self.other / name if path.parent == run else there / name, path)
        elif way == "rename":
            run.rename(run.parent / ("latest" if spec["digest"] else "moved run"))
            return False
        elif way == "gone":
            path.unlink()
        elif way == "stranger":
            (run / "unknown.bin").write_bytes(random.bytes(30))
        if spec["digest"] and way in ("dtype", "weights", "swap", "other"):
            _sealed(saved)
        here = {path: run / path.relative_to(self.run) for path in self.untouched}
        return any(
            p.is_symlink() or not p.is_file() or p.read_bytes() != self.untouched[path] for path, p in here.items()
        )


def _edit(path: Path, spec: Spec, random: np.random.RandomState) -> None:
    """Replace or drop one value of a JSON or TOML file, at any depth."""
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else None
    table: Any = rows if rows is not None else tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    place: Any = table
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = keys[random.randint(len(keys))]
        if not isinstance(place[key], dict | list) or random.rand() < 0.2:
            break
        place = place[key]
    if spec["way"] == "drop":
        del place[key]
    else:
        place[key] = spec["value"]
    if path.suffix == ".toml":
        import tomli_w

        try:
            path.write_text(tomli_w.dumps(table))
        except TypeError:  # null, which TOML has not
            path.write_text(f"{text}\nnull = null\n")
    elif rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(table))


def _repack(path: Path, change: Callable[[np.ndarray], np.ndarray], random: np.random.RandomState) -> None:
    """Change one tensor of a safetensors file."""
    arrays = unpack(path.read_bytes())
    name = sorted(arrays)[random.randint(len(arrays))]
    path.write_bytes(pack({**arrays, name: np.ascontiguousarray(change(arrays[name]))}))


def _sealed(saved: Path) -> None:
    """Write the sums of a checkpoint's files anew, as who wants to deceive would."""
    import hashlib

    table = json.loads((saved / "manifest.json").read_text())
    for name in table["files"]:
        content = (saved / name).read_bytes()
        table["files"][name] |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (saved / "manifest.json").write_text(json.dumps(table))


def seeds_of_sources() -> dict[str, tuple[str, Spec, tuple[bytes, ...]]]:
    """By name: a file's name, its declaration, and real files, for sources whose bytes are mangled."""
    import tempfile

    x = (np.arange(120, dtype=np.float32).reshape(40, 3) % 7).round(1)
    words = pandas.DataFrame({"a": x[:, 0], "b": ["u", "v"] * 20})
    columns = {"a": {"type": "continuous"}, "b": {"type": "categorical", "levels": ["u", "v"]}}
    german = words.to_csv(index=False, sep=";", decimal=",").encode("cp1252")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        scipy.io.savemat(home / "4.mat", {"x": x}, format="4")
        scipy.io.savemat(home / "5.mat", {"x": x, "y": x[:, :1]}, do_compression=True)
        matlab(home / "73.mat", x=x)
        hdf5(home / "x.h5", x=x, **{"deep/y": x[:, 0]})
        h5ad(home / "x.h5ad", scipy.sparse.csr_array(x), pandas.DataFrame({"t": pandas.Categorical(["u", "v"] * 20)}))
        bytes_of = {path.name: path.read_bytes() for path in home.iterdir()}
    modes = []
    for mode in MODES:
        stream = BytesIO()
        deep = {"I;16": "u2", "I": "i4", "F": "f4"}.get(mode)
        picture = Image.fromarray(np.arange(9, dtype=deep or "u1").reshape(3, 3))
        if not deep:
            picture = picture.convert("RGBA" if mode == "RGBA" else "RGB")
            picture = Image.frombytes("LAB", (3, 3), bytes(27)) if mode == "LAB" else picture.convert(mode)
        picture.save(stream, {"png": "PNG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "jpg": "JPEG"}[SUFFIX[mode]])
        modes.append(stream.getvalue())
    german_declared = {"source": "csv", "separator": ";", "decimal": ",", "encoding": "cp1252", "columns": columns}
    return {
        "hdf5": ("x.h5", {"source": "hdf5"}, (bytes_of["x.h5"],)),
        "mat": ("x.mat", {"source": "mat"}, (bytes_of["4.mat"], bytes_of["5.mat"])),
        "mat 7.3": ("x.mat", {"source": "mat"}, (bytes_of["73.mat"],)),
        "h5ad": ("x.h5ad", {"source": "h5ad", "labels": "t"}, (bytes_of["x.h5ad"],)),
        "csv german": ("x.csv", german_declared, (german,)),
        "csv compressed": ("x.csv.gz", german_declared, tuple(pack(german) for pack in PACKERS.values())),
        "csv headless": (
            "x.csv",
            {"source": "csv", "header": False, "columns": {f"c{i}": {"type": "continuous"} for i in (1, 2, 3)}},
            (pandas.DataFrame(x).to_csv(index=False, header=False).encode(),),
        ),
        "images of all modes": ("x/last.png", {"source": "images", "size": [3, 3]}, tuple(modes)),
    }
