"""What every test gets: validation on, a clean process, its own caches; and no skipped test in CI."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings

settings.register_profile("pvae", deadline=None, derandomize=True)
settings.load_profile("pvae")


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two threads; no screen; matplotlib's settings and font cache made once for all tests and their children."""
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PVAE_* variable of the machine, and an empty cache directory."""
    for name in [name for name in os.environ if name.startswith("PVAE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Start with validation on and one seed; fail the test that leaves global state behind."""
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    left = [f"the global param store holds {name!r}" for name in pyro.get_param_store()]
    if torch.get_default_dtype() != torch.float32:
        left.append(f"torch's default dtype is {torch.get_default_dtype()}")
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    if left:
        pytest.fail(f"Expected a test that cleans up; got: {'; '.join(left)}.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    homeless = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=homeless)
    items[:] = [item for item in items if item not in homeless]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: there, everything can be had."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("\nExpected no skipped test in CI; see the reasons below.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
