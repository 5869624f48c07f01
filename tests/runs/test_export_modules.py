"""Modules and cards that leave pvae: files that run in a process without it, and what a reader of a card sees."""

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pvae
from pvae.analysis.pages.card import card, escaped
from pvae.analysis.samples.modules import PlainDecoder, PlainModule
from pvae.errors import DeclarationError, MissingExtraError
from pvae.experiment.experiment import Experiment
from pvae.experiment.zoo import names
from pvae.runs.export.modules import FORMATS, export_module
from pvae.runs.run import Run
from pvae.util.files import pretty
from tests.cli_runner import run_cli, run_cli_json
from tests.zoo_runs import tiny_run

RUN_WITHOUT = """
import sys, json, numpy, torch, onnxruntime
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 3
for path, alone in json.load(sys.stdin):
    if path.endswith(".pt2"):
        program = torch.export.load(path).module()
    else:
        program = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    for rows in (1, 2, 7):
        given = dict(numpy.load(f"{path}.{rows}.npz"))
        if path.endswith(".pt2"):
            tensors = {name: torch.from_numpy(a) for name, a in given.items()}
            first = () if alone is None else (tensors.pop(alone),)
            found = program(*first, **tensors)
            found = list(found.values()) if isinstance(found, dict) else [found]
            found = [t.detach().numpy() for t in found]
        else:
            found = program.run(None, given)
        numpy.savez(f"{path}.{rows}.out.npz", *found)
assert not {"pvae", "pyro"} & {name.split(".")[0] for name in sys.modules}
"""
"""Program that runs exported files on the inputs beside them."""
FLOWS = "flow_dequantised", "flow_variational", "iaf_posterior", "relaxed_flow_prior"
REFUSED: dict[tuple[str, ...], str] = {
    **{(name, "encoder"): "known mean" for name in FLOWS},
    ("gan", "encoder"): "that of a GAN",
    ("em_mixture", "encoder", ".onnx"): "linalg_solve_triangular",
}
"""Entries that cannot be exported, and why: posteriors without a known mean, and an operation that ONNX lacks."""


