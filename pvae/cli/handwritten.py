"""Hand-written pairs on the command line: `FILE.py:NAME` that the user names, with data from --data."""

import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from pvae.data.rows.files import broken_as
from pvae.data.split import Split
from pvae.errors import DataError, DeclarationError, misdeclared, refuse
from pvae.pair.pair import Pair
from pvae.util import Record, replace

PAIR_FILE = re.compile(r"(?P<file>.+\.py):(?P<names>[A-Za-z_]\w*(,[A-Za-z_]\w*)*)", re.ASCII)
"""A pair on the command line: a Python file and the name of a `Pair` in it, or the names of several objects."""


def is_pair_file(text: str) -> bool:
    """Return whether a text names a pair in a Python file, `my_module.py:pair`."""
    return PAIR_FILE.fullmatch(text) is not None


def load_pair(text: str) -> Pair:
    """Return the pair `FILE.py:NAME`.

    Raises:
        DeclarationError: there is no such file, it fails, or there is no `Pair` of that name in it.
    """
    pair, *others = load_names(text)
    misdeclared(others or not isinstance(pair, Pair), "cli.handwritten.no_pair", text=text, pair=pair)
    return pair


def load_names(text: str) -> list[Any]:
    """Return the objects `FILE.py:NAME,NAME`, None for names without one; the user names the file, and it is run once.

    Modules beside the file can be imported, after all others.

    Raises:
        DeclarationError: there is no such file, or it fails.
    """
    found = PAIR_FILE.fullmatch(text)
    path = Path(found["file"]) if found else Path(text)
    if found is None or not path.is_file():
        raise DeclarationError(f"{text}: expected a Python file and the name of a pair in it, my_module.py:pair.")
    spec: Any = importlib.util.spec_from_file_location(f"pvae_pair_{path.stem}", path)  # of .py there is a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        at = f"{path}:{lines[-1]}" if lines else str(path)
        raise DeclarationError(f"{at}: expected a file that runs; got {type(error).__name__}: {error}.") from error
    return [getattr(module, name, None) for name in found["names"].split(",")]


def load_arguments(path: Path | None, pair: Pair | None) -> Any:
    """Return the data of a hand-written pair: the array of a .npy file, or the arrays of a .npz file.

    Several arrays are keyword arguments of the programs, by their names; without a pair there is one, x.

    Raises:
        DataError: there is no such file, it holds no arrays, or their names are not those of the model's arguments.
    """
    if path is None or path.suffix not in (".npy", ".npz") or not path.is_file():
        raise DataError(f"--data: expected a .npz or .npy file with the data of the pair; got {path or 'none'}.")
    with broken_as(f"{path}: expected arrays of numbers; got"), path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        arrays = {name: found[name] for name in found} if path.suffix == ".npz" else {"x": found}
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    known = {"x": None} if pair is None else inspect.signature(pair.model).parameters
    refuse(odd := sorted(arrays.keys() - known.keys()), "cli.handwritten.arrays", path=path, known=known, odd=odd)
    return tensors


class PairOnData(Record):
    """A hand-written pair and rows of data, with what the analyses of the command line ask of a run."""

    path: str
    """The pair as named on the command line."""
    pair: Pair
    rows: torch.Tensor

    @property
    def data(self) -> Self:
        """The data, which has one split."""
        return self

    label_names: ClassVar[None] = None

    def __getattr__(self, name: str) -> Any:
        raise DeclarationError.of("cli.handwritten.no_run", path=self.path)

    def split(self, name: str) -> Split:
        """Return all rows, whatever split is asked for."""
        return Split(name, self.rows)

    def to(self, device: torch.device) -> Self:
        """Return the pair and its data on a device."""
        return replace(self, pair=self.pair.to(device), rows=self.rows.to(device))


def on_data(text: str, data: Path | None) -> PairOnData:
    """Return a pair of a file with the rows of a data file."""
    pair = load_pair(text)
    return PairOnData(text, pair, pair.accept(load_arguments(data, pair)))
