"""Checkpoints: whole or not there, exact, refused when damaged. Numbers are rows of the faults table."""

import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from pvae.errors import CheckpointError, DeclarationError, StorageError
from pvae.runs import checkpoint
from pvae.util.files import sealed

HERE = Path(__file__).parents[2]


def put(folder: Path, step: int, **options: Any) -> Path:  # noqa: ANN401
    tensors = {"weights": {"w": torch.full((3, 4), float(step))}, "optimizer": {}}
    return checkpoint.write(folder, step, tensors, {"epoch": step, "loss": 0.1 + step}, **options)


def latest(folder: Path, **options: Any) -> checkpoint.Checkpoint:
    """The newest checkpoint, where there is one."""
    found = checkpoint.latest(folder, **options)
    assert found is not None
    return found


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: Tensor, right: Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert bits(left) == bits(right)


def forge(path: Path, name: str, content: bytes) -> None:
    """Put other bytes into a file and make the manifest agree: what an attacker or a tool would do."""
    (path / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))


# -- what is written comes back


@pytest.mark.parametrize("dtype", sorted(checkpoint.DTYPES, key=str), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, 3)
    entries = {"matrix": tensor, "scalar": tensor[1, 2], "none": tensor[:0], "turned": tensor.T}
    found = checkpoint.read(checkpoint.write(tmp_path, 1, {"weights": entries}, {}))
    for key, value in entries.items():
        assert_same(found.tensors["weights"][key], value)


@settings(max_examples=60)
@given(
    entries=st.dictionaries(st.text(st.characters(), max_size=6), st.lists(st.integers(0, 3), max_size=3), max_size=4),
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    seed=st.integers(0, 1 << 30),
)
def test_any_keys_shapes_and_floats_come_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, list[int]], numbers: list[float], seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=noise) for key, shape in entries.items()}
    state = {"numbers": numbers, "keys": list(entries)}
    path = checkpoint.write(tmp_path_factory.mktemp("any"), 1, {"weights": tensors}, state)
    found = checkpoint.read(path)
    assert found.tensors["weights"].keys() == tensors.keys()
    for key, value in tensors.items():
        assert_same(found.tensors["weights"][key], value)
    assert [number.hex() for number in found.state["numbers"]] == [number.hex() for number in numbers]
    assert found.state["keys"] == state["keys"]


AWKWARD = ("", "__metadata__", "json:x", "\ud800", "\0\x1b[2J", "a/../b", "naïve 🙂")


def test_shared_storage_views_parameters_and_awkward_keys_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    entries = {"all": base, "same": base, "part": base[3:6], "skip": base[::2], "parameter": torch.nn.Parameter(base)}
    wild = {"conj": torch.tensor([1 + 2j]).conj(), "expanded": torch.ones(1).expand(4), "scalar": torch.tensor(2.0)}
    entries |= {**wild, **{key: torch.ones(1) for key in AWKWARD}}
    found = checkpoint.read(checkpoint.write(tmp_path, 1, {"weights": entries, "best": {}}, {}))
    assert found.tensors["weights"].keys() == entries.keys()
    for key, value in entries.items():
        assert_same(found.tensors["weights"][key], value.detach().resolve_conj())
    assert found.tensors["best"] == {}
    found.tensors["weights"]["all"].add_(1)  # what is read belongs to the reader
    assert_same(found.tensors["weights"]["same"], base)


def test_files_take_their_mode_from_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = put(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"state": {"x": x}}, CheckpointError, "finite JSON") for x in (math.nan, -math.inf, object())),
    *(({"state": {"x": x}}, CheckpointError, "text as keys") for x in ({1: 2}, [({None: 1},)])),
    ({"state": {"x": "a" * (17 << 20)}}, CheckpointError, "at most"),
    ({"tensor": torch.zeros(2, dtype=torch.complex128)}, CheckpointError, "weights: expected dense tensors"),
    ({"tensor": torch.zeros(2, device="meta")}, CheckpointError, "weights: expected dense tensors"),
    *(({"group": group}, DeclarationError, "safe file name") for group in ("../evil", "", "a/b", ".", "weights\n")),
]


