"""Parallel efficiency of fits, log q_agg and evidence: seconds of one process over those of W times as many.

Every process has one thread. One process and W take turns; both fit in W shards. A figure is the median over rounds of
T(1) / (W T(W)), 1 where W processes are W times as fast.

    python tests/bench/sharing.py [--rounds 3] [--processes 2] [--rows 60000] [--json FILE]
    python tests/bench/sharing.py --far FILE      (bytes, operations and hours of ten million rows, from such a file)
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import pvae
from pvae import Experiment, analysis
from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.distributions.exponential import Normals
from pvae.util import group
from pvae.util.files import follows

BATCHES = {100: 100, 1000: 30, 10_000: 6}
"""Steps of an epoch by batch size."""
SPEC = {
    "latents": {"z": {"dim": 40}},
    "encoder": {"network": {"kind": "mlp", "hidden": [300, 300]}},
    "decoder": {"network": {"kind": "mlp", "hidden": [300, 300]}, "likelihood": {"kind": "bernoulli"}},
    "data": {"source": "tensor"},
}


def step_seconds(batch: int, steps: int, shards: int, folder: Path) -> float:
    """Seconds of a step, the mean of three epochs."""
    x = (torch.rand(batch * steps + 20, 784) < 0.2).float()
    train = {"epochs": 3, "batch_size": batch, "shards": shards, "engine": "eager"}
    last = len(x) - 20
    splits = {"train": [0, last], "validation": [last, last + 10], "test": [last + 10, last + 20]}
    declared = Experiment.from_dict(SPEC | {"train": train, "data": {"source": "tensor", "splits": splits}})
    run = pvae.fit(declared, data=x, run_dir=folder, progress=False)
    return float(str(run.status["seconds"])) / (3 * steps)


def scored(rows: int, dim: int = 40) -> float:
    """Seconds of log q_agg of a sample of every row under all rows."""
    loc, scale = torch.randn(rows, dim), torch.full((rows, dim), 0.3)
    mixture, value = AggregatedPosterior(Normals(loc, scale)), loc + scale * torch.randn(rows, dim)
    mixture.log_prob(value[:1000])
    begun = time.perf_counter()
    with group.joined(loc.device):
        mixture.log_prob(value)
    return time.perf_counter() - begun


BOUNDED = 400, 500
"""Rows, and importance samples of each, of the evidence."""


def bounded(rows: int = BOUNDED[0], samples: int = BOUNDED[1]) -> float:
    """Seconds of an importance-weighted bound."""
    pair = Experiment.from_dict(SPEC).build((784,))
    x = (torch.rand(rows, 784) < 0.2).float()
    with group.joined(x.device):
        analysis.evidence(pair, x[:20], samples=50)
        begun = time.perf_counter()
        analysis.evidence(pair, x, samples=samples)
        return time.perf_counter() - begun


def measured(processes: int, rows: int, folder: Path) -> dict[str, float]:
    """Seconds of every piece of work, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {f"step, batch {batch}": step_seconds(batch, steps, processes, folder) for batch, steps in BATCHES.items()}
    return found | {f"log q_agg, n = {rows}": scored(rows), "evidence": bounded()}


def started(number: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of every piece of work, by one start of `number` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    child = [__file__, "--processes", str(options.processes), "--rows", str(options.rows)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        command = [*launcher, *child, "--child", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


ROWS, DIM, SAMPLES, LINK = 10_000_000, 40, 500, 1e9
"""Rows, coordinates, importance samples and bytes a second between two machines of the table on paper."""


def far(found: dict[str, Any], devices: tuple[int, ...] = (1, 8, 64)) -> Iterator[str]:
    """Lines of a Markdown table: what every device computes, sends and holds, and its hours at the measured rate.

    A step sends its vector of gradients once for every doubling of the devices. For log q_agg every device holds all
    components, and at the end each gets the sums of the others' values; encoding, which is linear in the rows, is left
    out. An evidence sends some numbers for every row.
    """
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in _networks())
    step, pairs, bound = found["step, batch 10000"], found[f"log q_agg, n = {found['rows']}"], found["evidence"]
    row, pair = step["seconds of one process"] / 10_000, pairs["seconds of one process"] / found["rows"] ** 2
    sample = bound["seconds of one process"] / (BOUNDED[0] * BOUNDED[1])
    vector = 4 * (encoder + decoder)
    yield "| work | devices | operations each | sent by each | held by each | hours |"
    yield "|---|---|---|---|---|---|"
    for count in devices:
        rounds, share = math.log2(count), ROWS / count
        work: dict[str, tuple[float, float, float, float]] = {
            "an epoch, batch 10 000": (
                6 * (encoder + decoder) * share, rounds * vector * ROWS / 10_000, 4 * vector, row * share
            ),
            "log q_agg, all pairs": (4 * DIM * ROWS * share, 16 * ROWS * rounds, 8 * DIM * ROWS, pair * ROWS * share),
            f"evidence, {SAMPLES} samples": (
                2 * decoder * SAMPLES * share, 64 * share, vector, sample * SAMPLES * share
            ),
        }  # fmt: skip
        for name, (operations, sent, held, seconds) in work.items():
            hours = (seconds + sent / LINK) / 3600
            yield f"| {name} | {count} | {operations:.1e} | {sent / 1e9:.2g} GB | {held / 1e9:.2g} GB | {hours:.3g} |"


def _networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    pair: Any = Experiment.from_dict(SPEC).build((784,))
    return pair.guide, pair.model


def main() -> None:
    """Print efficiencies, and seconds of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--far", type=Path)
    options = parser.parse_args()
    if options.far:
        print("\n".join(far(json.loads(options.far.read_text()))))
        return
    if options.child:
        found = measured(options.processes, options.rows, options.child)
        if not follows():
            print(json.dumps(found))
        return
    rounds = [(started(1, options), started(options.processes, options)) for _ in range(options.rounds)]
    table = {}
    for name in rounds[0][0]:
        ratios = [alone[name] / (options.processes * shared[name]) for alone, shared in rounds]
        seconds = statistics.median(alone[name] for alone, _ in rounds)
        table[name] = {"efficiency": statistics.median(ratios), "all": ratios, "seconds of one process": seconds}
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:24} {seconds:9.4f} s alone, efficiency {statistics.median(ratios):.2f} ({told})")
    if options.json:
        options.json.write_text(json.dumps({"processes": options.processes, "rows": options.rows, **table}, indent=2))


if __name__ == "__main__":
    main()
