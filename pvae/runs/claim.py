"""Claims of processes on exclusive work, such as a fit: known by pid, birth and heartbeat, not by locks."""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from pvae.errors import BusyError, DataError, OutputError
from pvae.runs.find import STALE_AFTER_SECONDS, is_gone, this_process, utc_now
from pvae.util import files

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
            heard = (now or time.time()) - self.path.lstat().st_mtime
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
    pid, host, since = (holder.get(key, "unknown") for key in ("pid", "host", "since"))
    return BusyError(
        f"{folder}: expected {what} that nobody holds; got one held by process {pid} on host {host} since {since}; "
        f"wait for it or stop it.{advice if is_gone(holder) is None else ''}"
    )


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