@pytest.mark.parametrize(("given", "error", "match"), REFUSED)
def test_what_would_not_come_back_is_refused(
    given: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    put(tmp_path, 1)
    asked = {"group": "weights", "tensor": torch.ones(2), "state": {}, "step": 2, "keep": 2, **given}
    tensors = {asked["group"]: {"w": asked["tensor"]}}
    with pytest.raises(error, match=match):
        checkpoint.write(tmp_path, asked["step"], tensors, asked["state"], keep=asked["keep"])
    assert steps(tmp_path) == ["step-00000001"]


# -- which stay


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [0, 1, 2, 3, 4])])
def test_the_oldest_beyond_keep_go(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(5):
        put(tmp_path, step, keep=keep)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_one_just_written_stays_whatever_its_step(tmp_path: Path) -> None:
    put(tmp_path, 10)
    put(tmp_path, 11)
    put(tmp_path, 3, keep=1)
    assert steps(tmp_path) == ["step-00000003", "step-00000011"]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    put(tmp_path, 7)
    checkpoint.write(tmp_path, 7, {"weights": {"w": torch.zeros(1)}}, {"second": True})
    assert steps(tmp_path) == ["step-00000007"]
    assert checkpoint.read(tmp_path / "step-00000007").state == {"second": True}


def test_17_latest_goes_by_step_and_not_by_time(tmp_path: Path) -> None:
    """FAULTS 17."""
    put(tmp_path, 99_999_999)
    put(tmp_path, 100_000_000)  # nine digits sort after eight
    os.utime(tmp_path / "step-100000000", (0, 0))
    assert latest(tmp_path).step == 100_000_000


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-5").mkdir()  # no name that is written here
    (tmp_path / "notes.txt").touch()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


# -- rows 1 and 2: killed, full

WRITER = """
import os, sys
from pathlib import Path
import torch
from pvae.runs import checkpoint
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def forever():
    found = checkpoint.latest(folder)
    step = found.step if found else 0
    while True:
        step += 1
        for again in range(2):
            checkpoint.write(folder, step, {"weights": {"w": torch.full((50_000,), float(step))}}, {"step": step})

for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        forever()
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that forks a child, which writes without end, for every line it is sent."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def kill_a_child(process: subprocess.Popen[str], after: float) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    pid = int(process.stdout.readline())
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    assert process.stdout.readline() == "dead\n"


def test_01_a_kill_at_any_moment_loses_nothing(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    """FAULTS 1."""
    put(tmp_path, 0)
    chance, last, strays = random.Random(1), 0, 0
    for _ in range(24):
        kill_a_child(writer, chance.uniform(0.02, 0.2))
        refused: list[str] = []
        before = latest(tmp_path, report=refused.append)
        strays += len(checkpoint.sweep(tmp_path))
        after = latest(tmp_path, report=refused.append)
        assert refused == []
        assert last <= before.step == after.step == after.state.get("step", 0)
        assert bool((after.tensors["weights"]["w"] == float(after.step)).all())
        assert all(name.startswith("step-") for name in steps(tmp_path))
        last = after.step
    assert last > 5, "the children wrote nothing: this test showed nothing"
    assert strays > 0, "no kill fell into a write: this test showed nothing"


def killed_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, kill: Callable[..., None], **write: Any) -> None:
    """Write a checkpoint in a child process, which ends within one function."""
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(owner, name, kill)
            put(**write)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_01_a_kill_between_the_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 1."""
    put(tmp_path, 1)
    real = os.rename

    def kill(source: Path, target: Path) -> None:
        if source.name.startswith(".tmp-"):
            os._exit(9)
        real(source, target)

    killed_in(monkeypatch, os, "rename", kill, folder=tmp_path, step=1)
    assert not (tmp_path / "step-00000001").exists()
    assert latest(tmp_path).state["loss"] == 1.1
    assert [name[:5] for name in checkpoint.sweep(tmp_path)] == [".old-", ".tmp-"]
    assert steps(tmp_path) == ["step-00000001"]


def test_01_a_kill_during_a_removal_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 1."""
    put(tmp_path, 1)

    def kill(path: Path, **_: object) -> None:
        if path.exists():
            (path / "state.json").unlink()
            os._exit(9)

    killed_in(monkeypatch, shutil, "rmtree", kill, folder=tmp_path, step=2, keep=1)
    assert [name[:5] for name in steps(tmp_path)] == [".tmp-", "step-"]
    checkpoint.read(tmp_path / "step-00000002")


def test_01_sweep_says_what_it_removes_and_leaves_the_rest(tmp_path: Path) -> None:
    """FAULTS 1."""
    put(tmp_path, 1)
    (tmp_path / ".tmp-folder" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-file").touch()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "step-00000001")
    assert checkpoint.sweep(tmp_path) == [".tmp-file", ".tmp-folder", ".tmp-link"]
    assert steps(tmp_path) == ["step-00000001"]
    checkpoint.read(tmp_path / "step-00000001")
    assert checkpoint.sweep(tmp_path) == checkpoint.sweep(tmp_path / "missing") == []


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from pvae.runs import checkpoint
from pvae.errors import StorageError
folder = Path(sys.argv[1])
checkpoint.write(folder, 1, {"weights": {"w": torch.ones(10)}}, {"first": True})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for step in (1, 2):
    try:
        checkpoint.write(folder, step, {"weights": {"w": torch.ones(10)}, "best": {"w": torch.ones(5000)}}, {})
    except StorageError as problem:
        print(problem)
        code = problem.exit_code
sys.exit(code)
"""


def test_02_a_full_disk_leaves_the_earlier_checkpoint_and_no_temporary(tmp_path: Path) -> None:
    """FAULTS 2."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert done.stdout.count("File too large. Earlier checkpoints are untouched") == 2
    assert steps(tmp_path) == ["step-00000001"]
    assert checkpoint.read(tmp_path / "step-00000001").state == {"first": True}


@pytest.mark.parametrize("call", [1, 2])
def test_02_a_replacement_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """FAULTS 2."""
    put(tmp_path, 1)
    real, calls = os.rename, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        checkpoint.write(tmp_path, 1, {}, {})
    assert steps(tmp_path) == ["step-00000001"]
    assert checkpoint.read(tmp_path / "step-00000001").state["epoch"] == 1


def test_02_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    """FAULTS 2."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(StorageError, match="File exists"):
        put(tmp_path / "checkpoints", 1)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_04_a_truncated_file_falls_back_and_says_why(tmp_path: Path, name: str) -> None:
    """FAULTS 4."""
    put(tmp_path, 1)
    broken = put(tmp_path, 2) / name
    broken.write_bytes(broken.read_bytes()[:-5])
    said: list[str] = []
    assert latest(tmp_path, report=said.append).step == 1
    (line,) = said
    assert re.fullmatch(f"checkpoint step-00000002 refused: .*{name}.*; falling back to the one before", line)


def test_04_the_default_report_is_a_logged_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FAULTS 4."""
    put(tmp_path, 1)
    (put(tmp_path, 2) / "state.json").write_text("")
    checkpoint.latest(tmp_path)
    assert "step-00000002 refused" in caplog.text


@pytest.mark.parametrize("same_step", [False, True])
def test_50_a_checkpoint_that_the_fit_removes_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_step: bool
) -> None:
    """FAULTS 50: pruned, or replaced by another of its step, while it is read: the reader lists again."""
    put(tmp_path, 1)
    verified = checkpoint._verified
    said: list[str] = []

    def meanwhile(path: Path, name: str, entry: Any) -> bytes:
        monkeypatch.setattr(checkpoint, "_verified", verified)
        put(tmp_path, 1 if same_step else 2, keep=1)
        return verified(path, name, {**entry, "sha256": "of the removed one"})

    monkeypatch.setattr(checkpoint, "_verified", meanwhile)
    assert latest(tmp_path, report=said.append).step == (1 if same_step else 2)
    assert said == []


def test_04_all_refused_lists_each(tmp_path: Path) -> None:
    """FAULTS 4."""
    (put(tmp_path, 1) / "state.json").unlink()
    (put(tmp_path, 2) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"(?s)got none.*step-00000002/manifest.*step-00000001/state") as caught:
        checkpoint.latest(tmp_path, report=lambda _: None)
    assert caught.value.exit_code == 65


def test_05_a_flipped_byte_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """FAULTS 5."""
    path = put(tmp_path, 1)
    good, refused, total = checkpoint.read(path), 0, 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in range(len(content)):
            total += 1
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                found = checkpoint.read(path)
            except CheckpointError:
                refused += 1
                continue
            assert file.name == "manifest.json"  # its white space
            assert (found.step, found.state) == (good.step, good.state)
            assert_same(found.tensors["weights"]["w"], good.tensors["weights"]["w"])
        file.write_bytes(content)
    assert total > 400
    assert refused > 0.8 * total


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_07_a_pickle_is_never_unpickled(tmp_path: Path) -> None:
    """FAULTS 7."""
    mark, path = tmp_path / "mark", put(tmp_path / "checkpoints", 1)
    poison = pickle.dumps(Trap(mark))
    (path / "extra.pkl").write_bytes(poison)
    checkpoint.read(path)  # a stranger in the folder is not opened
    for name in ("weights.safetensors", "state.json", "manifest.json"):
        path = put(tmp_path / "checkpoints", 1)
        if name == "manifest.json":
            (path / name).write_bytes(poison)
        else:
            forge(path, name, poison)
        with pytest.raises(CheckpointError, match=rf"{name}: expected .* got .*that start b'\\x80"):
            checkpoint.read(path)
    assert not mark.exists()
    pickle.loads(poison)
    assert mark.exists(), "the trap does not work: this test showed nothing"


def test_09_an_older_schema_migrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 9."""
    path = put(tmp_path, 1)
    edit_manifest(path, lambda manifest: manifest.update(schema=0))
    with pytest.raises(CheckpointError, match="schema 0, which nothing migrates"):
        checkpoint.read(path)
    monkeypatch.setitem(checkpoint.MIGRATIONS, 0, lambda old: replace(old, state={**old.state, "added": 1}))
    assert checkpoint.read(path).state == {"epoch": 1, "loss": 1.1, "added": 1}
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 2)
    with pytest.raises(CheckpointError, match="schema 1, which nothing migrates"):
        checkpoint.read(path)
    monkeypatch.setitem(checkpoint.MIGRATIONS, 1, lambda old: replace(old, state={"was": old.state["added"]}))
    assert checkpoint.read(path).state == {"was": 1}


