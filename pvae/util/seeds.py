"""Random seeds derived from (seed, stream, counter), so that a resumed run draws the same random numbers."""

import torch

ORDER, NOISE, VALIDATION, ANALYSIS, SHARD, LABELS = range(1, 7)


def mix(seed: int, stream: int, counter: int = 0) -> int:
    """Return a 63-bit seed derived from seed, stream and counter by the splitmix64 hash."""
    state = seed
    for part in (stream, counter):
        state = (state ^ (part * 0x9E3779B97F4A7C15)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def drawn() -> int:
    """Return a seed drawn from torch's default random generator."""
    return int(torch.randint(2**62, ()))


def generator(seed: int, stream: int, counter: int = 0) -> torch.Generator:
    """Return a new CPU random generator seeded by `mix(seed, stream, counter)`."""
    return torch.Generator().manual_seed(mix(seed, stream, counter))


def set_noise(seed: int, device: torch.device) -> None:
    """Seed the default random generator of `device`, and no other generator.

    `torch.manual_seed` would also queue a seeding of every absent accelerator, with a stack trace each, which is slow
    and makes the queue grow with every step.
    """
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)


def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the random order of the n training rows in an epoch, `(n,)` on the CPU, a function of (seed, epoch)."""
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def subset(n: int, count: int | None, seed: int) -> torch.Tensor:
    """Return `count` of n row numbers sampled without replacement, sorted; all n if `count` is None or at least n."""
    if count is None or count >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values
