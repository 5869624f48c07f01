"""Data that stay on the disk: how much memory a fit takes, and how fast it is beside the same fit on data in memory.

Two files are made: a table of 1 million rows and 50 columns (CSV: 30 continuous, 10 counts, 5 binary, 5 of levels) and
an array of 2 GiB (NumPy: 196 numbers a row). For each, a child process fits one epoch from the disk and says the most
memory it held (VmHWM) over that of the same fit of the first 2000 rows; another does so with the data in memory. Then
one process fits epochs from disk and from memory by turns: the ratio of rows a second is the median over turns.

    python tests/bench/streaming.py [--case table|array] [--rows N] [--turns 3] [--folder DIR]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pvae
from pvae.data import load

CHUNK = 50_000
LEVELS = ("low", "mid", "high")
SMALL = 2000
ROWS = {"table": 1_000_000, "array": 2**31 // (4 * 196)}


def make_table(path: Path, rows: int) -> None:
    """A mixed table whose columns depend on four hidden numbers."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 50))
    for start in range(0, rows, CHUNK):
        n = min(CHUNK, rows - start)
        h = rng.standard_normal((n, 4)) @ weights
        columns: dict[str, Any] = {f"c{i}": h[:, i] + rng.standard_normal(n) for i in range(30)}
        columns |= {f"n{i}": rng.poisson(np.exp(h[:, 30 + i] / 2)) for i in range(10)}
        columns |= {f"b{i}": (h[:, 40 + i] + rng.standard_normal(n) > 0).astype(int) for i in range(5)}
        columns |= {
            f"k{i}": pd.cut(h[:, 45 + i], [-np.inf, -1, 1, np.inf], labels=["low", "mid", "high"]) for i in range(5)
        }
        pd.DataFrame(columns).to_csv(path, mode="a", header=start == 0, index=False, float_format="%.6g")


def make_array(path: Path, rows: int) -> None:
    """Eight factors and noise."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 196), np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 196))
    for start in range(0, rows, CHUNK):
        n = min(CHUNK, rows - start)
        out[start : start + n] = rng.standard_normal((n, 8), np.float32) @ weights
        out[start : start + n] += 0.3 * rng.standard_normal((n, 196), np.float32)


def declaration(case: str, path: Path, *, stream: bool) -> pvae.Experiment:
    """A VAE of eight latents on the file."""
    data: dict[str, Any] = {"path": str(path), "stream": stream}
    if case == "array":
        data["source"], likelihood = "npy", "normal"
    else:
        names = [*(f"c{i}" for i in range(30)), *(f"n{i}" for i in range(10))]
        columns: dict[str, Any] = {n: {"type": "continuous" if n[0] == "c" else "count"} for n in names}
        columns |= {f"b{i}": {"type": "binary"} for i in range(5)}
        columns |= {f"k{i}": {"type": "categorical", "levels": LEVELS} for i in range(5)}
        data |= {"source": "csv", "columns": columns}
        likelihood = "columns"
    hidden = {"kind": "mlp", "hidden": [256, 256]}
    return pvae.Experiment.from_dict(
        {
            "name": f"{case}-{'disk' if stream else 'memory'}",
            "data": data,
            "latents": {"z": {"dim": 8}},
            "encoder": {"network": hidden},
            "decoder": {"likelihood": likelihood, "network": hidden},
            "train": {"epochs": 1, "batch_size": 512, "engine": "eager", "keep": "last"},
        }
    )


def held_mib() -> float:
    """The most this process has held so far, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def child(case: str, path: Path, *, stream: bool) -> None:
    """Fit one epoch; print what it took."""
    experiment = declaration(case, path, stream=stream)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = pvae.fit(experiment, run_dir=folder, device="cpu", progress=False)
        seconds = float(run.metrics["seconds"].max())
        print(json.dumps({"mib": held_mib(), "fit": seconds, "all": time.perf_counter() - start}))


def in_child(case: str, path: Path, *, stream: bool) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, "--child", str(path), "--case", case, *(["--stream"] if stream else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turns(case: str, path: Path, count: int) -> tuple[float, float, float]:
    """Rows a second from disk and from memory, and the median of their ratio over turns of one epoch each."""
    experiments = {stream: declaration(case, path, stream=stream) for stream in (True, False)}
    data = {stream: load(e.data) for stream, e in experiments.items()}
    speed: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(count):
        for stream, experiment in experiments.items():
            with tempfile.TemporaryDirectory() as folder:
                run = pvae.fit(experiment, data=data[stream], run_dir=folder, device="cpu", progress=False)
                train = run.metrics[run.metrics["split"] == "train"]
                speed[stream].append(len(data[stream].train) / float(train["seconds"].max()))
    ratios = [a / b for a, b in zip(speed[True], speed[False], strict=True)]
    return statistics.median(speed[True]), statistics.median(speed[False]), statistics.median(ratios)


def measure(case: str, folder: Path, rows: int, count: int) -> None:
    """Make the files of a case, and print its figures."""
    suffix, make = {"table": (".csv", make_table), "array": (".npy", make_array)}[case]
    path, small = folder / f"{case}-{rows}{suffix}", folder / f"{case}-{SMALL}{suffix}"
    for where, n in ((path, rows), (small, SMALL)):
        if not where.exists():
            make(where, n)
    print(f"{case}: {rows:,} rows, {path.stat().st_size / 2**30:.2f} GiB", flush=True)
    baseline = in_child(case, small, stream=False)["mib"]
    for how, stream in (("from disk, first time", True), ("from disk", True), ("in memory", False)):
        found = in_child(case, path, stream=stream)
        print(
            f"  {how:22} {found['mib'] - baseline:7.0f} MiB over the baseline of {baseline:.0f}, epoch "
            f"{found['fit']:.1f} s, with reading and checks {found['all']:.1f} s",
            flush=True,
        )
    disk, memory, ratio = turns(case, path, count)
    print(
        f"  rows a second: {disk:,.0f} from disk, {memory:,.0f} in memory, ratio {ratio:.3f} (median of {count} turns)"
    )


def main() -> None:
    """Both cases, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(ROWS))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.child:
        child(given.case, given.child, stream=given.stream)
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in [given.case] if given.case else list(ROWS):
            measure(case, given.folder or Path(folder), given.rows or ROWS[case], given.turns)


if __name__ == "__main__":
    main()