# -- rows 4 to 9 and 36: damage

WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.json", "manifest.json"
FILES = (WEIGHTS, STATE, MANIFEST)


def change(path: Path, name: str, alter: Callable[[bytes], bytes]) -> None:
    (path / name).write_bytes(alter((path / name).read_bytes()))


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def remove(path: Path, name: str) -> None:
    (path / name).unlink()


def naming(name: str) -> Callable[[dict[str, Any]], object]:
    """Add a file of this name to a manifest."""
    return lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "size": 0}})


def swell(path: Path, name: str) -> None:
    """Make a file of a terabyte, without a block on the disk; the manifest agrees."""
    with (path / name).open("ab") as file:
        file.truncate(1 << 40)
    if name == STATE:
        edit_manifest(path, lambda manifest: manifest["files"][name].update(size=1 << 40))


def link_out(path: Path, name: str) -> None:
    """Put a link in the place of a file; its own size and the bytes it leads to are right."""
    (path / name).rename(path.parent / "outside")
    (path / name).symlink_to(path.parent / "outside")
    if name != MANIFEST:
        edit_manifest(path, lambda m: m["files"][name].update(size=(path / name).lstat().st_size))


def make_pipe(path: Path) -> None:
    (path / STATE).unlink()
    os.mkfifo(path / STATE)
    edit_manifest(path, lambda manifest: manifest["files"][STATE].update(size=0))


