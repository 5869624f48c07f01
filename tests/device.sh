#!/usr/bin/env bash
# Checks on a machine with an NVIDIA GPU, in under ten minutes: the tests marked cuda, one fit, one surgery, and NCCL
# with one process. Everything is logged into the folder named first (default: device-log). PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
log=${1:-device-log} python=${PYTHON:-.venv/bin/python}
mkdir -p "$log"
export PYTHONPATH=$PWD MPLBACKEND=Agg
failed=0

check() {  # NAME COMMAND...: run a command, keep its output, go on after a failure
    local name=$1 start=$SECONDS
    shift
    if timeout 300 "$@" >"$log/$name.txt" 2>&1; then echo "ok $name ($((SECONDS - start)) s)"
    else echo "FAILED $name ($((SECONDS - start)) s)"; tail -20 "$log/$name.txt"; failed=1; fi
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
check cuda "$python" -m pytest -q -m cuda tests
check fit "$python" -m pvae fit vae train.epochs=20 --device cuda --run-dir "$log/runs"
check shards "$python" -m pvae fit vae train.epochs=5 train.shards=2 --device cuda --run-dir "$log/shards"
check surgery "$python" -m pvae surgery vae --run-dir "$log/runs" --device cuda
check nccl "$python" -c '
import tempfile, torch, torch.distributed as dist
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    x = torch.arange(4.0, device="cuda")
    dist.all_reduce(x)
    dist.destroy_process_group()
assert x.tolist() == [0.0, 1.0, 2.0, 3.0], x
'
exit $failed
