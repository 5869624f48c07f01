"""Importing pvae is cheap and changes nothing outside itself."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Set
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import pvae
from pvae.component import Component

ROOT = Path(__file__).parents[1]

HEAVY = ("arviz", "jinja2", "matplotlib", "numpy", "pandas", "pydantic", "pyro", "scipy", "sklearn", "torch", "xarray")

# Third-party modules set warnings filters of their own on import, so they come first, before the snapshot.
IMPORT_EVERYTHING = """
import json, pkgutil, sys, warnings
import filelock, h5netcdf, jinja2, matplotlib.pyplot, pandas, platformdirs, pooch, pydantic, pyro, pyro.infer
import rich, safetensors.torch, scipy.special, scipy.stats, sklearn.cluster, sklearn.datasets, sklearn.decomposition
import tomli_w, torch, torch._dynamo, torch.export, torch.optim.swa_utils, typer, xarray

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "warnings filters": [str(f) for f in warnings.filters],
        "Pyro settings": {name: str(value) for name, value in pyro.settings.get().items()},
        "param store": sorted(pyro.get_param_store()),
        "gradients": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().sum().item(),
        "matplotlib backend and style": sorted(map(str, matplotlib.rcParams.items())),
        "threads": torch.get_num_threads(),
    }

def fail(name):
    raise

before = state()
import pvae
modules = [m.name for m in pkgutil.walk_packages(pvae.__path__, "pvae.", onerror=fail) if m.name != "pvae.__main__"]
for name in modules:
    __import__(name)
after = state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"modules": modules, "changed": changed}))
"""


def fresh(code: str) -> str:
    """What `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pvae_loads_nothing_heavy():
    loaded = fresh("import sys, pvae; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert "pvae" in loaded
    assert not set(HEAVY) & set(loaded)


def test_importing_every_module_changes_no_global_state():
    found = json.loads(fresh(IMPORT_EVERYTHING))
    assert {"pvae.models", "pvae.guides", "pvae.analysis", "pvae.data"} <= set(found["modules"])
    assert found["changed"] == {}


@pytest.mark.parametrize("name", pvae.__all__)
def test_public_name_resolves(name):
    assert getattr(pvae, name) is not None
    assert name in dir(pvae)


def room_of(module: str) -> str:
    """The folder that holds a module of pvae; a module on the ground floor of `pvae/` is a room of its own."""
    folder, _, _ = module.rpartition(".")
    return module if folder == "pvae" else folder


def imported(tree: ast.Module, modules: Set[str]) -> Iterator[str]:
    """The modules of pvae that a module imports when it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pvae":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from. An `__init__` is a front door: what it re-exports makes no arrow."""
    files = {}
    for path in sorted(walk(ROOT / "pvae")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts)] = path
    modules = {name.removesuffix(".__init__") for name in files}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        if name.endswith(("__init__", "__main__")) or ".results." in name:
            continue
        room = room_of(name)
        found.setdefault(room, set())
        for other in imported(ast.parse(path.read_text()), modules):
            there = room_of(other) if f"{other}.__init__" not in files else other
            if there not in (room, "pvae"):
                found[room].add(there)
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Every Python file below a folder, through the three links."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from walk(path)
        elif path.suffix == ".py":
            yield path


def test_rooms_import_one_way():
    rooms = arrows()
    order = list(TopologicalSorter(rooms).static_order())  # CycleError names the rooms of a circle
    assert len(order) > 20
    assert sum(map(len, rooms.values())) > 100
    other_side = {"models": "guides", "guides": "models"}
    for room, others in rooms.items():
        assert other_side.get(room.split(".")[1]) not in {other.split(".")[1] for other in others}, room


RIDDLES = re.compile(r"(What|Whether|Of|How|Whence|Most|Where)\b")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the package, read."""
    for path in sorted(walk(ROOT / "pvae")):
        yield path, ast.parse(path.read_text())


def test_no_folder_and_no_file_grows_too_large():
    files = [path for path, _ in sources()]
    folders = Counter(path.parent for path in files if path.stem not in ("__init__", "__main__"))
    assert {str(folder): count for folder, count in folders.items() if count > 15} == {}
    lines = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > 350} == {}
    assert len(files) > 200


def test_a_class_name_stands_for_one_class():
    names = Counter(node.name for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_no_member_of_a_family_is_a_subclass_of_another():
    families = [kind for kind in subclasses(Component) if kind.is_family()]
    assert len(families) >= 10
    members = [member for family in families for member in family.members.values()]
    assert {member.__name__: found for member in members if (found := list(subclasses(member)))} == {}


def subclasses(kind: type) -> Iterator[Any]:
    """All classes below a class."""
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_a_docstring_opens_with_a_verb_or_a_noun():
    found = [
        f"{path}: {first}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and RIDDLES.match(first := (ast.get_docstring(node) or "").partition("\n")[0])
    ]
    assert found == []


def methods() -> Iterator[tuple[str, type, Any]]:
    """Every public method and property that a class of pvae defines itself."""
    for found in pkgutil.walk_packages(pvae.__path__, "pvae."):
        if found.name == "pvae.__main__":
            continue
        for cls in vars(importlib.import_module(found.name)).values():
            if inspect.isclass(cls) and cls.__module__ == found.name and not cls.__name__.startswith("_"):
                declared = inspect.get_annotations(cls)  # the default of such a field may be a function
                for name, member in vars(cls).items():
                    member = getattr(member, "__func__", member)
                    if name.startswith("_") or name in declared:
                        continue
                    if inspect.isfunction(member) or isinstance(member, property):
                        yield name, cls, member


def test_every_public_method_is_documented_where_it_is_first_defined():
    checked = 0
    for name, cls, member in methods():
        if any(hasattr(base, name) for base in cls.__mro__[1:]):
            continue
        checked += 1
        assert member.__doc__, f"{cls.__module__}.{cls.__name__}.{name} has no docstring and overrides none"
    assert checked > 300


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pvae.nonsense