def values_of(module: PlainModule, rows: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, like in module.example(rows).items():
        count = module.inputs[name][1]
        found[name] = torch.randint(count, like.shape) if count else torch.rand_like(like)
    return found


def assert_same_elsewhere(folder: Path, wanted: list[tuple[Run, str, str]]) -> None:
    """Modules of runs, exported, give the same in a process without pvae and Pyro, for any batch size."""
    orders: list[tuple[str, str | None]] = []
    expected: dict[str, list[Any]] = {}
    for number, (run, what, suffix) in enumerate(wanted):
        path = export_module(run, folder / f"{number}-{run.name}-{what}{suffix}", what)
        module = getattr(run, what)
        orders.append((str(path), module.alone))
        for rows in (1, 2, 7):
            values = values_of(module, rows)
            arrays: dict[str, Any] = {name: t.numpy() for name, t in values.items()}
            np.savez(f"{path}.{rows}.npz", **arrays)
            with torch.no_grad():
                found = module(**values)
            expected[f"{path}.{rows}"] = list(found.values()) if isinstance(found, dict) else [found]
    done = subprocess.run([sys.executable, "-c", RUN_WITHOUT], input=json.dumps(orders), text=True, cwd=folder)
    assert done.returncode == 0
    for key, tensors in expected.items():
        with np.load(f"{key}.out.npz") as found:
            for i, t in enumerate(tensors):
                np.testing.assert_allclose(found[f"arr_{i}"], t, rtol=1e-5, atol=1e-5, err_msg=key)


def test_files_run_in_a_process_without_pvae(tmp_path):
    run = tiny_run("conditional")
    assert_same_elsewhere(tmp_path, [(run, "decoder", ".pt2"), (run, "encoder", ".onnx")])


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_entry_is_exported_or_says_why(name, tmp_path):
    run, wanted = tiny_run(name), []
    for what, suffix in product(("decoder", "encoder"), (".pt2", ".onnx")):
        if why := REFUSED.get((name, what)) or REFUSED.get((name, what, suffix)):
            with pytest.raises(DeclarationError, match=why):
                export_module(run, tmp_path / f"x{suffix}", what)
            continue
        wanted.append((run, what, suffix))
    assert_same_elsewhere(tmp_path, wanted)
    assert not (tmp_path / "x.onnx").exists()


def built(data: dict[str, Any], network: dict[str, Any], likelihood: str) -> Experiment:
    return Experiment.from_dict({
        "name": "built", "data": data, "latents": {"z": {"dim": 2}}, "encoder": {"network": network},
        "decoder": {"network": network, "likelihood": {"kind": likelihood}},
    })  # fmt: skip


COLUMNS = {
    "a": {"type": "continuous", "missing": "mask"}, "b": {"type": "categorical", "levels": ["u", "v", "w"]},
    "n": {"type": "count"}, "t": {"type": "binary"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "network", "likelihood", "shape"),
    [
        ({"source": "csv", "path": "x.csv", "columns": COLUMNS}, {"kind": "mlp", "hidden": [4]}, "columns", (4,)),
        ({"source": "digits"}, {"kind": "conv", "channels": [4]}, "normal", (1, 8, 8)),
    ],
    ids=["table", "conv"],
)
def test_tables_and_convolutions_are_programs(data, network, likelihood, shape, tmp_path):
    from pvae.analysis.samples.modules import PlainEncoder
    from pvae.runs.export.modules import to_pt2

    pair = built(data, network, likelihood).build(shape).eval()
    x = torch.rand(5, *shape).round() if likelihood == "columns" else torch.rand(5, *shape)
    if likelihood == "columns":
        x[0, 0] = torch.nan
    z = torch.randn(5, 2)
    for make, value in ((PlainDecoder, z), (PlainEncoder, x)):
        (tmp_path / "m.pt2").write_bytes(to_pt2(make(pair), {}))
        found = torch.export.load(tmp_path / "m.pt2").module()(value)
        torch.testing.assert_close(found, make(pair)(value))
        assert found.isfinite().all()


def test_weights_and_declaration_are_enough_to_build_the_module_again(tmp_path):
    run = tiny_run("conditional")
    path = tmp_path / "w.safetensors"
    answer = run_cli_json("export", str(run.path), str(path))
    assert answer["where"] == str(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert facts["inputs"] == "z (n, 16), y (n) of whole numbers 0 .. 9"
    pair = Experiment.from_toml(facts["declaration"], "file").build(tuple(json.loads(facts["shape"])))
    again = PlainDecoder(pair)
    again.load_state_dict(load_file(path))
    z, y = torch.randn(3, 16), torch.tensor([1, 2, 3])
    torch.testing.assert_close(again(z, y=y), run.decoder(z, y=y))


def test_a_run_that_was_copied_away_loads_in_a_fresh_process(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(60, 3)).astype("float32"))
    few = ["latents.z.dim=2", "encoder.network.hidden=[4]", "decoder.network.hidden=[4]", "train.epochs=1"]
    made = pvae.Experiment.load("vae_normal", [f"data={{source='npz', path='{tmp_path}/d.npz'}}", *few])
    run = pvae.fit(made, run_dir=tmp_path / "runs", progress=False)
    expected = run.decoder(torch.ones(1, 2)).tolist()
    shutil.copytree(run.path, tmp_path / "elsewhere")
    (tmp_path / "d.npz").unlink()
    shutil.rmtree(tmp_path / "runs")
    script = "import json, pvae, torch; print(pvae.Run.load('elsewhere').decoder(torch.ones(1, 2)).tolist())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout) == expected, done.stderr
    text = card(pvae.Run.load(tmp_path / "elsewhere"))
    assert "Rows: not known here" in text
    assert "No report is kept with this run" in text


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    run, path = tiny_run("em_mixture"), tmp_path / "x.onnx"
    path.write_text("old")
    with pytest.raises(DeclarationError, match=r"x\.onnx: expected a encoder .*linalg_solve_triangular"):
        export_module(run, path, "encoder")
    monkeypatch.setattr("pvae.errors.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pvae-pyro\[onnx\]"):
        export_module(run, path)
    assert path.read_text() == "old"
    for arguments in ([str(tmp_path / "x.h5")], [str(tmp_path / "x.pt2"), "--what", "both"]):
        _, err = run_cli("export", str(run.path), *arguments, code=2)
        assert f"expected decoder or encoder, in {', '.join(FORMATS)}" in err


HOSTILE = "<script>x</script> | `a` *b* [c](d) $e$ # f \x1b[31m"


def test_a_card_holds_what_a_reader_asks_for_and_escapes_what_others_wrote(tmp_path):
    few = ["data.splits.train=[0, 60]", "train.epochs=1", "train.engine=eager", f"description={json.dumps(HOSTILE)}"]
    run = pvae.fit("vae", *few, "encoder.network.hidden=[4]", run_dir=tmp_path, progress=False)
    elbo = {"value": -12.3456, "standard_error": 0.0123, "kind": "lower_bound"}
    evidence = {"unit": "nats per datum", "n": 5, "figures": {HOSTILE: elbo, "none": None}}
    verdict = [{"text": HOSTILE, "alert": True}, {"text": "calm", "alert": False}]
    run.files.report.joinpath("report.json").write_text(pretty({"verdict": verdict, "evidence": evidence}))
    run_cli("export", str(run.path), str(tmp_path / "card.md"))
    text = (tmp_path / "card.md").read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert 'model_name: "vae"' in front
    assert "p(x, z) = p(z) p(x | z)" in body
    assert "Rows: 60 train" in body
    assert run.data.fingerprint in body
    assert "| -12.346 | 0.012 | lower bound |" in body
    assert "calm" not in body
    assert "\x1b" not in body
    prose = [line for line in body.splitlines() if not line.startswith("    ")]
    assert not any("<script>" in line or "*b*" in line or "[c](" in line or "$e$" in line for line in prose)
    assert sum(escaped(HOSTILE) in line for line in prose) == 3  # description, figure, alert
