"""Runs fitted by earlier versions: they load, resume bit for bit and refit.

`fixtures/runs` holds runs of version 0.1.0 that a signal stopped at step 7 of 8, `fixtures/finished` the weights of the
same fits that nobody stopped. Both were fitted with kernels that every x86-64 processor has (the variables below), so
that the bits do not depend on the machine that runs this test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
COMMON_KERNELS = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}

GO_ON = """
import sys, pvae
run = pvae.resume(sys.argv[1], device="cpu", progress=False)
print(run.path)
second = pvae.refit(run, sys.argv[2], "train.epochs=1", run_dir=sys.argv[3], progress=False)
assert second.status["state"] == "finished"
assert {latent: type(part.prior).__name__ for latent, part in second.experiment.latents.items()}
"""


@pytest.mark.parametrize(
    ("name", "prior"), [("vamp", "latents.z.prior.kind=mixture"), ("vq_vae", "latents.c.prior.kind=categorical")]
)
def test_a_run_of_an_earlier_version_resumes_bit_for_bit_and_refits(name: str, prior: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "runs" / name, tmp_path / name)
    (run,) = (tmp_path / name).iterdir()
    command = [sys.executable, "-c", GO_ON, str(run), prior, str(tmp_path / "second")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **COMMON_KERNELS}, timeout=120)
    assert done.returncode == 0, done.stderr
    (last,) = run.glob("checkpoints/step-00000008")
    expected = FIXTURES / "finished" / name
    for path in expected.glob("*.safetensors"):
        found, wanted = load_file(last / path.name), load_file(path)
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(found[key], wanted[key]), f"{path.stem}: {key}"
    timed = ("seconds",)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (run, expected)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    found_rows, wanted_rows = ([{k: v for k, v in row.items() if k not in timed} for row in part] for part in rows)
    assert found_rows == wanted_rows
