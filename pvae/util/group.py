"""The processes of a fit under torchrun: sums over the parts of a batch in one order, and work that they share out.

A batch is `S` shards, which `train.shards` declares. Process `r` of `W` takes the shards `r S/W ... (r + 1) S/W - 1`.
Sums over the shards are added in a fixed binary tree, a process its own subtree first, so that on a CPU their bits
depend on `S` and never on `W`.
"""

import atexit
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pvae.errors import Stopped, misdeclared

_joined = False

LONGEST_START = timedelta(minutes=10)
"""Longest wait for another process to load its data, compile its step or end an epoch."""
STEP_SECONDS = 10
"""Longest wait for another process within a step, after which the fit stops."""


def rank() -> int:
    """Return the number of this process among those of the fit; 0 for the only one, and for the one that writes."""
    return dist.get_rank() if _joined else 0


def size() -> int:
    """Return the number of processes of the fit."""
    return dist.get_world_size() if _joined else 1


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for the code of the `with` block; alone, do nothing.

    Raises:
        Stopped: another process ended or did not answer.
    """
    global _joined
    if _joined or int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield
        return
    if not dist.is_initialized():
        store, number, count = next(iter(rendezvous("env://", timeout=LONGEST_START)))
        store = PrefixStore(_greeted(store, number, count), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=LONGEST_START)
        atexit.register(dist.destroy_process_group)
    _joined = True
    try:
        yield
    finally:
        _joined = False


def _greeted(store: Store, number: int, count: int) -> str:
    """Return a name that only the processes of this start know, after each of them has answered the first one.

    torchrun keeps a store while it starts its processes again, and in it the addresses of those that are gone.
    """
    own, stop = os.urandom(8).hex(), time.monotonic() + LONGEST_START.total_seconds()
    if number == 0:
        store.set("pvae/start", own)
        for other in range(1, count):
            greeting = store.get(f"pvae/{own}/{other}").decode()  # waits for it
            store.set(f"pvae/{own}/{other}/{greeting}", "")
        return own
    while time.monotonic() < stop:
        start = store.get("pvae/start").decode()  # of an earlier start, which nobody answers any more, or of this one
        store.set(f"pvae/{start}/{number}", own)
        if store.check([f"pvae/{start}/{number}/{own}"]):
            return start
        time.sleep(0.02)
    raise Stopped(f"Process {number} of {count}: expected the first one to answer within {LONGEST_START}.")


@contextmanager
def _answered() -> Iterator[None]:
    """Raise Stopped where another process has ended, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        found = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0][:200]
        raise Stopped.of("util.group.no_answer", rank=rank(), size=size(), found=found) from error


def local(device: torch.device) -> torch.device:
    """Return this process's own GPU for "cuda", by torchrun's LOCAL_RANK; any other device as it is."""
    if device.type != "cuda" or device.index is not None or size() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def wait() -> None:
    """Wait until the first process comes here."""
    from_first(lambda: None)


def from_first(make: Callable[[], Any]) -> Any:
    """Return what `make` returns in the first process, in every process; it must be something that JSON can say.

    An error in the first process is raised there; the others raise Stopped.
    """
    return json.loads(_told(lambda: json.dumps(make()).encode(), [0])[0]) if size() > 1 else make()


def _told(make: Callable[[], bytes], sources: Sequence[int]) -> list[bytes]:
    """Return what `make` returns in some processes; an error in one is raised there, and the others raise Stopped."""
    problem: BaseException | None = None
    try:
        own = b"+" + (make() if rank() in sources else b"")
    except BaseException as error:
        problem, own = error, f"-{type(error).__name__}: {error}".encode()
    every = [_broadcast(own, source) for source in sources]
    for source, said in zip(sources, every, strict=True):
        if problem is None and said[:1] == b"-":
            problem = Stopped(f"Process {source} stopped: {said[1:].decode()}")
    if problem is not None:
        raise problem
    return [said[1:] for said in every]


def _broadcast(own: bytes, source: int) -> bytes:
    """Return the bytes of one process in every process."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    length = torch.tensor(len(data), device=device)
    with _answered():
        dist.broadcast(length, source)
        data = data if rank() == source else torch.empty(int(length), dtype=torch.uint8, device=device)
        dist.broadcast(data, source)
    return data.cpu().numpy().tobytes()


def share_out(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values of some tensors, in place."""
    if size() > 1:
        with _answered():
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)


def is_mine(number: int) -> bool:
    """Return True if a piece of work, counted from 0, is this process's; they are dealt out in turn."""
    return number % size() == rank()


def add_up(*tensors: Tensor) -> None:
    """Add the values that the processes have of some tensors, in place; for sums whose rounding may differ."""
    if size() > 1:
        with _answered():
            for tensor in tensors:
                own = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
                there = own.cuda() if dist.get_backend() == "nccl" else own
                dist.all_reduce(there)
                own.copy_(there)


def dealt(count: int, work: Callable[[int], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the tensors that `work(i)` returns for i = 0, ..., count - 1, each computed by one of the processes.

    An error in one of them is raised there; the others raise Stopped. The work of one process is not divided again.
    """
    if size() == 1:
        return [dict(work(i)) for i in range(count)]
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for said in _told(partial(_own_share, count, work), range(size())):
        for name, tensor in load(said).items():
            number, _, key = name.partition("/")
            parts[int(number)][key] = tensor
    return parts


def _own_share(count: int, work: Callable[[int], Mapping[str, Tensor]]) -> bytes:
    global _joined
    turns = range(rank(), count, size())
    _joined = False
    try:
        return bytes(save({f"{i}/{name}": t.contiguous() for i in turns for name, t in work(i).items()}))
    finally:
        _joined = True


class Shards:
    """The shards of every batch, and those of this process.

    Arguments:
        count: number of shards, a power of two.

    Raises:
        DeclarationError: there are more processes than shards, or they do not divide them.
    """

    def __init__(self, count: int) -> None:
        self.count, self.processes = count, size()
        misdeclared(count % self.processes, "util.group.shards", processes=self.processes, count=count)
        each = count // self.processes
        self.mine = range(rank() * each, (rank() + 1) * each)

    def bounds(self, rows: int) -> list[tuple[int, int]]:
        """Return first row and end of each shard of a batch of some rows."""
        ends = [round(rows * shard / self.count) for shard in range(self.count + 1)]
        return list(zip(ends, ends[1:], strict=False))

    def rows(self, batch: int) -> int:
        """Return the number of rows in the largest shard of a batch."""
        return max(end - start for start, end in self.bounds(batch))

    def total(self, parts: Iterable[Tensor]) -> Tensor:
        """Return the sum over all shards of vectors, of which this process has one for each of its own.

        Raises:
            Stopped: another process ended, or did not answer in `STEP_SECONDS`.
        """
        waiting: list[Tensor] = []
        for done, part in enumerate(parts):
            while done & 1:
                part, done = waiting.pop() + part, done >> 1
            waiting.append(part)
        (mine,) = waiting
        step = 1
        while step < self.processes:
            mine = mine + _exchanged(mine, rank() ^ step)  # a + b = b + a in bits: both sides hold the same sum
            step *= 2
        return mine


def _exchanged(mine: Tensor, peer: int) -> Tensor:
    """Return the vector of another process, which gets this one's."""
    theirs = torch.empty_like(mine)
    both = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
    with _answered():
        for work in dist.batch_isend_irecv(both):
            work.wait(timedelta(seconds=STEP_SECONDS))
    return theirs
