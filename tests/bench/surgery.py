"""Surgery of a Fashion-MNIST VAE at full size: seconds, memory over the data, growth with n, errors on the grid.

python tests/bench/surgery.py [--run FOLDER] [--sizes 5000 10000 20000 40000 60000]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import pvae
from pvae.analysis import AggregatedPosterior, surgery
from pvae.analysis.aggregate.aggregated import all_pairs, marginal_log_prob
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw

FIT = ["data.source=fashion_mnist", "latents.z.dim=40", "encoder.network={kind='gated_mlp', hidden=[300, 300]}",
       "decoder.network={kind='gated_mlp', hidden=[300, 300]}", "objective.beta={kind='linear', start=0.0, end=1.0, "
       "epochs=2}"]  # fmt: skip


def fitted(folder: str | None, epochs: int) -> pvae.Run:
    """The run that is measured: a given one, or a short fit."""
    if folder:
        return pvae.Run.load(folder)
    where = tempfile.mkdtemp()
    return pvae.fit("vae", *FIT, f"train.epochs={epochs}", run_dir=where, device="cpu", progress=False)


def peak() -> float:
    """MiB that this process held at most since the last `forget_peak`; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def forget_peak() -> float:
    """Start a new peak; returns what is held now, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def product_alone(value: Tensor, loc: Tensor) -> float:
    """Seconds of a preallocated float64 matrix product of the same size (n x 2D x n), nothing else."""
    a, b = torch.cat([value, value], 1), torch.cat([loc, loc], 1).T.contiguous()
    out = torch.empty(512, len(loc), dtype=value.dtype)
    start = time.perf_counter()
    for rows in a.split(512):
        torch.mm(rows, b, out=out[: len(rows)])
    return time.perf_counter() - start


def density(pair: pvae.Pair, x: Tensor) -> tuple[float, float]:
    """Seconds of log q_agg of one draw of every row under all rows, and of the product alone."""
    with quiet(pair, x, 0):
        z = draw(pair, x).latents["z"]
    assert z.q is not None
    assert z.normal is not None
    mixture = AggregatedPosterior(z.q)
    start = time.perf_counter()
    mixture.log_prob(z.value)
    return time.perf_counter() - start, product_alone(z.value, z.normal.loc)


def grid(pair: pvae.Pair, x: Tensor) -> str:
    """Errors of the densities of single coordinates against the sum over all pairs."""
    with quiet(pair, x, 0):
        z = draw(pair, x).latents["z"]
    q = z.normal
    assert q is not None
    found = marginal_log_prob(q.loc, q.scale, z.value)
    columns = [all_pairs(q.loc[:, d], q.scale[:, d], z.value[:, d]) for d in range(q.loc.shape[1])]
    error = found - torch.stack(columns, 1)
    return (
        f"coordinates on a grid at n = {len(x)}: largest error {float(error.abs().max()):.1e} nats, mean "
        f"{float(error.mean()):+.1e}; smallest scale {float(q.scale.min()):.1e}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 10_000, 20_000, 40_000, 60_000])
    a = parser.parse_args()
    run = fitted(a.run, a.epochs)
    pair = run.pair
    whole = torch.cat([run.data.split(name).x for name in ("train", "validation", "test")])
    print(grid(pair, whole[:5000]))
    for n in a.sizes:
        x = whole[:n]
        seconds, product = density(pair, x)
        held = forget_peak()
        start = time.perf_counter()
        found = surgery(pair, x)
        spent = time.perf_counter() - start
        print(
            f"n = {n:6d}   log q_agg {seconds:6.2f} s, {seconds / product:.2f} x a product alone   surgery "
            f"{spent:6.2f} s, {peak() - held:5.0f} MiB over the data   I_q {found.mutual_information}",
            flush=True,
        )
    print(found)


if __name__ == "__main__":
    main()