def replace_folder(path: Path, kind: str) -> None:
    path.rename(path.parent / "moved")
    if kind == "link":
        path.symlink_to(path.parent / "moved")
    elif kind == "file":
        path.touch()


def put_torch_file(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path.parent / "file.pt")
    forge(path, WEIGHTS, (path.parent / "file.pt").read_bytes())


NEWER = json.dumps({"schema": checkpoint.SCHEMA_VERSION + 1, "unknown": "layout"}).encode()
GARBAGE = (b"", b"\0" * 40, b"\xff\xfe", b"[]", b"null", b"{}", b"[" * 100_000, b'{"schema": "1"}', b"9" * 5000)
PATHS = ("../x.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "", ".safetensors", "extra.pkl", "x\0")
DAMAGES: list[tuple[Callable[..., object], tuple[Any, ...], str]] = [
    (change, (WEIGHTS, lambda content: content + b"x"), rf"{WEIGHTS}: expected \d+ bytes; got \d+"),
    (change, (WEIGHTS, flipped), rf"{WEIGHTS}: expected SHA-256 \w{{64}}; got \w{{64}}"),
    *((change, (MANIFEST, lambda _, c=c: c), f"{MANIFEST}: expected .*; got ") for c in GARBAGE),
    *((swell, (name,), rf"{name}: expected at most {16 << 20} bytes") for name in (MANIFEST, STATE)),
    *((remove, (name,), f"{name}: expected a plain readable file; got No such") for name in FILES),
    *((replace_folder, (kind,), "expected a checkpoint folder; got") for kind in ("link", "file", "nothing")),
    *((forge, (STATE, content), f"{STATE}: expected") for content in (b"", b"[1]", b"\xff", b"{")),
    (edit_manifest, (lambda found: found.update(step=2),), "expected step 1, as the folder says; got step 2"),
    (put_torch_file, (), "expected safetensors; got"),
    (change, (MANIFEST, lambda _: NEWER), "schema 1 or older; got schema 2; upgrade pvae"),
    *((edit_manifest, (naming(name),), f"{MANIFEST}: expected plain names") for name in PATHS),
    *((link_out, (name,), f"{name}: expected a plain readable file") for name in FILES),
    (make_pipe, (), f"{STATE}: expected a plain readable file; got not a plain file"),
]


@pytest.mark.parametrize(("damage", "arguments", "match"), DAMAGES)
def test_damage_is_refused_with_the_file_and_what_was_expected(
    damage: Callable[..., object], arguments: tuple[Any, ...], match: str, tmp_path: Path
) -> None:
    """FAULTS 4, 5, 6, 7, 9 and 36."""
    path = put(tmp_path, 1)
    damage(path, *arguments)
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.read(path)
    assert caught.value.exit_code == 65
