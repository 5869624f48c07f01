"""Cost of one training step: pvae's engines against hand-written PyTorch, stock SVI and pythae.

All variants take turns in one process on the same batches; a figure is the median over rounds of the ratio to
the hand-written step of the same round. Batch 100, 784-300-300-40, Bernoulli, Adam. The seconds to make a compiled step
are those of a cold start in the first run, of a warm one in later runs (`XDG_CACHE_HOME` sets the cache).

    python tests/bench/step.py [--rounds 300] [--device cpu] [--json FILE]
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import pyro
import torch
from torch import Tensor, nn

from pvae import Experiment
from pvae.nn.precision import Precision
from pvae.objectives.base import Loss
from pvae.pair.pair import Pair
from pvae.training.step import Step, make_capturable
from pvae.util.seeds import set_noise

BATCH = 100
DEVICE = torch.device("cpu")
SPEC = {
    "latents": {"z": {"dim": 40}},
    "encoder": {"network": {"kind": "mlp", "hidden": [300, 300]}},
    "decoder": {"network": {"kind": "mlp", "hidden": [300, 300]}, "likelihood": {"kind": "bernoulli"}},
}
Variant = Callable[[Tensor], object]


class HandWritten(nn.Module):
    """The same VAE in plain PyTorch, Monte Carlo KL included."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 80))
        self.decoder = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 784))

    def forward(self, x: Tensor) -> Tensor:
        """Minus the ELBO, nats per datum."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        log_variance = log_variance.clamp(-12, 6)
        noise = torch.randn_like(loc)
        z = loc + (0.5 * log_variance).exp() * noise
        cross = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        kl = 0.5 * (z.square() - noise.square() - log_variance).sum(-1)
        return (cross + kl).mean()


def by_hand(model: nn.Module) -> Variant:
    """Loop of a Module that returns its loss, with fused Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).backward()
        optimizer.step()

    return step


def of_pvae(engine: str, experiment: Experiment, pair: Pair, x: Tensor, precision: Precision = "float32") -> Variant:
    """pvae's step, as `fit` takes it, on the device of x."""
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)
    if x.is_cuda:
        make_capturable(optimizer, x.device)
    start = time.perf_counter()
    stepper = Step(Loss(experiment.objective, pair, precision=precision).to(x.device), optimizer, engine, x)
    if engine != "eager":
        print(f"{engine} step in {precision} made in {time.perf_counter() - start:.1f} s")
    count = 0

    def step(x: Tensor) -> None:
        nonlocal count
        set_noise(count, x.device)
        stepper(x)
        count += 1

    return step


def ours(engine: str, x: Tensor, precision: Precision = "float32") -> Variant:
    """pvae's step of the VAE above."""
    experiment = Experiment.from_dict(SPEC)
    return of_pvae(engine, experiment, experiment.build((784,)).to(DEVICE), x, precision)


def stock_svi() -> Variant:
    """pyro.infer.SVI with pyro.optim.Adam and Trace_ELBO, the Modules registered by pyro.module."""
    pair = Experiment.from_dict(SPEC).build((784,)).to(DEVICE)
    parts: dict[str, nn.Module] = {"model": pair.model, "guide": pair.guide}  # type: ignore[dict-item]

    def model(x: Tensor) -> None:
        pyro.module("model", parts["model"])(x)

    def guide(x: Tensor) -> None:
        pyro.module("guide", parts["guide"])(x)

    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]
    return pyro.infer.SVI(model, guide, adam, pyro.infer.Trace_ELBO()).step


def pythae_step() -> Variant:
    """pythae's VAE with its own architecture classes at the same sizes, torch Adam."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            BaseEncoder.__init__(self)
            self.net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
            self.loc, self.log_variance = nn.Linear(300, 40), nn.Linear(300, 40)

        def forward(self, x: Tensor) -> ModelOutput:
            h = self.net(x.reshape(len(x), -1))
            return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            BaseDecoder.__init__(self)
            self.net = nn.Sequential(
                nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 784), nn.Sigmoid()
            )

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).reshape(-1, 1, 28, 28))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=40, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder()).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model({"data": x.reshape(-1, 1, 28, 28)}).loss.backward()
        optimizer.step()

    return step


def interleave(variants: dict[str, Variant], batches: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and median ratio to the first variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 10):
        x = batches[i % len(batches)]
        for name, step in variants.items():
            start = time.perf_counter()
            step(x)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i >= 10:
                times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
        }
        for name, values in times.items()
    }


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    global DEVICE
    DEVICE = torch.device(arguments.device)
    fast = "captured" if DEVICE.type == "cuda" else "compiled"
    torch.manual_seed(0)
    batches = (torch.rand(20, BATCH, 784) > 0.5).float().to(DEVICE)
    variants: dict[str, Variant] = {
        "hand-written, fused Adam": by_hand(HandWritten().to(DEVICE)),
        f"pvae {fast}": ours(fast, batches[0]),
        f"pvae {fast}, bfloat16": ours(fast, batches[0], "bfloat16"),
        "pvae eager": ours("eager", batches[0]),
        "stock SVI.step": stock_svi(),
    }
    if find_spec("pythae"):
        variants["pythae"] = pythae_step()
    with pyro.validation_enabled(False):
        table = interleave(variants, batches, arguments.rounds)
    for name, row in table.items():
        print(f"{name:28s} {row['ms']:8.3f} ms   {row['ratio']:.3f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(table, file, indent=2)


if __name__ == "__main__":
    main()
