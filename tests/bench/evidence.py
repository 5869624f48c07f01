"""IWAE of binary images, 784-300-300-40 with gated layers: pvae's `evidence` against a hand-written PyTorch loop.

Both take turns in one process on the same images and weights; figures are medians over rounds. The loop knows the
network, the likelihood and the posterior; it sums weights block by block, in the size of block that a trial found
best, and does nothing else: no curve, no errors, no k-hat.

    python tests/bench/evidence.py [--images 40] [--samples 5000] [--rounds 5] [--score softplus]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, glu, softplus

from pvae import Experiment
from pvae.analysis import evidence
from pvae.pair.pair import Pair

ALL = 10_000
"""Images that the times are projected to."""
BLOCKS = (500, 1000, 2000, 3000, 5000)
"""Draws at a time that the loop may choose from."""
SPEC = {
    "latents": {"z": {"dim": 40}},
    "encoder": {"network": {"kind": "gated_mlp", "hidden": [300, 300]}},
    "decoder": {"network": {"kind": "gated_mlp", "hidden": [300, 300]}, "likelihood": {"kind": "bernoulli"}},
}
Score = Callable[[Tensor, Tensor], Tensor]


def by_cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) `(draws,)`, as most write it."""
    return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def by_softplus(logits: Tensor, x: Tensor) -> Tensor:
    """The same with fewer passes over the logits."""
    return logits @ x - softplus(logits).sum(-1)


SCORES: dict[str, Score] = {"softplus": by_softplus, "cross-entropy": by_cross_entropy}


class HandWritten:
    """IWAE in plain PyTorch, of a VAE with copies of the pair's layers."""

    def __init__(self, pair: Pair, score: Score) -> None:
        self.decoder = [deepcopy(m) for m in pair.model.modules() if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
        self.encoder = [deepcopy(m) for m in pair.guide.modules() if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
        self.score = score

    def _run(self, layers: list[Any], h: Tensor) -> Tensor:
        for layer in layers[:-1]:
            h = glu(layer(h), -1)
        return layers[-1](h)

    def _weights(self, x: Tensor, loc: Tensor, log_scale: Tensor, count: int) -> Tensor:
        noise = torch.randn(count, len(loc))
        z = loc + log_scale.exp() * noise
        prior_less_posterior = 0.5 * (noise.square() - z.square()).sum(-1) + log_scale.sum()
        return self.score(self._run(self.decoder, z), x) + prior_less_posterior

    @torch.no_grad()
    def __call__(self, x: Tensor, samples: int, block: int) -> Tensor:
        """The bound of every image `(n,)`."""
        bounds = []
        for row in x:
            loc, log_variance = self._run(self.encoder, row[None])[0].chunk(2)
            log_scale = 0.5 * log_variance.clamp(-12, 6)
            total = torch.tensor(-math.inf)
            for start in range(0, samples, block):
                weights = self._weights(row, loc, log_scale, min(block, samples - start))
                total = torch.logaddexp(total, weights.logsumexp(0))
            bounds.append(total - math.log(samples))
        return torch.stack(bounds)


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def best_block(loop: HandWritten, x: Tensor, samples: int) -> int:
    """The fastest size of block on a few images, each tried three times in turn."""
    sizes = [size for size in BLOCKS if size < samples] + [samples] * (samples <= BLOCKS[-1])
    tried = [{size: seconds(partial(loop, x[:2], samples, size))[0] for size in sizes} for _ in range(3)]
    return min(sizes, key=lambda size: min(times[size] for times in tried))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--score", choices=SCORES, default="softplus", help="how the loop writes log p(x | z)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    x = (torch.rand(a.images, 784) < 0.3).float()
    pair = Experiment.from_dict(SPEC).build((784,))
    loop = HandWritten(pair, SCORES[a.score])
    block = best_block(loop, x, a.samples)
    print(f"the loop's block: {block} draws")
    times, apart = [], []
    for seed in range(a.rounds):
        ours, found = seconds(partial(evidence, pair, x, samples=a.samples, seed=seed))
        hand, bounds = seconds(partial(loop, x, a.samples, block))
        times.append((ours, hand))
        difference = abs(found.iwae.value - float(bounds.double().mean()))
        apart.append(difference / (math.sqrt(2) * found.iwae.standard_error))  # both have that error
        print(f"pvae {ours:.2f} s   hand-written {hand:.2f} s   ratio {ours / hand:.3f}")
    ours, hand = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"median ratio {ratio:.3f}; largest difference {max(apart):.2f} standard errors of a difference")
    print(f"projected to {ALL} images: pvae {ours * ALL / a.images:.0f} s, hand-written {hand * ALL / a.images:.0f} s")


if __name__ == "__main__":
    main()
