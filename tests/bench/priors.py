"""Cost of one training step with every prior, as a ratio to N(0, I) on the same networks and engine.

All priors take turns in one process on the same batches; a figure is the median over rounds of the ratio to the
step with N(0, I) of the same round. Batch 100, gated 784-300-300-40, Bernoulli, fused Adam.

    python tests/bench/priors.py [--rounds 100] [--engine eager]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import pyro
import torch

from pvae import Experiment
from pvae.objectives import Loss
from pvae.seeds import set_noise
from pvae.step import Step

NETWORK = {"kind": "gated_mlp", "hidden": [300, 300]}
HVAE = "two levels"
PRIORS: dict[str, dict[str, object]] = {
    "standard_normal": {"kind": "standard_normal"},
    "mixture, K = 500": {"kind": "mixture"},
    "vamp, K = 500": {"kind": "vamp"},
    "realnvp": {"kind": "realnvp"},
    "maf": {"kind": "maf"},
    "realnvp, 6 layers": {"kind": "realnvp", "layers": 6},
    "maf, 6 layers": {"kind": "maf", "layers": 6},
    "spline_coupling": {"kind": "spline_coupling"},
    "exemplar, M = 500": {"kind": "exemplar", "components": 500},
    HVAE: {"kind": "conditional_normal", "network": NETWORK},
}


def step_of(name: str, engine: str, x: torch.Tensor) -> Step:
    """A step of the declared VAE with a prior, or of two levels of 40 coordinates."""
    prior = PRIORS[name]
    decoder: dict[str, object] = {"network": NETWORK, "likelihood": {"kind": "bernoulli"}}
    spec = {"latents": {"z": {"dim": 40, "prior": prior}}, "encoder": {"network": NETWORK}, "decoder": decoder}
    if name == HVAE:
        below = {"dim": 40, "given": ["z2"], "prior": prior, "posterior": {"kind": "normal", "given": ["x", "z2"]}}
        spec["latents"] = {"z2": {"dim": 40}, "z1": below}
        spec["encoder"] = {"kind": "per_latent", "network": NETWORK}
        spec["decoder"] = {**decoder, "given": ["z1", "z2"]}
    experiment = Experiment.from_dict(spec)
    pair = experiment.build((784,)).attend(x.repeat(20, 1))
    return Step(Loss(experiment.objective, pair), experiment.train.optimizer.build(pair.parameters()), engine, x)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--engine", default="eager", choices=["eager", "compiled"])
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    batches = (torch.rand(20, 100, 784) > 0.5).float()
    with pyro.validation_enabled(False):
        steps = {}
        for name in PRIORS:
            try:
                steps[name] = step_of(name, a.engine, batches[0])
            except RuntimeError as error:  # a fit would go on eagerly
                print(f"{name:20s} not {a.engine}: {str(error).splitlines()[0]}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(a.rounds + 10):
            for name, step in steps.items():
                set_noise(i, torch.device("cpu"))
                start = time.perf_counter()
                step(batches[i % len(batches)])
                times[name].append(time.perf_counter() - start)
    base = times["standard_normal"][10:]
    for name, values in times.items():
        ratio = statistics.median(v / b for v, b in zip(values[10:], base, strict=True))
        print(f"{name:20s} {1e3 * statistics.median(values[10:]):8.2f} ms   {ratio:.2f}")


if __name__ == "__main__":
    main()
