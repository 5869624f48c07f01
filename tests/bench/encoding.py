"""Encoding of a long table: rows a second, and the most memory held over that of the same command on few rows.

A CSV of 1 million rows and 50 columns of numbers is encoded into Parquet by `pvae encode RUN --data FILE --out FILE`,
in a child process, by a VAE of eight latents that was fitted to the first 20 000 rows. Where several processes
are asked for, torchrun starts them, and their file has to be that of one.

    python tests/bench/encoding.py [--rows 1000000] [--command encode|score] [--processes 1 2] [--ending .parquet]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import pvae

SMALL = 20_000
CHUNK = 50_000
HELD = (
    "import sys; from pvae.cli import main\n"
    "try:\n    main()\n"
    "finally:\n    print(*[l for l in open('/proc/self/status') if l.startswith('VmHWM')], file=sys.stderr)"
)
"""Program that runs a command and says the most memory that it held."""


def make(path: Path, rows: int) -> None:
    """Numbers that depend on eight hidden ones."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 50))
    for start in range(0, rows, CHUNK):
        n = min(CHUNK, rows - start)
        x = rng.standard_normal((n, 8)) @ weights + 0.3 * rng.standard_normal((n, 50))
        frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(50)])
        frame.insert(0, "id", [f"r{start + i}" for i in range(n)])
        frame.to_csv(path, mode="a", header=start == 0, index=False, float_format="%.6g")


def fitted(folder: Path, small: Path) -> None:
    """A VAE on few rows."""
    columns = {f"c{i}": {"type": "continuous"} for i in range(50)}
    data = {"source": "csv", "path": str(small), "columns": columns, "id": "id", "stream": True}
    hidden = {"kind": "mlp", "hidden": [64]}
    raw = {"name": "long", "data": data, "latents": {"z": {"dim": 8}}, "encoder": {"network": hidden}}
    raw |= {"decoder": {"likelihood": "columns", "network": hidden}, "train": {"epochs": 2, "engine": "eager"}}
    pvae.fit(pvae.Experiment.from_dict(raw), run_dir=folder / "runs", device="cpu", progress=False)


def measured(processes: int, *command: str) -> tuple[float, float]:
    """Seconds of a command, and the most MiB that one of its processes held."""
    start = [sys.executable]
    program = Path(tempfile.gettempdir(), f"held-{os.getpid()}.py")
    program.write_text(HELD)
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    began = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, str(program), *command], capture_output=True, text=True, env=env, check=False)
    seconds = time.perf_counter() - began
    program.unlink()
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, max(int(kib) / 1024 for kib in re.findall(r"VmHWM:\s+(\d+)", done.stderr))


def main() -> None:
    """Make the files, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--command", default="encode")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--ending", default=".parquet")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        small, large = folder / "small.csv", folder / "large.csv"
        make(small, SMALL)
        make(large, given.rows)
        fitted(folder, small)
        files = []
        for processes in given.processes:
            found = {}
            for path in (small, large):
                out = folder / f"{path.stem}-{processes}{given.ending}"
                line = [given.command, "long", "--data", str(path), "--out", str(out)]
                found[path] = measured(processes, *line, "--run-dir", str(folder / "runs"))
            files.append(out)
            (few, base), (seconds, held) = found[small], found[large]
            speed = (given.rows - SMALL) / (seconds - few)
            print(
                f"{given.command} of {given.rows:,} rows to {given.ending}, {processes} processes: {seconds:.0f} s, "
                f"{speed:,.0f} rows a second after the start; {held - base:.0f} MiB over {base:.0f}",
                flush=True,
            )
        if len(files) > 1:
            print("the same file:", len({file.read_bytes() for file in files}) == 1)


if __name__ == "__main__":
    main()
