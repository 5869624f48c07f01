"""Claims of processes on exclusive work, such as a fit: found again by pid and birth, not by locks of the system."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from pvae.errors import BusyError, DataError, OutputError
from pvae.runs.find import is_gone, this_process, utc_now
from pvae.util import files

NO_LINKS = frozenset([errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
"""Errors of file systems without hard links."""


class Claim:
    """Claim of one process on exclusive work: a file with its pid, birth, host and boot, created as a hard link.

    It ends with its process, also when that is killed. A process of another host cannot be looked at: its claim stands
    until it is released or its file removed.

    Arguments:
        path: file of the claim.
        what: what is claimed, such as "a run", for the message of BusyError.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.own: dict[str, Any] = {}
        """Content of the claim while this object holds it."""

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def holder(self) -> dict[str, Any]:
        """Return the content of a claim that stands; {} if there is none, or its process has died on this host."""
        with suppress(DataError):
            found = files.read_object(self.path.parent, self.path.name)
            return found if isinstance(found.get("host"), str) and is_gone(found) is not True else {}
        return {}

    def acquire(self) -> None:
        """Make the claim; raises BusyError, which names the holder, if it stands, and OutputError."""
        if files.follows():
            return
        with files.raising(DataError, f"{self.path}: expected a plain file"):
            files.require_plain_target(self.path)
        own = {**this_process(), "since": utc_now(), "token": os.urandom(8).hex()}
        temporary = files.temporary_for(self.path)
        while not self.own:
            with files.raising(OutputError, f"{self.path}: expected a file to claim"), _alone(self.path.parent):
                there = os.path.lexists(self.path)
                if found := self.holder():
                    raise busy(self.path.parent, self.what, found, f" If it is gone, remove {self.path}.")
                if there:
                    self.path.unlink(missing_ok=True)
                try:
                    files.write_new(temporary, json.dumps(own).encode(), durable=False)
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

    def hand_over(self, pid: int) -> None:
        """Pass the claim on to another process of this host, such as a child; `release` still ends it."""
        self.own.update(this_process(pid))
        files.write_atomic(self.path, json.dumps(self.own), durable=False)

    def release(self) -> None:
        """End the claim, if it is still this one."""
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
