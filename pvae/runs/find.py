"""Names and time stamps of runs, look-up of their folders, detection of dead processes, and claims on exclusive work.

Standard library only.
"""

import errno
import fcntl
import json
import os
import platform
import re
import stat
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any, Self

from pvae.errors import BusyError, DataError, DeclarationError, OutputError, near
from pvae.util import files

RESERVED_SLUGS = frozenset(["latest", "con", "nul", "prn", "aux"])
LONGEST_SLUG = 64
RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
STALE_AFTER_SECONDS = 300.0
"""Seconds without heartbeat after which a run on another host counts as dead, or a temporary file as abandoned."""


def slug(name: str) -> str:
    """Return a safe folder name for an experiment: 1 to 64 ASCII letters, digits, ``.``, ``_`` and ``-``.

    A safe name stays unchanged; one that has no such characters, is too long or is reserved gets a digest as suffix.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")
    if kept and len(kept) <= LONGEST_SLUG and kept.lower() not in RESERVED_SLUGS:
        return kept
    suffix = files.digest(name.encode("utf-8", "surrogatepass"))[:8]
    return f"{kept[: LONGEST_SLUG - 9] or 'run'}-{suffix}"


def utc_now() -> str:
    """Return the current time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_run_id() -> str:
    """Return a new run id: the current time in UTC and 8 random hexadecimal digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"


def free_path(parent: Path) -> Path:
    """Return the path of a run in ``parent`` that does not exist yet; raises OSError."""
    for _ in range(100):
        if not os.path.lexists(path := parent / new_run_id()):
            return path
    raise FileExistsError(errno.EEXIST, f"a hundred run ids, all of them taken, in {parent}")


def begun(run: Path) -> tuple[float, str]:
    """Return a key that sorts runs as they were begun, whatever the clock said then: order in the manifest, and id."""
    manifest: dict[str, Any] = {}
    with suppress(DataError):
        manifest = files.read_object(run, "manifest.json")
    if isinstance(order := manifest.get("order"), int):
        return order, run.name
    with suppress(ValueError, OverflowError, OSError):  # a run of an earlier version
        return datetime.fromisoformat(str(manifest.get("started", started_by(run)))).timestamp() * 1000, run.name
    return 0, run.name


def started_by(run: Path) -> str:
    """Return the time in the name of a run's folder, ISO 8601; "" if it is named otherwise."""
    with suppress(ValueError):
        return datetime.strptime(run.name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).isoformat(timespec="milliseconds")
    return ""


def next_order(root: Path) -> int:
    """Return the order of a run that begins now: milliseconds since 1970, or 1 more than the last one below `root`."""
    return max([int(time() * 1000), *(int(begun(run)[0]) + 1 for name in folders(root) for run in folders(name))])


def beside(run: Path) -> list[Path]:
    """Return the runs in the folder of a run, in that above it and in the folders of the latter, newest first."""
    places = {run.resolve().parent, run.resolve().parent.parent, *folders(run.resolve().parent.parent)}
    return sorted((found for place in places for found in folders(place) if is_run(found)), key=begun, reverse=True)


def is_run(folder: Path) -> bool:
    """Return True if a folder is a run directory, that is, contains a file `manifest.json`."""
    with suppress(OSError, ValueError):
        return stat.S_ISREG((folder / "manifest.json").lstat().st_mode)
    return False


def folders(parent: Path) -> list[Path]:
    """Return the folders in ``parent``, sorted, without links and hidden ones; [] if it cannot be read."""
    with suppress(OSError, ValueError), os.scandir(parent) as entries:
        found = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        return [parent / name for name in sorted(found)]
    return []


def find_run(path: str, root: Path) -> Path:
    """Return the folder of the run with a path or name; raises DeclarationError, with similar names, if not found."""
    if path == "latest":
        found = sorted((run for name in folders(root) for run in folders(name)), key=begun, reverse=True)
    else:
        places = (Path(path), root / path, root / slug(path))
        found = [folder for place in places for folder in (place, *sorted(folders(place), key=begun, reverse=True))]
    for folder in found:
        if is_run(folder):
            return folder.resolve()
    names = sorted({folder.name for folder in folders(Path(path).parent) + folders(root)})
    hint = near(path.rstrip("/").rpartition("/")[2], names)
    raise DeclarationError.of("runs.find.no_run", root=root, names=names[:8], path=path[:200], hint=hint)


def birth_of(pid: int) -> str | None:
    """Return the start time of process ``pid`` in clock ticks; "dead" for a zombie; None if it cannot be found out."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    return None


def is_alive(pid: object, birth: object) -> bool:
    """Return True if the process with this pid and start time (`birth`, against re-used pids) is alive on this host."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    found = birth_of(pid)
    return found != "dead" and (found is None or birth is None or found == birth)


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others, for `is_gone`.

    One that torchrun started also tells the id of the launch and the number of its processes; one of Slurm its job.
    """
    pid, launch = os.getpid(), os.environ.get("TORCHELASTIC_RUN_ID")
    group = {} if launch is None else {"launch": launch, "processes": int(os.environ["WORLD_SIZE"])}
    return {"pid": pid, "birth": birth_of(pid), "host": platform.node(), "boot": _boot(), "job": job(), **group}


def job() -> list[str]:
    """Return id and number of requeues of the Slurm job that this process is part of; [] outside of one."""
    found = os.environ.get("SLURM_JOB_ID")
    return [found, os.environ.get("SLURM_RESTART_COUNT", "0")] if found else []


def _boot() -> str:
    """Return the id of this host's present boot and that of this process's table of pids, as `boot/pids`."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return "/"


