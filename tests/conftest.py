"""Fixtures of every test: validation on, a clean process, caches of its own; and no skipped test in CI."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings
from playwright.sync_api import Browser
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("pvae", deadline=None, derandomize=True)
settings.load_profile("pvae")


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread; no screen; matplotlib's settings and font cache made once for all tests and their children."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PVAE_* variable of the machine, and an empty cache directory; compiled steps are shared by all tests."""
    for name in [name for name in os.environ if name.startswith("PVAE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pvae.training.artefacts.shelf", lambda: Path(tempfile.gettempdir()) / "pvae-tests-compiled")


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


@cache
def find_newer_python() -> str | None:
    """A Python that ArviZ 1 runs on: this one, one on the PATH, or one of pyenv's; None where there is none."""
    names = [f"python3.{minor}" for minor in (12, 13, 14)]
    homes = sorted(map(str, Path.home().glob(".pyenv/versions/3.*/bin/python3")))
    found = filter(None, map(shutil.which, [sys.executable, *names, *homes]))
    # a pyenv shim may lead nowhere, and Debian's Python may lack ensurepip: ask it
    code = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))"
    asked = (name for name in found if subprocess.run([name, "-c", code], capture_output=True).returncode == 0)
    return next(asked, None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    from tests.browser import browser

    with browser() as running:
        yield running


@pytest.fixture(scope="session")
def newer_python() -> str:
    """The Python of the tests marked `python312`."""
    found = find_newer_python()
    assert found is not None
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part 2/5`: the second fifth of the selected tests."""
    parser.addoption("--part", metavar="K/N", help="run the K-th of N parts of the tests that are selected")


@cache
def shared_by(file: str) -> str:
    """Return "zoo" for a file whose tests share runs of the zoo, its name if it keeps things of its own, else ""."""
    text = (Path(__file__).parents[1] / file).read_text() if file.startswith("tests/") else ""
    if re.search(r"from tests\.zoo_runs import .*tiny_run", text):
        return "zoo"
    return file if 'scope="module"' in text or "@cache" in text else ""


class Sharing(LoadScopeScheduling):
    """One worker runs the tests that share something; the largest groups begin, and all other tests follow singly."""

    def _split_scope(self, nodeid: str) -> str:
        return shared_by(nodeid.partition("::")[0]) or nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Sharing:
    return Sharing(config, log)


Ids = dict[str, set[str]]
FAST = pytest.StashKey[tuple[Ids, Ids]]()
"""For each test with `@pytest.mark.fast(...)`: the cases that the mark names, and those that there are."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases that the mark `fast` of their test does not name as slow."""
    if (mark := item.get_closest_marker("fast")) and isinstance(item, pytest.Function):
        test, case = item.nodeid.partition("[")[0], item.callspec.id
        named, found = item.config.stash.setdefault(FAST, ({}, {}))
        named[test] = {*map(str, mark.args)}
        found.setdefault(test, set()).add(case)
        if case not in named[test]:
            item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that need a GPU or a newer Python where there is none, and those of other parts."""
    named, found = config.stash.get(FAST, ({}, {}))
    if not any("::" in argument for argument in config.args):
        lost = {test: sorted(named[test] - found[test]) for test in named if named[test] - found[test]}
        assert not lost, f"expected cases of these tests in their marks `fast`; got {lost}"
    marked = {name: [item for item in items if item.get_closest_marker(name)] for name in ("cuda", "python312")}
    homeless = [] if torch.cuda.is_available() else marked["cuda"]
    homeless += marked["python312"] if marked["python312"] and find_newer_python() is None else []
    config.hook.pytest_deselected(items=homeless)
    items[:] = [item for item in items if item not in homeless]
    if part := config.getoption("part"):
        k, n = map(int, part.split("/"))
        chosen = sorted(items, key=lambda item: item.nodeid)[k - 1 :: n]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: there, everything can be had."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("\nExpected no skipped test in CI; see the reasons below.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
