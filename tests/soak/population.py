"""Coverage and width of the interval on new data, over data sets from distributions whose values are known.

python tests/soak/population.py [--truths NAME ...] [--sizes 100 1000] [--sets 100] [--train 1] [--out FILE]

Prints a line for each truth and size as it is done: a row of a markdown table.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pvae.analysis.population.interval import Population, interval
from pvae.analysis.population.kernels import KernelPrior
from pvae.analysis.population.sample import NewRows
from pvae.distributions.exponential import Normals
from pvae.util import seeds

DOUBLE = torch.float64


@dataclass(frozen=True)
class NormalChannel:
    """Means x drawn from some distribution, q(z | x) = N(x, s^2 I), p = N(0, I); with the exact I_pi and M."""

    means: Callable[[int, torch.Generator], Tensor]
    scale: float
    information: float
    gain: float

    def rows(self, n: int, seed: int) -> NewRows:
        """Return n new rows with a sample each."""
        generator = torch.Generator().manual_seed(seed)
        loc = self.means(n, generator)
        q = Normals(loc, torch.full_like(loc, self.scale))
        value = loc + self.scale * torch.randn(loc.shape, generator=generator, dtype=DOUBLE)
        log_p = -0.5 * (value.square().sum(1) + loc.shape[1] * math.log(2 * math.pi))
        s2 = self.scale**2
        kl = 0.5 * (loc.square().sum(1) + loc.shape[1] * (s2 - 1 - math.log(s2)))
        return NewRows(value, q.log_prob(value), log_p, kl, q)


def gaussian(dim: int, information: float, gain: float) -> NormalChannel:
    """q_pi = N(m, V) with a full V whose determinant is 1, and m such that KL(q_pi || p) = gain."""
    generator = torch.Generator().manual_seed(dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DOUBLE))[0]
    values = torch.exp(torch.linspace(-0.35, 0.35, dim, dtype=DOUBLE))
    shift = math.sqrt((2 * gain - float(values.sum()) + dim) / dim)
    s2 = math.exp(-2 * information / dim)
    factor = rotation * (values - s2).sqrt()

    def means(n: int, generator: torch.Generator) -> Tensor:
        return shift + torch.randn(n, dim, generator=generator, dtype=DOUBLE) @ factor.T

    return NormalChannel(means, math.sqrt(s2), information, gain)


def centred(centres: Tensor, spread: float, scale: float) -> NormalChannel:
    """Means normal around one of the equally likely centres `(K, D)`; the exact values by a long Monte Carlo sum."""
    inner = math.sqrt(spread**2 - scale**2)

    def means(n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(centres), (n,), generator=generator)
        return centres[chosen] + inner * torch.randn(n, centres.shape[1], generator=generator, dtype=DOUBLE)

    made = NormalChannel(means, scale, 0.0, 0.0)
    mixture = Normals(centres, torch.full_like(centres, spread))
    score, parts = mixture.scorer(), []
    for k in range(max(1, 4_000_000 // len(centres) // 1000)):
        rows = made.rows(1000, 10**6 + k)
        tile = torch.empty(1000, len(centres), dtype=DOUBLE)
        score(rows.value, tile)
        log_q = tile.logsumexp(1) - math.log(len(centres))
        parts.append(torch.stack([rows.own - log_q, rows.kl - rows.own + log_q]).mean(1))
    information, gain = torch.stack(parts).mean(0).tolist()
    return NormalChannel(means, scale, information, gain)


def mixture(spread: float, scale: float) -> NormalChannel:
    """Ten clusters in six dimensions, at a distance from 0 that gives z about the second moment of p."""
    generator = torch.Generator().manual_seed(6)
    directions = torch.randn(10, 6, generator=generator, dtype=DOUBLE)
    centres = directions / directions.norm(dim=1, keepdim=True) * math.sqrt(6 * (1 - spread**2))
    return centred(centres, spread, scale)


def points() -> NormalChannel:
    """20 000 equally likely rows, which look like a continuous distribution."""
    generator = torch.Generator().manual_seed(20)
    centres = math.sqrt(1 - 0.19**2) * torch.randn(20_000, 10, generator=generator, dtype=DOUBLE)
    return centred(centres, 0.19, 0.19)


TRUTHS: dict[str, Callable[[], NormalChannel]] = {
    "linear d=2, I=1.5": lambda: gaussian(2, 1.5, 0.295),
    "linear d=2, I=11.5": lambda: gaussian(2, 11.5, 0.295),
    "linear d=10, I=7": lambda: gaussian(10, 7.0, 0.648),
    "linear d=10, I=11.5": lambda: gaussian(10, 11.5, 0.648),
    "mixture d=6, unsaturated": lambda: mixture(0.463, 0.418),
    "mixture d=6, saturated": lambda: mixture(0.3225, 0.0943),
    "20 000 points": points,
}


def run(truth: NormalChannel, n: int, seed: int, train: int) -> dict[str, float]:
    """Return the figures of one data set."""
    others = truth.rows(train * n, seeds.mix(seed, 9)) if train else None
    found = interval(truth.rows(n, seeds.mix(seed, 8)), KernelPrior(), train=others, seed=seed)
    assert isinstance(found, Population), found
    assert found.gain_upper is not None
    low, high = (e.value + k * 2 * e.standard_error for e, k in ((found.gain, -1), (found.gain_upper, 1)))
    by_rows = found.sizes[-1].information
    return {
        "low": low, "high": high, "gain": found.gain.value, "gain_error": found.gain.standard_error,
        "upper": found.gain_upper.value, "upper_error": found.gain_upper.standard_error,
        "information": by_rows.value, "information_error": by_rows.standard_error, "seen": found.seen or 0.0,
        "best": found.information.value if found.information else 0.0,
        "midpoint": found.midpoint.value if found.midpoint else math.nan,
    }  # fmt: skip


def line(name: str, truth: NormalChannel, n: int, found: list[dict[str, float]]) -> str:
    """Return a row of the table."""
    columns = {key: torch.tensor([f[key] for f in found], dtype=DOUBLE) for key in found[0]}
    low, high = columns["low"], columns["high"]
    holds = int(((low <= truth.gain) & (high >= truth.gain)).sum())
    ratios = [columns[key].std() / columns[f"{key}_error"].mean() for key in ("gain", "information", "upper")]
    return (
        f"| {name} ({truth.information:.2f}; {truth.gain:.3f}) | {n} | {len(found)} | {columns['gain'].mean():.3f} | "
        f"{holds}/{len(found)} (below {int((low > truth.gain).sum())}, above {int((high < truth.gain).sum())}) | "
        f"{(high - low).mean():.2f} | {', '.join(f'{float(r):.2f}' for r in ratios)} | {columns['seen'].mean():.2f} |"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", nargs="+", default=list(TRUTHS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--train", type=int, default=0, help="Train rows, as a multiple of n; 0: r of the rows.")
    parser.add_argument("--out", type=Path, default=None, help="File of finished data sets, to go on from.")
    a = parser.parse_args()
    torch.set_num_threads(1)
    done = {}
    if a.out is not None and a.out.exists():
        done = {tuple(key): found for key, found in map(json.loads, a.out.read_text().splitlines())}
    print("| truth (I_pi; M) | n | sets | lower end | holds | width | sd / se of lower, I_n, upper | seen |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in a.truths:
        truth = TRUTHS[name]()
        for n in a.sizes:
            found = []
            for seed in range(a.sets):
                key = (name, n, a.train, seed)
                if key not in done:
                    done[key] = run(truth, n, seed, a.train)
                    if a.out is not None:
                        with a.out.open("a") as file:
                            file.write(json.dumps([key, done[key]]) + "\n")
                found.append(done[key])
            print(line(name, truth, n, found), flush=True)


if __name__ == "__main__":
    main()
