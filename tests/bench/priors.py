"""Cost of one training step with every prior, as a ratio to N(0, I) on the same networks and engine.

All priors take turns in one process on the same batches; a figure is the median over rounds of the ratio to the
step with N(0, I) of the same round. Gated 784-300-300-40, Bernoulli, fused Adam. One row more: N(0, I) in bfloat16.

    python tests/bench/priors.py [--rounds 100] [--engine eager] [--batch 100] [--threads 1] [--device cpu]
                                  [--only NAME...]
"""

import argparse
import statistics
import time
import warnings

import pyro
import torch

from pvae import Experiment
from pvae.objectives.base import Loss
from pvae.training.step import Step, make_capturable
from pvae.util.seeds import set_noise

NETWORK = {"kind": "gated_mlp", "hidden": [300, 300]}
HVAE = "two levels"
HALF = "standard_normal, bfloat16"
PRIORS: dict[str, dict[str, object]] = {
    "standard_normal": {"kind": "standard_normal"},
    HALF: {"kind": "standard_normal"},
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
    pair = experiment.build((784,)).attend(x.repeat(20, 1).cpu()).to(x.device)
    loss = Loss(experiment.objective, pair, precision="bfloat16" if name == HALF else "float32").to(x.device)
    optimizer = experiment.train.optimizer.build(pair.parameters())
    if x.is_cuda:
        make_capturable(optimizer, x.device)
    return Step(loss, optimizer, engine, x)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--engine", default="eager", choices=["eager", "compiled", "captured"])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[*PRIORS], choices=[*PRIORS], metavar="NAME")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device(a.device)
    batches = (torch.rand(20, a.batch, 784) > 0.5).float().to(device)
    with pyro.validation_enabled(False):
        steps = {}
        for name in dict.fromkeys(["standard_normal", *a.only]):
            try:
                steps[name] = step_of(name, a.engine, batches[0])
            except RuntimeError as error:  # a fit would go on eagerly
                print(f"{name:26s} not {a.engine}: {str(error).splitlines()[0]}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(a.rounds + 10):
            for name, step in steps.items():
                set_noise(i, device)
                start = time.perf_counter()
                step(batches[i % len(batches)])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    base = times["standard_normal"][10:]
    for name, values in times.items():
        ratio = statistics.median(v / b for v, b in zip(values[10:], base, strict=True))
        print(f"{name:26s} {1e3 * statistics.median(values[10:]):8.2f} ms   {ratio:.2f}")


if __name__ == "__main__":
    main()
