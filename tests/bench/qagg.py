"""log q_agg in float64: pairs scored per second, pvae's density against the broadcasted form that peers use.

python tests/bench/qagg.py [--n 60000] [--dim 40]
"""

import argparse
import math
import statistics
import time

import torch
from torch import Tensor

from pvae.analysis import AggregatedPosterior
from pvae.distributions.exponential import Normals


def broadcasted(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The textbook form: every pair through Normal.log_prob."""
    scores = torch.distributions.Normal(loc, scale, validate_args=False).log_prob(z[:, None]).sum(-1)
    return scores.logsumexp(1) - math.log(len(loc))


def product_alone(z: Tensor, loc: Tensor) -> float:
    """Seconds of a preallocated float64 matrix product of the same size (m x 2D x n), nothing else."""
    a, b = torch.cat([z, z], 1), torch.cat([loc, loc], 1).T.contiguous()
    out = torch.empty(512, len(loc), dtype=z.dtype)
    start = time.perf_counter()
    for rows in a.split(512):
        torch.mm(rows, b, out=out[: len(rows)])
    return time.perf_counter() - start


def seconds(function: object, *arguments: Tensor) -> tuple[float, Tensor]:
    """Wall time of one call."""
    start = time.perf_counter()
    value = function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start, value


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    torch.manual_seed(0)
    loc = torch.randn(a.n, a.dim, dtype=torch.float64)
    scale = (torch.rand(a.n, a.dim, dtype=torch.float64) * 2 - 2).exp()
    z = loc + scale * torch.randn_like(loc)
    fast_rows, slow_rows = min(a.n, 4096), min(a.n, 16)
    mixture = AggregatedPosterior(Normals(loc, scale))
    ratios = []
    for _ in range(a.rounds):
        fast, one = seconds(mixture.log_prob, z[:fast_rows])
        slow, two = seconds(broadcasted, z[:slow_rows], loc, scale)
        product = product_alone(z[:fast_rows], loc)
        worst = float((one[:slow_rows] - two).abs().max())
        ratios.append((fast_rows * a.n / fast) / (slow_rows * a.n / slow))
        print(
            f"pvae {fast_rows * a.n / fast:.3g} pairs/s   broadcasted {slow_rows * a.n / slow:.3g} pairs/s   "
            f"ratio {ratios[-1]:.0f}   to the product alone {fast / product:.2f}   largest difference {worst:.1e}"
        )
    print(f"median ratio {statistics.median(ratios):.0f}")


if __name__ == "__main__":
    main()