def is_gone(owner: Mapping[str, Any]) -> bool | None:
    """Return True if the process of `this_process` has died; None if it is of another host or container.

    Before torchrun starts the processes of a launch again, it has ended the earlier ones, on every host; so has Slurm
    before it begins a job again.
    """
    here = _boot()
    there = str(owner.get("boot") or here)
    if owner.get("host") != platform.node() or (there != here and there.split("/")[0] == here.split("/")[0]):
        before, own = owner.get("job"), job()
        requeued = own and isinstance(before, list) and before[:1] == own[:1] and before != own
        again = requeued or owner.get("launch", "none") == os.environ.get("TORCHELASTIC_RUN_ID", "")
        return True if again else None
    return there != here or not is_alive(owner.get("pid"), owner.get("birth"))


def leftovers(folder: Path) -> Iterator[Path]:
    """Yield what interrupted writes left below a folder: temporary files and folders, and replaced checkpoints.

    A checkpoint that was set aside and never replaced is none: the next start gives it its name back.
    """
    found: list[Path] = []
    for entry in files.walk(folder):
        path, place = Path(entry.path), entry.name.removeprefix(".old-").rpartition("-")[0]
        replaced = entry.name.startswith(".old-") and (path.parent / place).is_dir()
        if (replaced or entry.name.startswith(".tmp-")) and not any(map(path.is_relative_to, found)):
            found.append(path)
            yield path


def is_abandoned(path: Path) -> bool:
    """Return True if the process that a temporary file's name tells is dead, or the file is older than five minutes."""
    host, _, pid = path.name.removeprefix(".tmp-").rpartition("-")[0].partition("-")
    if pid.isdecimal() and f".tmp-{host}-" == files.temporary_for(path).name[:14] and not is_alive(int(pid), None):
        return True
    return path.lstat().st_mtime < time() - STALE_AFTER_SECONDS


def is_stale(status: Mapping[str, Any]) -> bool:
    """Return True if the process that fits a run is dead, or has written no heartbeat for too long on another host."""
    if (gone := is_gone(status)) is not None:
        return gone
    with suppress(ValueError, TypeError):
        age = datetime.now(UTC) - datetime.fromisoformat(str(status.get("heartbeat")))
        return age.total_seconds() > STALE_AFTER_SECONDS
    return True


# ---------------------------------------------------------------------- claims


NO_LINKS = frozenset([errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
"""Errors of file systems without hard links."""
BEAT_SECONDS = 20.0
"""Seconds between two heartbeats of a claim, which are new times of change of its file."""


class Claim:
    """Claim of one process on exclusive work: a file with its pid, birth, host and boot, created as a hard link.

    It ends with its process, also when that is killed. A process of another host cannot be looked at: its claim ends
    when it is released, or five minutes after its last heartbeat; at once if it was the same job of Slurm before a
    requeue.

    Arguments:
        path: file of the claim.
        what: what is claimed, such as "a run", for the message of BusyError.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.own: dict[str, Any] = {}
        """Content of the claim while this object holds it."""
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def holder(self, now: float | None = None) -> dict[str, Any]:
        """Return the content of a claim that stands; {} if there is none, or its process has died on this host.

        `now` is the time by the clock of the file system, which may be another machine's; by that of this host if None.
        """
        with suppress(DataError, OSError):
            found = files.read_object(self.path.parent, self.path.name)
            gone = is_gone(found) if isinstance(found.get("host"), str) else True
            heard = (now or time()) - self.path.lstat().st_mtime
            silent = found.get("beats") is True and heard > STALE_AFTER_SECONDS
            return {} if gone or (gone is None and silent) else found
        return {}

    def _beat(self, token: str, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                if self.holder().get("token") == token:
                    os.utime(self.path)

    def acquire(self) -> None:
        """Make the claim; raises BusyError, which names the holder, if it stands, and OutputError."""
        if files.follows():
            return
        with files.raising(DataError, f"{self.path}: expected a plain file"):
            files.require_plain_target(self.path)
        own = {**this_process(), "since": utc_now(), "token": os.urandom(8).hex(), "beats": True}
        temporary = files.temporary_for(self.path)
        while not self.own:
            with files.raising(OutputError, f"{self.path}: expected a file to claim"), _alone(self.path.parent):
                there = os.path.lexists(self.path)
                try:
                    files.write_new(temporary, json.dumps(own).encode(), durable=False)
                    if found := self.holder(temporary.lstat().st_mtime):
                        raise busy(self.path.parent, self.what, found, f" If it is gone, remove {self.path}.")
                    if there:
                        self.path.unlink(missing_ok=True)
                    os.link(temporary, self.path)
                    self.own = own
                except FileExistsError:  # another host was quicker
                    continue
                except OSError as problem:
                    if problem.errno not in NO_LINKS:
                        raise
                    os.rename(temporary, self.path)
                    self.own = own
                finally:
                    temporary.unlink(missing_ok=True)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(own["token"], self._ended), daemon=True).start()

    def release(self) -> None:
        """End the claim, if it is still this one."""
        self._ended.set()
        with suppress(OSError):
            if self.own and self.holder().get("token", self.own["token"]) == self.own["token"]:
                self.path.unlink()
        self.own = {}


def busy(folder: Path, what: str, holder: dict[str, Any], advice: str) -> BusyError:
    """Return the error that names the process that holds `what`, with `advice` where it cannot be looked at."""
    more = advice if is_gone(holder) is None else ""
    return BusyError.of("runs.find.held", folder=folder, what=what, holder=holder, advice=more)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep the other processes of this host out meanwhile, where the file system can: they remove dead claims, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
