"""Importing pvae is cheap and changes nothing outside itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pvae

ROOT = Path(__file__).parents[1]

HEAVY = ("arviz", "matplotlib", "numpy", "pandas", "pydantic", "pyro", "scipy", "sklearn", "torch", "xarray")

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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pvae.nonsense
