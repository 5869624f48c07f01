"""Cost of one training step on 64 x 64 colour patches: pvae's engines against hand-written PyTorch, the same VAE.

The model is that of `analysis/studies/colour/vae.toml`, the data are patches of photographs, batches of 64. The
hand-written step starts at pvae's weights, and the losses of both are first shown for the same noise. All variants take
turns in one process with one thread; a figure is the median over rounds of the ratio to the hand-written step of the
same round, in seconds of the processor, since other work of the machine does not count there.

    python -m tests.bench.colour [--rounds 20] [--size 64] [--compiled]
"""

import argparse
import statistics
import time
import warnings

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pvae import Experiment
from pvae.data import load
from pvae.objectives.base import Loss
from pvae.util.seeds import set_noise
from tests.bench.step import by_hand, of_pvae

BATCH, WARM = 64, 3
CPU = torch.device("cpu")


def up(channels: int, to: int) -> nn.Module:
    """Convolution that doubles the sides of an image."""
    return nn.ConvTranspose2d(channels, to, 3, stride=2, padding=1, output_padding=1)


class HandWritten(nn.Module):
    """The VAE in plain PyTorch: three strided convolutions each way, a discretised logistic of 256 values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        side = size // 8
        self.decoder = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64 * side**2), nn.ReLU(), nn.Unflatten(1, (64, side, side)),
            up(64, 64), nn.ReLU(), up(64, 32), nn.ReLU(), up(32, 6),
        )  # fmt: skip
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(64 * side**2, 256), nn.ReLU(), nn.Linear(256, 128),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Minus the ELBO, nats per datum."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        log_variance = log_variance.clamp(-12, 6)
        noise = torch.randn_like(loc)
        z = loc + (0.5 * log_variance).exp() * noise
        centre, log_scale = self.decoder(z).chunk(2, 1)
        inverse, off = (2.0 - log_scale).clamp(max=7.0).exp(), x - centre - 0.5
        half = 0.5 / 255
        above, below = logsigmoid((off + half) * inverse), logsigmoid(-(off - half) * inverse)
        inner = above + below + (-torch.expm1(-2 * half * inverse)).log()
        log_p = torch.where(x < half, above, torch.where(x > 1 - half, below, inner)).sum((1, 2, 3))
        kl = 0.5 * (z.square() - noise.square() - log_variance).sum(-1)
        return (kl - log_p).mean()


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--compiled", action="store_true")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    experiment = Experiment.load("analysis/studies/colour/vae.toml").with_overrides(f"data.size={a.size}")
    x = load(experiment.data).train.x
    batches = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))][: 8 * BATCH].split(BATCH)
    torch.manual_seed(0)
    pairs = [experiment.build((3, a.size, a.size)) for _ in range(1 + a.compiled)]
    model = HandWritten(a.size)
    with pyro.validation_enabled(False):
        with torch.no_grad():
            for own, other in zip(model.parameters(), pairs[0].parameters(), strict=True):
                own.copy_(other)
            set_noise(0, CPU)
            told = float(model(batches[0]))
            set_noise(0, CPU)
            loss, _ = Loss(experiment.objective, pairs[0])(batches[0])
            print(f"loss by hand {told:.4f}, of pvae {float(loss):.4f}")
        variants = {"hand-written": by_hand(model)}
        for engine, pair in zip(("eager", "compiled"), pairs, strict=False):
            variants[f"pvae {engine}"] = of_pvae(engine, experiment, pair, batches[0])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for i in range(a.rounds + WARM):
            for name, step in variants.items():
                start = time.perf_counter(), time.process_time()
                step(batches[i % len(batches)])
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    base = times["hand-written"][WARM:]
    for name, every in times.items():
        wall, cpu = (1e3 * statistics.median(part) for part in zip(*every[WARM:], strict=True))
        ratio = statistics.median(own[1] / other[1] for own, other in zip(every[WARM:], base, strict=True))
        print(f"{name:16s} {cpu:8.1f} ms of the processor, {wall:8.1f} ms of the clock   {ratio:.3f}")


if __name__ == "__main__":
    main()
